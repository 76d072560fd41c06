"""Records on disk: shards of whole batches in safetensors, their writer, and the merged, memory-mapped reader.

Shapes: N samples, n samples of one shard, R rows (every head type at every position, then the backbone), G gates.
"""

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
    Shard,
    read_manifests,
)
from dynexit.record.plan import Plan
from dynexit.record.shard_file import MappedShard, write_shard
from dynexit.run_dir import move_aside, read_json


class ShardWriter:
    """Writes one rank's shards of a plan. A shard counts as complete once a manifest in the plan's folder lists it."""

    def __init__(self, plan: Plan, rank: int = 0) -> None:
        self.shards: list[Shard] = []  # written
        self._plan = plan
        self._path = plan.folder / f"manifest-rank{rank}of{len(plan.shares)}.json"
        self._shard_of = {batch: shard for shard in plan.shares[rank] for batch in range(shard[0], shard[1] + 1)}
        self._buffers: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self._filled: dict[tuple[int, int], set[int]] = {}

    @property
    def missing_batches(self) -> list[int]:
        """The batches of this rank that are in no complete shard, in order."""
        return sorted(self._shard_of)

    def add(self, batch: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes the arrays of one missing batch; writes the shard that it completes.

        They are named and shaped as Layout.arrays; all but `index` and `label` have a leading member axis.
        """
        layout, num_members = self._plan.manifest.layout, self._plan.manifest.num_members
        batches = self._shard_of[batch]
        first, stop = layout.sample_range(*batches)
        if batches not in self._buffers:
            expected = layout.shard_arrays(stop - first, num_members).items()
            self._buffers[batches] = {name: np.empty(shape, dtype) for name, (dtype, shape) in expected}
            self._filled[batches] = set()
        start, end = layout.sample_range(batch)
        for name, target in self._buffers[batches].items():
            target[..., start - first : end - first] = arrays[name]
        self._filled[batches].add(batch)
        if len(self._filled[batches]) == batches[1] - batches[0] + 1:
            self.shards.append(write_shard(self._plan.folder, batches, self._buffers.pop(batches), num_members))
            replace(self._plan.manifest, shards=tuple(self.shards)).write(self._path)
            for batch in self._filled.pop(batches):
                del self._shard_of[batch]


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
        Raises UserError where there is no record, or where its folder was moved away from the shards that its manifest
        names; Failure, naming the shard, where the record is not finished, where a shard is missing, truncated or
        foreign, or where it is not of the checkpoint `checkpoint_sha256`.
        """
        directory = Path(directory)
        manifest = read_manifests(directory)
        if manifest is None:
            raise UserError(f"there is no record in {directory} (no {MANIFEST}); give a directory that `record` wrote")
        if len(manifest.headers) != 1:
            raise UserError(
                f"{directory} holds the shards of {len(manifest.headers)} records; give the folder of one of them, "
                "record/ID/SPLIT of the study"
            )
        (header,) = manifest.headers
        found = header.get("checkpoint_sha256")
        if checkpoint_sha256 is not None and found != checkpoint_sha256:
            raise Failure(
                f"{directory} is the record of another checkpoint ({found}, expected {checkpoint_sha256}); "
                f"{move_aside(directory)}"
            )
        return cls(manifest.layout, header, list(_checked_parts(directory, manifest)), directory)

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


def has_shards(directory: Path) -> bool:
    """Whether `directory` holds a finished record whose folder of shards is there.

    False for a record or a folder of shards that was moved aside. Raises Failure where the manifest is no JSON.
    """
    try:
        content = read_json(directory / MANIFEST)  # not Manifest.read: a plan asks this of thousands of records
    except FileNotFoundError:
        return False
    shards_dir = content.get("shards_dir", ".") if isinstance(content, dict) else "."
    return isinstance(shards_dir, str) and (directory / shards_dir).is_dir()


def _checked_parts(directory: Path, manifest: Manifest) -> Iterator[Part]:
    folder = manifest.shards_folder(directory)
    if not folder.is_dir():
        raise UserError(
            f"{directory} has its shards in {folder}, which does not exist; copy a record together with the folder "
            "`shards` of its study, or run `dynexit record` on the study again"
        )
    gap = manifest.gap()
    if gap:
        finished = (directory / MANIFEST).exists()
        remedy = move_aside(directory) if finished else "recording is not finished: run the same command again"
        raise Failure(f"{directory}: {gap}; {remedy}")
    for shard in sorted(manifest.shards, key=lambda shard: shard.first_batch):
        yield MappedShard(folder, manifest.layout, shard, manifest.num_members, manifest.first_member)
