"""Records on disk: shards of whole batches in safetensors, their writer, and the merged, memory-mapped reader.

Shapes: N samples, n samples of one shard, R rows (every head type at every position, then the backbone), G gates.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dynexit.errors import Failure, UserError
from dynexit.record.manifest import (
    MANIFEST,
    ExitRow,
    Layout,
    Manifest,
    check_same_record,
    merge_manifests,
    read_manifests,
    shard_file,
)
from dynexit.record.shard_file import MappedShard, check_size, write_shard
from dynexit.run_dir import move_aside


class ShardWriter:
    """One rank's share of one record: rank r writes the shards r, r + world_size, ...

    Shards are the same files whatever the world size, so a record may be continued with another one. A shard counts as
    complete once a manifest in `directory` lists it; the others of this rank are written anew.
    Raises Failure where `directory` holds another record, or lacks a shard that its manifest lists.
    """

    def __init__(self, directory: Path, layout: Layout, header: Mapping[str, Any], rank: int, world_size: int) -> None:
        self.directory = directory
        self.layout = layout
        self._path = directory / f"manifest-rank{rank}of{world_size}.json"
        expected = Manifest(layout, json.loads(json.dumps(header)), ())
        found = read_manifests(directory) or expected
        check_same_record(directory, found, expected)
        complete = {shard.file: shard for shard in found.shards}
        for shard in complete.values():
            check_size(directory, shard)
        own = {shard_file(*batches): batches for batches in layout.shard_batches()[rank::world_size]}
        self._manifest = replace(expected, shards=tuple(complete[file] for file in own if file in complete))
        self._shard_of = {
            batch: batches
            for file, batches in own.items()
            if file not in complete
            for batch in range(batches[0], batches[1] + 1)
        }
        self._buffers: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self._filled: dict[tuple[int, int], set[int]] = {}
        left_by = [self._path.name, *(shard_file(*batches) for batches in set(self._shard_of.values()))]
        left_by += [MANIFEST] if world_size == 1 else []  # another rank may be writing it just now
        for file in left_by:
            for path in directory.glob(f".{file}.*.tmp"):  # what a killed writer left
                path.unlink(missing_ok=True)

    @property
    def missing_batches(self) -> list[int]:
        """The batches of this rank that are in no complete shard, in order."""
        return sorted(self._shard_of)

    def add(self, batch: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes the arrays of one batch, named and shaped as Layout.arrays; writes the shard that it completes.

        A batch that is already in a complete shard is passed over.
        """
        if batch not in self._shard_of:
            return
        batches = self._shard_of[batch]
        first, stop = self.layout.sample_range(*batches)
        if batches not in self._buffers:
            promised = self.layout.arrays(stop - first).items()
            self._buffers[batches] = {name: np.empty(shape, dtype) for name, (dtype, shape) in promised}
            self._filled[batches] = set()
        start, end = self.layout.sample_range(batch)
        for name, target in self._buffers[batches].items():
            target[..., start - first : end - first] = arrays[name]
        self._filled[batches].add(batch)
        if len(self._filled[batches]) == batches[1] - batches[0] + 1:
            self._write(batches)

    def _write(self, batches: tuple[int, int]) -> None:
        shard = write_shard(self.directory, batches, self._buffers.pop(batches))
        self._manifest = replace(self._manifest, shards=(*self._manifest.shards, shard))
        self._manifest.write(self._path)
        for batch in self._filled.pop(batches):
            del self._shard_of[batch]

    def close(self) -> None:
        """Drops what is in no complete shard, and merges the manifests if this rank was the last."""
        self._buffers.clear()
        merge_manifests(self.directory)


