"""What is written is whole or not there; what is finished is checked."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from dynexit.errors import Failure
from dynexit.run_dir import (
    RunDir,
    atomic_write,
    is_done,
    mark_done,
    read_json,
    sha256_file,
    write_json,
    write_text,
)
from dynexit.study.grid import Point


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old")

    def torn() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        torn()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match=r"file/inner could not be written: .*; free space or fix the permissions"):
        write_text(tmp_path / "file" / "inner", "")


def test_json_keeps_every_bit_and_refuses_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [0.1 + 0.2, 1e-320])
    assert read_json(tmp_path / "a.json") == [0.1 + 0.2, 1e-320]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(Failure, match=r"a\.json is damaged .* move it aside with `mv "):
        read_json(tmp_path / "a.json")


def finished(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights").write_bytes(b"12345")
    mark_done(tmp_path, "id1", ["sub/weights"])
    return tmp_path


def test_done_is_checked(tmp_path: Path) -> None:
    assert not is_done(tmp_path, "id1")
    folder = finished(tmp_path)
    assert is_done(folder, "id1", check_bytes=True)
    with pytest.raises(Failure, match=r"holds the work of another configuration \(id id1, expected id2\)"):
        is_done(folder, "id2")


def test_damage_is_named_with_its_remedy(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    weights = folder / "sub" / "weights"
    weights.write_bytes(b"12845")
    assert is_done(folder, "id1")
    with pytest.raises(Failure) as caught:
        is_done(folder, "id1", check_bytes=True)
    assert str(caught.value) == (
        f"{weights} was altered (its SHA-256 is not the one in DONE); move it aside with "
        f"`mv {folder} {folder}.damaged` and run the same command again to remake it"
    )
    weights.write_bytes(b"123")
    with pytest.raises(Failure, match="has 3 bytes instead of 5"):
        is_done(folder, "id1")
    weights.unlink()
    with pytest.raises(Failure, match="is missing although its job is finished"):
        is_done(folder, "id1")


def test_run_dir_gives_paths_files_and_done(tmp_path: Path) -> None:
    point = cast(Point, SimpleNamespace(study_dir=tmp_path, ids={"train": "abc"}))
    directory = RunDir(point, "train")
    assert directory.path == tmp_path / "train" / "abc"
    assert str(RunDir(point, "pack", "p1") / "log.txt") == f"{tmp_path}/pack/p1/log.txt"
    assert not directory.is_done()
    digest = directory.save_tensors("heads.safetensors", {"w": torch.arange(3.0)})
    directory.write_lines("rows.jsonl", [{"a": 1}, {"a": 2}])
    assert not directory.is_marked
    directory.mark_done(["heads.safetensors", "rows.jsonl"])
    assert directory.is_marked
    assert directory.is_done(check_bytes=True)
    assert directory.digest("heads.safetensors") == digest == sha256_file(directory / "heads.safetensors")
    assert directory.load_tensors("heads.safetensors")["w"].tolist() == [0, 1, 2]
    assert (directory / "rows.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
