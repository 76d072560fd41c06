"""Reads the images of a folder once, before anything is trained on it: damage, rotation, copies in several splits."""

import collections
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
from dynexit.errors import UserError

_NUM_THREADS = 16
_CHUNK = 500  # images that a thread takes at once
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
        checked, num_images = CheckedFiles(source.folder), len(source.labels)
        chunks = [range(i, min(i + _CHUNK, num_images)) for i in range(0, num_images, _CHUNK)]
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            inspect = functools.partial(_inspect_rows, source, checked, pixels)
            found = list(itertools.chain.from_iterable(pool.map(inspect, chunks)))
        checked.save()
        rotated += sum(bool(one.seen & ROTATED) for one in found)
        unstated += sum(bool(one.seen & UNSTATED_DEPTH) for one in found)
        for fault in (_DAMAGED, _OUT_OF_RANGE):
            paths = [one.path for one in found if one.fault == fault]
            if paths:
                faults.append(
                    f"{len(paths)} of {len(found)} images in {source.folder} {fault}: {some(paths)}; replace them or "
                    "remove them"
                )
    if faults:
        raise UserError("\n".join(faults))
    remarks = []
    if rotated:
        remarks.append(f"{rotated} images have an EXIF rotation, which is ignored: they are read as they are stored")
    if unstated:
        remarks.append(
            f"{unstated} images hold 32-bit integers: each is scaled by the smallest of 8, 16 and 31 bits that holds "
            "its values"
        )
    return remarks


def _inspect_rows(source: FileSource, checked: CheckedFiles, pixels: bool, rows: Sequence[int]) -> list[_Finding]:
    return [_inspect(source.path(row), checked, pixels) for row in rows]


def _inspect(path: Path, checked: CheckedFiles, pixels: bool) -> _Finding:
    try:
        key = checked.key(path)
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

    Only files whose size is in several splits are read.
    """
    by_size: dict[int, list[tuple[str, FileSource, int]]] = collections.defaultdict(list)
    for split, (source, rows) in splits.items():
        for row in rows.tolist():
            by_size[source.path(row).stat().st_size].append((split, source, row))
    copies: dict[tuple[str, ...], list[str]] = {}
    for files in by_size.values():
        if len({split for split, _, _ in files}) < 2:
            continue
        by_digest: dict[bytes, list[tuple[str, str]]] = collections.defaultdict(list)
        for split, source, row in files:
            path = source.path(row)
            with path.open("rb") as file:
                by_digest[hashlib.file_digest(file, "sha256").digest()].append((split, str(path)))
        for same in by_digest.values():
            where = tuple(split for split in splits if split in {split for split, _ in same})
            if len(where) > 1:
                copies.setdefault(where, []).append(" = ".join(dict(same)[split] for split in where))
    for where, pairs in copies.items():
        yield (
            f"warning: {len(pairs)} images are byte-equal in {' and '.join(where)}, the first {pairs[0]}; results on "
            "these are too good"
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
