"""The commands that need no study, as a user starts them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.command_line import TINY, digests, dynexit
from tests.conftest import require

pytestmark = pytest.mark.slow


def test_macs_of_a_backbone(tmp_path: Path) -> None:
    asked = ("macs", "test_resnet", "--image-size", "64", "--num-classes", "7")
    report = json.loads(dynexit(tmp_path, *asked, "--json").stdout)
    assert {"full_macs", "backbone_macs", "head_macs", "gate_macs"} <= set(report)
    assert report["backbone_macs"] == sorted(report["backbone_macs"])
    assert report["backbone_macs"][-1] < report["full_macs"]
    info = json.loads(dynexit(tmp_path, *asked, "--dyce").stdout)
    assert info["backbone"]["macs"] == [*report["backbone_macs"], report["full_macs"]]
    text = dynexit(tmp_path, *asked).stdout
    assert text.startswith(f"test_resnet at 64x64, 7 classes: {report['full_macs'] / 1e6:,.1f} M MACs")
    narrow = json.loads(dynexit(tmp_path, *asked, "--json", "--arguments", "{channels: [8, 8, 8, 8]}").stdout)
    assert narrow["full_macs"] < report["full_macs"]
    wrong = dynexit(tmp_path, *asked, "--arguments", "8", status=2).stderr
    assert "argument --arguments: '8' should be a mapping, as '{channels: [8, 12, 16, 24]}'" in wrong
    error = dynexit(tmp_path, "macs", "resnet51", status=2).stderr
    assert "unknown backbone 'resnet51' (nearest name: 'resnet50')" in error


def test_a_records_way_out_and_back(tmp_path: Path) -> None:
    run = ("run", TINY, "report.mlflow=false", "seed=0", "jei_dnn.ce_ic_tradeoff=1", "record.topk=3")
    dynexit(tmp_path, *run)
    (record,) = (tmp_path / "runs" / "tiny_study" / "record").iterdir()
    for split in ("validation", "test"):
        dynexit(tmp_path, "convert", record / split, f"{split}.npz")
        dynexit(tmp_path, "convert", f"{split}.npz", f"{split}_again")
    searched = []
    for suffix in (".npz", "_again"):
        files = ("--train", f"validation{suffix}", "--val", f"test{suffix}", "--macs", record / "costs.json")
        dynexit(tmp_path, "search-records", *files, "--accuracy-weights", "0.5:1:0.25", "--out", f"out{suffix}")
        searched.append((tmp_path / f"out{suffix}" / "configurations.json").read_text())
        assert (tmp_path / f"out{suffix}" / "operating_points.csv").is_file()
    assert searched[0] == searched[1]
    entries = json.loads(searched[0])
    assert [entry["accuracy_weight"] for entry in entries] == [0.5, 0.75, 1.0]
    assert all(len(entry["exits"]) == 3 for entry in entries)
    missing = ("--train", "nowhere", "--val", "test.npz", "--macs", record / "costs.json")
    error = dynexit(tmp_path, "search-records", *missing, "--accuracy-weights", "1:1:1", "--out", "no", status=2).stderr
    assert "nowhere" in error
    assert not (tmp_path / "no").exists()


def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    require(os.geteuid() == 0, "mounting a small file system needs root")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount)], check=True)
    try:
        run = ("run", TINY, "report.mlflow=false")
        error = dynexit(tmp_path, *run, f"runs_dir={mount}", status=1).stderr
        assert "No space left on device" in error
        assert "free space" in error
        assert "Traceback" not in error
        subprocess.run(["mount", "-o", "remount,size=60M", str(mount)], check=True)
        dynexit(tmp_path, *run, f"runs_dir={mount}")
        dynexit(tmp_path, *run)
        assert digests(mount / "tiny_study") == digests(tmp_path / "runs" / "tiny_study")
    finally:
        subprocess.run(["umount", str(mount)], check=True)
