"""The script for a machine with a GPU, every stage of it at small size on the CPU, and the model of step times."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks import gpu
from tests.benchmarks.roofline import count, extrapolate, print_beside
from tests.command_line import ENVIRONMENT, ROOT

# what a bare machine with a GPU may lack; Python loads a module of this name at its start
SPARSE = """
from importlib.machinery import PathFinder
MISSING = "mlflow deepspeed submitit onnx onnxruntime transformers hypothesis xdist pytest_timeout".split()
find_spec = PathFinder.find_spec
def found(cls, name, *more):
    return None if name.partition(".")[0] in MISSING else find_spec(name, *more)
PathFinder.find_spec = classmethod(found)
# and dynexit is a folder there, not installed
from importlib import metadata
version = metadata.version
def version_but_of(name):
    if name == "dynexit":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = version_but_of
"""


@pytest.mark.slow
def test_every_stage_runs_at_small_size_with_few_wheels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sitecustomize.py").write_text(SPARSE)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    results = json.loads(out.read_text())
    assert set(gpu.STAGES) <= set(results)
    assert results["packs"]["rows"][0]["backbone_seconds"] > 0
    print_beside(results["packs"]["rows"])
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[2] for line in table[2:]] == ["1", "2"]
    assert results["study"]["infer"]["unexplained_differences"] == 0
    assert {"prepare", "train", "record", "infer"} <= set(results["study"]["jobs"])
    expected = "skipped" if not torch.cuda.is_available() else "passed"
    assert expected in results["marked_tests"]["summary"]


def test_what_a_gpu_machine_gets_is_small() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert sum((ROOT / name).stat().st_size for name in tracked.split("\0") if name) < 64 << 20


def test_all_stages_together_take_under_nine_minutes() -> None:
    assert sum(limit for _, limit in gpu.STAGES.values()) < 540


def test_missing_wheels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("timm", "yaml") else real(name))
    with pytest.raises(SystemExit, match="missing wheels: PyYAML, timm; run: pip install PyYAML timm"):
        gpu.environment("cpu", True)


def test_a_stage_out_of_time_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.STAGES, "copies", (gpu.copies, 0))
    assert gpu.run_stage("copies", "cpu", True)["error"] == "took longer than 0 s"


def test_bytes_are_bilinear_in_batch_and_members() -> None:
    counted = {}
    for batch in (2, 4, 6):
        for num_members in (1, 2, 3):
            counted[batch, num_members] = count("t2t_vit_7", 10, 32, batch, num_members)[1].num_bytes
    corners = {point: value for point, value in counted.items() if point[0] < 6 and point[1] < 3}
    assert extrapolate(corners, 6, 3) == pytest.approx(counted[6, 3], rel=0.01)
