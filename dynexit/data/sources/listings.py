"""What the folders of a tree hold, kept in the user's cache folder: one that has not changed is not read again."""

import collections
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dynexit.data.pixels import EXTENSIONS
from dynexit.data.sources.checked import cache_path
from dynexit.errors import Failure, UserError
from dynexit.run_dir import read_json, write_text

_FORMAT = 1  # raise it if other names are hidden or other suffixes are those of images
_SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system, FAT's


class Listing(NamedTuple):
    """The entries of a folder: names of images, sorted, and of folders, and how many others there are."""

    images: list[str]
    folders: list[str]
    num_hidden: int
    other_suffixes: dict[str, int]


class Listings:
    """The listings of the folders below `root`, by inode and times of change.

    A cache that cannot be read or written costs time, never a result.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, cache_path("listed", root, _FORMAT)
        self._before: dict[str, tuple[list[int], Listing]] = {}
        self._now: dict[str, tuple[list[int], Listing]] = {}
        with contextlib.suppress(OSError, Failure):
            self._before = read_json(self.path, dict[str, tuple[list[int], Listing]])

    def read(self, where: str) -> Listing:
        """Returns what `root / where` holds. Raises UserError if it cannot be read.

        A listing is kept unless the folder changed just before it was read, as it may change again within a tick of
        the clock, or holds a link: what that leads to can change without the folder.
        """
        folder = self.root / where
        with _naming(folder):
            status = folder.stat()
        state = [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]  # st_dev differs between nodes
        before = self._before.get(where)
        if before is not None and before[0] == state:
            self._now[where] = before
            return before[1]
        is_settled = max(state[1:]) < time.time_ns() - _SETTLED_NS
        listing, has_links = _read(folder)
        if is_settled and not has_links:
            self._now[where] = state, listing
        return listing

    def save(self) -> None:
        """Writes the listings of the folders that were asked for."""
        if self._now != self._before:
            with contextlib.suppress(Failure, UnicodeEncodeError):  # names may be of other bytes than UTF-8
                write_text(self.path, json.dumps(self._now, ensure_ascii=False))


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped: `.ipynb_checkpoints`, `._copy.jpg`, `__MACOSX`."""
    return name.startswith(".") or name.upper() == "__MACOSX"


def visible_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted as strings, without hidden ones."""
    return sorted(_read(folder)[0].folders)


def _read(folder: Path) -> tuple[Listing, bool]:
    """What `folder` holds now, and whether there are links."""
    listing, has_links = Listing([], [], 0, collections.Counter()), False
    num_hidden = 0
    with _naming(folder), os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                num_hidden += 1
                continue
            has_links |= entry.is_symlink()
            if _is_folder(entry):
                listing.folders.append(entry.name)
            elif entry.name.lower().endswith(EXTENSIONS):
                listing.images.append(entry.name)
            else:
                suffix = os.path.splitext(entry.name)[1].lower() or "no suffix"
                listing.other_suffixes[suffix] = listing.other_suffixes.get(suffix, 0) + 1
    return listing._replace(images=sorted(listing.images), num_hidden=num_hidden), has_links


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read ({error.strerror}); correct its permissions") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False
