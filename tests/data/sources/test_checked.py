"""Images that were checked before are not read again until they change."""

import hashlib
import os
from pathlib import Path

import pytest
from PIL import Image

import dynexit.data.inspection
from dynexit.data import load_data
from dynexit.errors import UserError
from tests.data.on_disk import write_folders
from tests.data.test_folders import folder


def test_only_changed_files_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path, {"": {"cat": 8, "dog": 8}})
    opened: list[str] = []
    open_image = dynexit.data.inspection.open_image

    def noted(path: Path) -> Image.Image:
        opened.append(path.name)
        return open_image(path)

    monkeypatch.setattr(dynexit.data.inspection, "open_image", noted)

    def opened_by(check: str | None) -> int:
        opened.clear()
        load_data(folder(tmp_path, check_images=check))
        return len(opened)

    checks = (None, "headers", "pixels", "pixels", "headers", "none")
    assert [opened_by(check) for check in checks] == [16, 0, 16, 0, 0, 0]
    changed = tmp_path / "cat" / "3.png"
    os.utime(changed, ns=(0, 0))
    assert opened_by("pixels") == 1
    content = changed.read_bytes()
    changed.write_bytes(content[: len(content) // 2])
    for _ in range(2):  # a damaged file is never remembered
        with pytest.raises(UserError, match=rf"^1 of 16 images in {tmp_path} do not decode: {changed}; replace"):
            opened_by("pixels")


def test_files_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path, {"": {"cat": 8, "dog": 8}})
    originals = sorted((tmp_path / "cat").iterdir())
    for path in originals:
        path.with_name(f"copy{path.name}").write_bytes(path.read_bytes())
    read: list[object] = []
    file_digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file) or file_digest(file, kind))

    def opened() -> tuple[list[str], int]:
        read.clear()
        data = load_data(folder(tmp_path, num_validation=6, num_test=6))
        return [line for line in data.remarks if "byte-equal" in line], len(read)

    copies, num_read = opened()
    assert copies
    assert num_read
    assert opened() == (copies, 0)
    for path in originals:
        os.utime(path, ns=(0, 0))
    again, num_again = opened()
    assert again == copies
    assert 0 < num_again <= len(originals)


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 1000])
def test_a_damaged_cache_costs_time_alone(damage: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_folders(tmp_path / "pets", {"": {"cat": 6, "dog": 6}})
    before = load_data(folder(tmp_path / "pets")).remarks
    (kept,) = (tmp_path / "cache" / "dynexit" / "checked").iterdir()
    kept.write_bytes(damage)
    assert load_data(folder(tmp_path / "pets")).remarks == before
    assert kept.stat().st_size == 12 * 33
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert load_data(folder(tmp_path / "pets")).remarks == before
