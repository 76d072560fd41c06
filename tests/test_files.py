"""What is no regular file is refused before it is opened, and damaged JSON of a run folder names its first mistake."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dynexit.contents import Classes, Done, Found, JobProgress
from dynexit.deploy.model_folder import new_folder
from dynexit.errors import Failure
from dynexit.files import regular
from dynexit.run_dir import RunDir, atomic_write, mark_done, read_json, save_tensors, write_text
from dynexit.study.read import load_study
from tests.command_line import TINY


def test_pipes_folders_and_large_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("12345")
    for path, text in (
        (tmp_path / "pipe", "a pipe or a device"),
        (Path("/dev/full"), "a device"),
        (tmp_path, "folder"),
    ):
        with pytest.raises(OSError, match=text):
            regular(path)
    with pytest.raises(OSError, match="has 5 bytes; at most 4 are read"):
        regular(tmp_path / "text", most_bytes=4)
    assert regular(tmp_path / "text", most_bytes=5).read_text() == "12345"


@pytest.mark.parametrize(
    ("kind", "content", "mistake"),
    [
        (Classes, {"names": ["a", 3]}, "names.1: Input should be a valid string"),
        (Classes, [], "Input should be an object"),
        (
            Done,
            {"id": "x", "files": {"f": {"bytes": -1, "sha256": "0" * 64}}},
            "files.f.bytes: Input should be greater",
        ),
        (Done, {"id": "x"}, "files: Field required"),
        (list[Found], [{"exits": [[0, "high"]]}], "0.exits.0.1: Input should be a valid number"),
        (JobProgress, {"step": 1, "num_steps": 2, "figures": {"loss": "x"}}, "figures.loss: Value error"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, kind: Any, content: object, mistake: str) -> None:
    path = tmp_path / "content.json"
    path.write_text(json.dumps(content))
    with pytest.raises(Failure) as caught:
        read_json(path, kind)
    assert str(caught.value).startswith(f"{path} is damaged ({mistake}")
    assert f"`mv {tmp_path} {tmp_path}.damaged`" in str(caught.value)


def test_unknown_keys_of_later_versions_are_kept(tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('{"names": ["cat"], "colours": 3}')
    assert read_json(tmp_path / "classes.json", Classes) == {"names": ["cat"], "colours": 3}


def test_damaged_costs_and_metrics_name_file_and_line(tmp_path: Path) -> None:
    directory = RunDir(load_study(TINY, [f"runs_dir={tmp_path}"]).points[0], "record")
    write_text(directory / "metrics.jsonl", '{"epoch": 0}\n{"epoch": "one"}\n')
    with pytest.raises(Failure, match=r"metrics.jsonl is damaged \(line 2: epoch: Input should be a valid integer\)"):
        directory.read_lines("metrics.jsonl")
    costs = {"full_macs": 9, "positions": [0], "backbone_macs": [10], "head_types": ["linear"], "head_macs": [[1]]}
    directory.write_json("costs.json", {**costs, "gate_macs": [0]})
    with pytest.raises(Failure, match=r"costs.json is damaged \(MACs must not decrease with depth"):
        directory.costs()


def test_written_files_honour_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
        save_tensors(tmp_path / "tensors", {"zeros": torch.zeros(2)})
        with new_folder(tmp_path / "model") as temporary:
            (temporary / "file").touch()
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode)[-3:] for path in tmp_path.iterdir()} == {
        "file": "640",
        "tensors": "640",
        "model": "750",
    }


def test_done_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "result.json") as temporary:
        temporary.write_text("{}")
        litter = temporary.with_name(temporary.name.replace("result", "other"))
        litter.write_text("cut off")
    mark_done(tmp_path, "id", ["result.json"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DONE", "result.json"]
