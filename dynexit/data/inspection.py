"""Reads the images of a folder once, before anything is trained on it: damage, rotation, copies in several splits."""

import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dynexit.data.file_tree import some
from dynexit.data.images import FileSource
from dynexit.data.pixels import (
    NOT_AN_IMAGE,
    PixelRangeError,
    has_unstated_depth,
    is_rotated,
    open_image,
    to_rgb,
)
from dynexit.data.sources.checked import PIXELS, ROTATED, UNSTATED_DEPTH, CheckedFiles
from dynexit.errors import UserError, counted

_T = TypeVar("_T")
_R = TypeVar("_R")
_NUM_THREADS = 16
_CHUNK = 500  # files that a thread takes at once
_MOST_LISTED = 20  # classes that are listed one by one
_DAMAGED = "do not decode"
_OUT_OF_RANGE = "have numbers that are no intensities (floats outside [0, 1], or negative integers)"


class _Finding(NamedTuple):
    fault: str  # '' if there is none
    path: str  # of the image that has it
    seen: int = 0  # bits of a record


def inspect_images(sources: Sequence[FileSource], *, pixels: bool) -> list[str]:
    """Reads the headers (or `pixels`) of all images that changed since they were last checked; returns remarks on them.

    Raises UserError, with a line for each split and fault, that names the images which cannot be read.
    """
    faults, rotated, unstated = [], 0, 0
    for source in sources:
        checked = CheckedFiles(source.folder)
        paths = [source.path(row) for row in range(len(source.labels))]
        found = _in_threads(functools.partial(_inspect, checked, pixels), paths)
        checked.save()
        rotated += sum(bool(one.seen & ROTATED) for one in found)
        unstated += sum(bool(one.seen & UNSTATED_DEPTH) for one in found)
        for fault in (_DAMAGED, _OUT_OF_RANGE):
            faulty = [one.path for one in found if one.fault == fault]
            if faulty:
                faults.append(
                    f"{len(faulty)} of {len(found)} images in {source.folder} {fault}: {some(faulty)}; replace them or "
                    "remove them"
                )
    if faults:
        raise UserError("\n".join(faults))
    remarks = []
    if rotated:
        remarks.append(
            f"{counted(rotated, 'image has', 'images have')} an EXIF rotation, which is ignored: pixels are read as "
            "they are stored"
        )
    if unstated:
        remarks.append(
            f"{counted(unstated, 'image holds', 'images hold')} 32-bit integers: each is scaled by the smallest of 8, "
            "16 and 31 bits that holds its values"
        )
    return remarks


def _in_threads(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """Returns the function of every item, in order."""
    chunks = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        parts = pool.map(lambda chunk: [function(item) for item in chunk], chunks)
        return list(itertools.chain.from_iterable(parts))


def _inspect(checked: CheckedFiles, pixels: bool, path: Path) -> _Finding:
    try:
        key, _ = checked.state(path)
        seen = checked.get(key, pixels=pixels)
        if seen is None:
            with open_image(path) as image:
                seen = ROTATED * is_rotated(image) + UNSTATED_DEPTH * has_unstated_depth(image) + PIXELS * pixels
                if pixels:
                    to_rgb(image, str(path))
            checked.add(key, seen)
    except PixelRangeError:
        return _Finding(_OUT_OF_RANGE, str(path))
    except NOT_AN_IMAGE:
        return _Finding(_DAMAGED, str(path))
    return _Finding("", "", seen)


def copies_remark(splits: Mapping[str, tuple[FileSource, Tensor]]) -> Iterator[str]:
    """Yields a line on byte-equal images in two splits, given as (source, rows); nothing if there are none.

    Only files whose size is in several splits are read, and these once; see `CheckedFiles`.
    """
    caches = {source.folder: CheckedFiles(source.folder) for source, _ in splits.values()}
    files = [
        (split, source.path(row), caches[source.folder])
        for split, (source, rows) in splits.items()
        for row in rows.tolist()
    ]
    states = _in_threads(lambda file: file[2].state(file[1]), files)
    splits_of: dict[int, set[str]] = collections.defaultdict(set)
    for (split, _, cache), (key, size) in zip(files, states, strict=True):
        splits_of[size].add(split)
        cache.get(key, pixels=False)  # stays remembered
    read = [i for i, (_, size) in enumerate(states) if len(splits_of[size]) > 1]
    digests = _in_threads(lambda i: files[i][2].digest(states[i][0], files[i][1]), read)
    for cache in caches.values():
        cache.save()
    same: dict[bytes, dict[str, Path]] = collections.defaultdict(dict)
    for i, digest in zip(read, digests, strict=True):
        same[digest][files[i][0]] = files[i][1]
    copies: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for paths in same.values():
        if len(paths) > 1:
            copies[tuple(paths)].append(" = ".join(map(str, paths.values())))
    for where, pairs in copies.items():
        yield (
            f"warning: {counted(len(pairs), 'image is', 'images are')} byte-equal in {' and '.join(where)}, the first "
            f"{pairs[0]}; results on these are too good"
        )


def class_remarks(labels: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[str]:
    """Yields the classes with their counts in each split, and the classes of which a split has no image."""
    counts = {split: torch.bincount(found, minlength=len(names)).tolist() for split, found in labels.items()}
    if len(names) <= _MOST_LISTED:
        listed = [f"{name} {'/'.join(str(one[i]) for one in counts.values())}" for i, name in enumerate(names)]
        yield f"{len(names)} classes, with images in {'/'.join(counts)}: {', '.join(listed)}"
    else:
        spans = [f"{split} {sum(one)} images, {min(one)} to {max(one)} a class" for split, one in counts.items()]
        yield f"{len(names)} classes, {names[0]} to {names[-1]}: {'; '.join(spans)}"
    for split, one in counts.items():
        lacking = [name for name, count in zip(names, one, strict=True) if not count]
        if lacking:
            yield f"warning: {split} has no image of {some(lacking)}: {len(lacking)} of {len(names)} classes too small"
