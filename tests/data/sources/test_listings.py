"""Folders that have not changed are not read again, and the images found are those of a fresh walk."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dynexit.data.file_tree import FileTree, read_tree
from dynexit.data.sources import listings
from dynexit.data.sources.listings import Listings, visible_folders
from dynexit.dist import Ranks
from dynexit.jobs.load import load_on_ranks
from dynexit.study.schema import Config
from tests.data.on_disk import write_folders
from tests.data.test_folders import folder
from tests.test_collectives import on_two_ranks

SETTLED_NS = 50 * 10**6  # above the tick of the kernel's clock


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has not changed for long enough to be kept: cat with 2 images and deep/er with 1, dog with 1."""
    monkeypatch.setattr(listings, "_SETTLED_NS", SETTLED_NS)
    for name in ("cat/b.png", "cat/a.png", "cat/notes.txt", "cat/.x", "cat/deep/er/c.png", "dog/d.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    settle()
    return tmp_path / "images"


def settle() -> None:
    time.sleep(2 * SETTLED_NS / 1e9)


def read(root: Path) -> tuple[FileTree, int]:
    """The tree, and how many folders below `root` were read for it."""
    names, scans = visible_folders(root), []
    scandir = os.scandir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", lambda path: scans.append(path) or scandir(path))
        return read_tree(root, names), sum(root in Path(path).parents for path in scans)


def read_as_fresh(root: Path) -> int:
    """How many folders are read; what is found must be what a walk without anything kept finds."""
    tree, num_read = read(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root.parent / f"fresh{time.time_ns()}"))
        assert tree == read_tree(root, visible_folders(root))
    return num_read


def test_only_changed_folders_are_read_again(root: Path) -> None:
    tree = read(root)[0]
    assert tree.names == ["cat/a.png", "cat/b.png", "cat/deep/er/c.png", "dog/d.png"]
    assert (tree.num_hidden, tree.other_suffixes, tree.subfolders) == (1, {".txt": 1}, {"deep": 1})

    def swap() -> None:
        (root / "cat").rename(root / "x")
        (root / "dog").rename(root / "cat")
        (root / "x").rename(root / "dog")

    def replace_with_old_times() -> None:
        status = (root / "cat").stat()
        (root / "cat" / "d.png").rename(root / "cat" / "e.png")
        os.utime(root / "cat", ns=(status.st_atime_ns, status.st_mtime_ns))  # as tar and rsync do

    changes: list[tuple[Callable[[], object], int]] = [
        (lambda: None, 0),
        (lambda: (root / "cat" / "deep" / "er" / "new.jpg").touch(), 1),
        (lambda: (root / "cat" / "a.png").unlink(), 1),
        (lambda: (root / "emu").mkdir(), 1),
        (lambda: (root / "dog" / "d.png").write_bytes(b"x"), 0),
        (swap, 4),
        (replace_with_old_times, 1),
        (lambda: shutil.rmtree(root / "dog" / "deep"), 1),
        (lambda: None, 0),
    ]
    for change, num_read in changes:
        change()
        settle()
        assert read_as_fresh(root) == num_read


def test_a_folder_that_has_just_changed_is_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [read_as_fresh(root), read_as_fresh(root)] == [4, 0]
    (root / "dog" / "new.png").touch()
    assert [read_as_fresh(root), read_as_fresh(root)] == [1, 1]
    settle()
    assert [read_as_fresh(root), read_as_fresh(root)] == [1, 0]
    os.utime(root / "dog", ns=(2**62, 2**62))  # a time to come is no proof
    assert [read_as_fresh(root), read_as_fresh(root)] == [1, 1]


def test_folders_with_links_are_read_every_time(root: Path) -> None:
    target = root.parent / "target.png"
    target.touch()
    (root / "dog" / "link.png").symlink_to(target)
    (root / "emu").symlink_to("../birds")
    shutil.copytree(root / "dog", root.parent / "birds", symlinks=False)
    settle()
    assert [read_as_fresh(root), read_as_fresh(root)] == [5, 1]  # emu itself leads to a folder without links
    target.unlink()
    target.mkdir()
    (target / "inside.png").touch()
    assert "dog/link.png/inside.png" in read(root)[0].names
    settle()
    assert [read_as_fresh(root), read_as_fresh(root)] == [2, 1]


@pytest.mark.parametrize("content", [b"{", b'{"cat": 1}', b"\xff"])
def test_a_damaged_cache_costs_time_and_no_result(root: Path, content: bytes) -> None:
    read(root)
    Listings(root).path.write_bytes(content)
    assert [read_as_fresh(root), read_as_fresh(root)] == [4, 0]


def test_a_cache_that_cannot_be_written_does_not_matter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "file"))
    assert [read_as_fresh(root), read_as_fresh(root)] == [4, 4]


def test_names_of_other_bytes_than_utf8_are_found(root: Path) -> None:
    (root / "dog" / os.fsdecode(b"\xff.png")).touch()
    settle()
    assert [read_as_fresh(root), read_as_fresh(root)] == [4, 4]
    assert os.fsdecode(b"dog/\xff.png") in read(root)[0].names


def test_other_ranks_take_what_the_first_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "_SETTLED_NS", SETTLED_NS)
    write_folders(tmp_path / "images", {"": {"cat": 4, "dog": 5}})
    config = Config(data=folder(tmp_path / "images"))
    settle()

    def load(ranks: Ranks) -> tuple[list[str] | None, list[bool]]:
        kept = []
        init = Listings.__init__

        def noted(self: Listings, folder: Path) -> None:
            init(self, folder)
            kept.append(bool(self._before))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Listings, "__init__", noted)
            data = load_on_ranks(config, ranks, checked=True)
        return data.train.file_names(), kept

    (names, first), (same, second) = on_two_ranks(tmp_path, load)
    assert names == same
    assert (first, second) == ([False], [True])
