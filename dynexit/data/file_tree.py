"""Finds the images below a folder per class: hidden entries, links and files of other kinds are skipped and counted."""

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dynexit.data.pixels import EXTENSIONS
from dynexit.data.sources.listings import Listings
from dynexit.errors import UserError, counted

_NUM_NAMED = 5  # of many names, as many are shown
_Identity = tuple[int, int]  # of a folder, whatever path leads to it


@dataclasses.dataclass
class FileTree:
    """The images below a folder's class folders, and what was skipped there."""

    names: list[str]  # relative to the folder
    class_names: list[str]  # one for each name
    num_hidden: int = 0
    num_links: int = 0  # to folders that are read already
    other_suffixes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    subfolders: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # images in each


def some(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more


def read_tree(folder: Path, class_names: Sequence[str]) -> FileTree:
    """The images in the class folders at any depth, in the order that torchvision lists them in.

    A folder is read once, whatever links lead to it; links to a class folder or to a folder around it are skipped.
    Raises UserError if two class folders are one, or if a folder cannot be read.
    """
    tree = FileTree([], [])
    seen: dict[_Identity, str] = {_identity(parent): "" for parent in (folder.resolve(), *folder.resolve().parents)}
    for name in class_names:
        first = seen.setdefault(_identity(folder / name), name)
        if first != name:
            raise UserError(
                f"{folder}: the class folder {name} is a link to "
                f"{f'the class folder {first}' if first else 'a folder around it'}; remove it"
            )
    listings = Listings(folder)
    for name in sorted(class_names):
        for where, images in sorted(_walk(listings, name, tree, seen)):
            tree.names += [os.path.join(where, image) for image in images]
            tree.class_names += [name] * len(images)
            if images and os.sep in where:
                tree.subfolders[where.split(os.sep)[1]] += len(images)
    listings.save()
    return tree


def _walk(
    listings: Listings, start: str, tree: FileTree, seen: dict[_Identity, str]
) -> Iterator[tuple[str, list[str]]]:
    """Yields the folders at and below `start` with the names of their images; adds what is skipped to `tree`."""
    left = [start]
    while left:
        where = left.pop()
        listing = listings.read(where)
        for name in listing.folders:
            identity = _identity(listings.root / where / name)
            if identity in seen:
                tree.num_links += 1
            else:
                seen[identity] = start
                left.append(os.path.join(where, name))
        tree.num_hidden += listing.num_hidden
        tree.other_suffixes.update(listing.other_suffixes)
        yield where, listing.images


def _identity(folder: Path) -> _Identity:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _by_count(counts: collections.Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def remarks_of(folder: Path, tree: FileTree) -> Iterator[str]:
    """Yields a line for each kind of entry that was skipped, and for images that lie deeper than their class folder."""
    if tree.num_hidden:
        hidden = counted(tree.num_hidden, "hidden file or folder", "hidden files and folders")
        yield f"{folder}: skipped {hidden}, as .ipynb_checkpoints or __MACOSX"
    if tree.num_links:
        yield f"{folder}: skipped {counted(tree.num_links, 'link')} to folders that are read already"
    if tree.other_suffixes:
        counts = [f"{count} {suffix}" for suffix, count in _by_count(tree.other_suffixes)]
        yield (
            f"{folder}: skipped {counted(tree.other_suffixes.total(), 'file', 'files')} without an image's suffix "
            f"({some(counts)}); read are {' '.join(EXTENSIONS)}"
        )
    if tree.subfolders:
        counts = [f"{count} in {name}" for name, count in _by_count(tree.subfolders)]
        yield (
            f"{folder}: {counted(tree.subfolders.total(), 'image lies', 'images lie')} in folders inside the class "
            f"folders ({some(counts)}); each has the class of its outermost folder"
        )