class Part(Protocol):
    """A stretch of a record's samples."""

    num_samples: int

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Its arrays, named and shaped as Layout.arrays."""


class Record:
    """What every exit said of every sample, samples in order of their index; the same however many ranks wrote it.

    Nothing is read before it is asked for; what is asked for whole is assembled once and kept. `open` for a directory;
    the constructor takes parts that lie elsewhere.
    """

    def __init__(self, layout: Layout, header: Mapping[str, Any], parts: list[Part], source: Path) -> None:
        self.layout = layout
        self.header = dict(header)
        self.source = source
        self._parts = parts
        self._kept: dict[Any, np.ndarray] = {}

    @classmethod
    def open(cls, directory: Path | str, checkpoint_sha256: str | None = None) -> "Record":
        """The record in `directory`, if each of its samples is there exactly once.

        Sizes, types, shapes and indices are checked here, a shard's checksum when its contents are first read.
        Raises UserError where there is no record; Failure, naming the shard, where the record is not finished, where a
        shard is missing, truncated or foreign, or where it is not of the checkpoint `checkpoint_sha256`.
        """
        directory = Path(directory)
        manifest = read_manifests(directory)
        if manifest is None:
            raise UserError(f"there is no record in {directory} (no {MANIFEST}); give a directory that `record` wrote")
        found = manifest.header.get("checkpoint_sha256")
        if checkpoint_sha256 is not None and found != checkpoint_sha256:
            raise Failure(
                f"{directory} is the record of another checkpoint ({found}, expected {checkpoint_sha256}); "
                f"{move_aside(directory)}"
            )
        return cls(manifest.layout, manifest.header, list(_checked_parts(directory, manifest)), directory)

    @property
    def num_samples(self) -> int:
        return self.layout.num_samples

    @property
    def rows(self) -> tuple[ExitRow, ...]:
        """(position, head type) of every row, position-major; the last is BACKBONE_ROW."""
        return self.layout.rows

    @property
    def positions(self) -> tuple[int, ...]:
        """The blocks after which there are exits, in order."""
        return self.layout.positions

    @property
    def head_types(self) -> tuple[str, ...]:
        return self.layout.head_types

    @property
    def index(self) -> np.ndarray:
        """(N,) int64: 0 .. N-1."""
        return self._whole("index")

    @property
    def label(self) -> np.ndarray:
        """(N,) int32."""
        return self._whole("label")

    @property
    def gate(self) -> np.ndarray | None:
        """(G, N) float32, the gates' outputs in [0, 1]; None where there are no gates."""
        return self._whole("gate") if self.layout.num_gates else None

    @property
    def correct_RN(self) -> np.ndarray:  # noqa: N802
        """(R, N) bool: the first prediction is the label."""
        if "correct" not in self._kept:
            self._kept["correct"] = np.empty((len(self.rows), self.num_samples), bool)
            for samples, arrays in self._spans():
                np.equal(arrays["prediction"][:, 0], arrays["label"], out=self._kept["correct"][:, samples])
        return self._kept["correct"]

    def prediction(self, k: int = 0) -> np.ndarray:
        """(R, N) int32: the class in place k, 0 the most probable; where classes tie, the lower one comes first."""
        return self._whole("prediction", k)

    def probability(self, k: int = 0) -> np.ndarray:
        """(R, N) float32: the softmax probability of `prediction(k)`, in [0, 1]."""
        return self._whole("probability", k)

    def confidence(self, kind: str) -> np.ndarray:
        """(R, N) float32 in [0, 1]: `max_probability`, `margin`, `entropy` (1 - H / ln K) or `label_probability`.

        Raises UserError for any other, or for one that this record lacks (one made from `.npz` may).
        """
        return self._whole(*self._array_of(kind))

    def read_row(self, row: int, kind: str = "max_probability") -> np.ndarray:
        """(N,): one row of a confidence, or of `prediction` or `probability` (first place), read without the others."""
        name, k = (kind, 0) if kind in ("prediction", "probability") else self._array_of(kind)
        pieces = [(arrays[name] if k is None else arrays[name][:, k])[row] for _, arrays in self._spans()]
        return np.concatenate(pieces)

    def parts(self) -> Iterator[Mapping[str, np.ndarray]]:
        """The arrays of Layout.arrays piece by piece, in order of the samples: mapped from disk, not copied."""
        for part in self._parts:
            yield part.arrays()

    def _array_of(self, kind: str) -> tuple[str, int | None]:
        if kind not in self.layout.statistics:
            raise UserError(
                f"{self.source} has no confidence {kind!r}; it has: {', '.join(self.layout.statistics)}; choose one of "
                "these, or record again"
            )
        return ("probability", 0) if kind == "max_probability" else (kind, None)

    def _spans(self) -> Iterator[tuple[slice, Mapping[str, np.ndarray]]]:
        start = 0
        for part in self._parts:
            yield slice(start, start + part.num_samples), part.arrays()
            start += part.num_samples

    def _whole(self, name: str, k: int | None = None) -> np.ndarray:
        key = (name, k)
        if key not in self._kept:
            dtype, shape = self.layout.arrays(self.num_samples)[name]
            whole = np.empty(shape if k is None else (shape[0], shape[2]), dtype)
            for samples, arrays in self._spans():
                whole[..., samples] = arrays[name] if k is None else arrays[name][:, k]
            self._kept[key] = whole
        return self._kept[key]


def _checked_parts(directory: Path, manifest: Manifest) -> Iterator[Part]:
    listed = {shard.file: shard for shard in manifest.shards}
    promised = [shard_file(*batches) for batches in manifest.layout.shard_batches()]
    for file in listed:
        if file not in promised:
            raise Failure(f"{directory / file} holds batches that other shards hold too; {move_aside(directory)}")
    for file in promised:
        if file not in listed:
            finished = (directory / MANIFEST).exists()
            remedy = move_aside(directory) if finished else "recording is not finished: run the same command again"
            raise Failure(f"{directory / file} is missing from the manifest (a gap); {remedy}")
        yield MappedShard(directory, manifest.layout, listed[file])
