"""Folders of features: a row of numbers for each sample of a split, in shards that are written whole and mapped.

A folder's name is the digest of its header, which says what the rows are. Shards hold batches that do not depend on the
number of ranks, and a shard counts once the JSON file next to it has its SHA-256. DONE comes last. Jobs that need the
same folder at the same time take turns: the first one writes, the others read. Shapes: N samples, D numbers of a row.
"""

import contextlib
import dataclasses
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from dynexit.data import Split, load_batches
from dynexit.dist import Ranks
from dynexit.errors import Failure, Interrupted, end_if_stopped, received_signals
from dynexit.progress import Progress
from dynexit.run_dir import DONE, check_file, is_done, load_tensors, move_aside, read_json, save_tensors, write_json
from dynexit.study.grid import digest

HEADER = "features.json"
_BATCH_SIZE = 256  # as that of the plain batches of training
_MIN_SHARD_ROWS, _NUM_SHARDS, _MAX_SHARD_BYTES = 2048, 64, 256 << 20
_LOCK, _POLL_SECONDS = ".lock", 0.5

RowsOf = Callable[[Tensor], Tensor]
"""From images (B, C, H, W) to rows (B, D) float32."""


@dataclasses.dataclass(frozen=True)
class FeatureFolder:
    """The features of one view of a split: `header` has of what, `num_rows`, `width` and, for bf16, `precision`."""

    parent: Path
    header: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """The digest of the header."""
        return digest(self.header)

    @property
    def path(self) -> Path:
        return self.parent / self.identity

    @property
    def num_rows(self) -> int:
        return int(self.header["num_rows"])

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that are stored."""
        return torch.bfloat16 if "precision" in self.header else torch.float32

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * int(self.header["width"])

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return self.row_bytes * self.num_rows

    @property
    def rows_per_shard(self) -> int:
        """Whole batches: a 64th of all, but at least 2,048 rows and at most 256 MiB."""
        most = _MAX_SHARD_BYTES // self.row_bytes
        rows = min(max(_MIN_SHARD_ROWS, -(-self.num_rows // _NUM_SHARDS)), most)
        return max(rows // _BATCH_SIZE, 1) * _BATCH_SIZE

    @property
    def shards(self) -> list[range]:
        """The samples of each shard."""
        step = self.rows_per_shard
        return [range(start, min(start + step, self.num_rows)) for start in range(0, self.num_rows, step)]

    def is_done(self) -> bool:
        """Whether the features are there and their files have the right sizes. Raises Failure where they do not."""
        return is_done(self.path, self.identity)


def rows_of_stored(rows: np.ndarray) -> Tensor:
    """Rows (B, D) float32 of rows as `read` gives them."""
    stored = torch.from_numpy(rows)
    return stored if rows.dtype == np.float32 else stored.view(torch.bfloat16).float()


def shard_name(shard: range) -> str:
    """The file of a shard."""
    return f"shard-{shard.start:08d}-{shard.stop:08d}.safetensors"


def check_room(folders: Sequence[FeatureFolder]) -> None:
    """Raises Failure where the file system has no room for those of `folders` that are missing."""
    with _writing(folders[0].parent):
        folders[0].parent.mkdir(parents=True, exist_ok=True)
    missing = sum(folder.num_bytes for folder in folders if not folder.is_done())
    free = shutil.disk_usage(folders[0].parent).free
    if missing > free:
        raise Failure(
            f"the features need {missing / 1e9:.3g} GB in {folders[0].parent}, and {free / 1e9:.3g} GB are free; free "
            "space, or set train.features=fresh"
        )


def fill(folder: FeatureFolder, split: Split, view: int, rows_of: RowsOf, ranks: Ranks, progress: Progress) -> None:
    """Writes the shards that are missing, all ranks together; images that are augmented are those of epoch `view`.

    Returns when the folder is complete. Raises Failure on a full disk and where the folder has other features.
    """
    if ranks.once(folder.is_done):
        return
    with _held(folder, ranks, progress):
        if ranks.once(folder.is_done):  # written by the job that had it
            return
        written = ranks.once(lambda: _begin(folder))
        missing = ranks.share([shard for shard in folder.shards if shard_name(shard) not in written])
        with ranks.failing_together():
            mine = _write_shards(folder, missing, split, view, rows_of, progress, ranks)
        of_ranks = ranks.gather(mine)
        with ranks.failing_together():
            if ranks.is_main:
                files = {name: entry for part in (written, *of_ranks) for name, entry in part.items()}
                write_json(folder.path / DONE, {"id": folder.identity, "files": dict(sorted(files.items()))})
                for name in files:
                    _entry_path(folder, name).unlink(missing_ok=True)


def read(folder: FeatureFolder, labels: Tensor, ranks: Ranks) -> list[np.ndarray]:
    """The rows (n, D) of each shard, mapped from disk: float32, or the bits of bf16 as int16, which numpy lacks.

    Each rank checks the bytes of its share of the shards.

    Raises Failure where a shard is damaged, lacks a sample, or has other labels than `labels` (N,).
    """
    with ranks.failing_together():
        files = read_json(folder.path / DONE)["files"]
        for shard in ranks.share(folder.shards):
            check_file(folder.path, shard_name(shard), files[shard_name(shard)], check_bytes=True)
        return [_mapped(folder, shard, labels) for shard in folder.shards]


def _begin(folder: FeatureFolder) -> dict[str, dict[str, Any]]:
    """Notes the header and clears what a killed job left; returns the entries for DONE of the shards that it wrote."""
    path = folder.path / HEADER
    try:
        found = read_json(path)
    except FileNotFoundError:
        write_json(path, folder.header)
        found = read_json(path)
    for name in sorted(folder.header):
        if found.get(name) != folder.header[name]:
            raise Failure(
                f"{folder.path} holds other features: {name} is {found.get(name)!r}, expected {folder.header[name]!r}; "
                f"{move_aside(folder.path)}"
            )
    for left in folder.path.glob(".*.tmp"):
        left.unlink()
    written = {}
    for name in map(shard_name, folder.shards):
        with contextlib.suppress(FileNotFoundError):
            written[name] = read_json(_entry_path(folder, name))
            check_file(folder.path, name, written[name], check_bytes=True)
    return written


def _entry_path(folder: FeatureFolder, name: str) -> Path:
    return (folder.path / name).with_suffix(".json")


def _write_shards(
    folder: FeatureFolder,
    shards: Sequence[range],
    split: Split,
    view: int,
    rows_of: RowsOf,
    progress: Progress,
    ranks: Ranks,
) -> dict[str, dict[str, Any]]:
    """Computes and writes these shards; returns their entries for DONE."""
    batches = [shard[i : i + _BATCH_SIZE] for shard in shards for i in range(0, len(shard), _BATCH_SIZE)]
    progress.start(len(batches))
    loaded = iter(progress.awaited(load_batches(split, batches, view, ranks)))
    entries = {}
    for shard in shards:
        rows = torch.empty(len(shard), int(folder.header["width"]), dtype=folder.dtype)
        index, labels = torch.empty(len(shard), dtype=torch.int64), torch.empty(len(shard), dtype=torch.int64)
        for start in range(0, len(shard), _BATCH_SIZE):
            part = slice(start, start + _BATCH_SIZE)
            index[part], images, labels[part] = next(loaded)
            rows[part] = rows_of(images).cpu()
            progress.advance(len(images), {})
            end_if_stopped()
        path = folder.path / shard_name(shard)
        sha256 = save_tensors(path, {"index": index, "label": labels, "row": rows})
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256}
        write_json(_entry_path(folder, path.name), entries[path.name])
    progress.finish()
    return entries


def _mapped(folder: FeatureFolder, shard: range, labels: Tensor) -> np.ndarray:
    path = folder.path / shard_name(shard)
    tensors = load_tensors(path)
    try:
        index, label, rows = (tensors[name] for name in ("index", "label", "row"))
    except KeyError as error:
        raise Failure(f"{path} lacks {error}; {move_aside(folder.path)}") from None
    shape = (len(shard), folder.header["width"])
    if index.tolist() != list(shard) or rows.shape != shape or rows.dtype != folder.dtype:
        raise Failure(f"{path} does not hold each of its samples exactly once; {move_aside(folder.path)}")
    if not torch.equal(label, labels[shard.start : shard.stop]):
        raise Failure(
            f"{path} has other labels than the data set: its images have changed since; {move_aside(folder.path)}"
        )
    mapped: np.ndarray = (rows.view(torch.int16) if folder.dtype == torch.bfloat16 else rows).numpy()
    return mapped


@contextlib.contextmanager
def _held(folder: FeatureFolder, ranks: Ranks, progress: Progress) -> Iterator[None]:
    """Holds the folder for this job, once another that writes it has ended.

    The lock is the main rank's, and the system takes it from a process that is killed. All ranks wait step by step, so
    that a signal ends all of them.
    """
    announced = False
    with contextlib.ExitStack() as stack:
        with ranks.failing_together():
            lock = stack.enter_context(_lock_file(folder.path)) if ranks.is_main else None
        while True:
            got, stop = ranks.any([lock is not None and _locked(lock), bool(received_signals)])
            if stop:
                raise Interrupted(f"stopped by a signal while another job wrote {folder.path}")
            if got:
                break
            if not announced:
                progress.say(f"another job writes these features to {folder.path}; waiting for it")
            announced = True
            time.sleep(_POLL_SECONDS)
        yield


def _lock_file(path: Path) -> IO[str]:
    with _writing(path):
        path.mkdir(exist_ok=True)
        return (path / _LOCK).open("a", encoding="utf-8")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes a Failure, naming `path`, of an error of the file system."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise Failure(
            f"{path} could not be written: {reason}; free space or fix the permissions, then run again"
        ) from error


def _locked(file: IO[str]) -> bool:
    """Whether the lock was got. A file system without locks gives it to all, and they write the same bytes."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
