"""What a record promises: the layout of its samples, its shards, and the manifests that list them.

A record is a directory. While ranks write it, each keeps `manifest-rank{rank}of{world_size}.json`; once every shard is
there these are merged into `manifest.json`, which is the same bytes whatever the world size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from dynexit.core.confidence import LOGIT_CONFIDENCES
from dynexit.errors import Failure, UserError
from dynexit.run_dir import move_aside, read_json, write_json

FORMAT = "dynexit record"
VERSION = 1
MANIFEST = "manifest.json"
BACKBONE_ROW = (-1, "backbone")
"""The last row of every record: the backbone's own classifier."""
STATISTICS = (*LOGIT_CONFIDENCES, "label_probability")
"""What is known of each row and sample besides its predictions; all in [0, 1]."""

ExitRow = tuple[int, str]
"""(position, head type)"""


@dataclass(frozen=True)
class Layout:
    """The shape of a record, and how its samples are dealt out in batches and shards: nothing depends on world size.

    Batch i holds the samples [i * batch_size, (i + 1) * batch_size); shard j the batches
    [j * batches_per_shard, (j + 1) * batches_per_shard); both are cut off at num_samples.
    Raises ValueError where sizes are not positive or the exits are not every head type at every position in order.
    """

    exits: tuple[ExitRow, ...]  # position-major, positions increasing, without the backbone
    topk: int
    num_gates: int  # 0: the record has no gates
    num_samples: int
    batch_size: int
    batches_per_shard: int
    statistics: tuple[str, ...] = STATISTICS

    def __post_init__(self) -> None:
        for name in ("topk", "num_samples", "batch_size", "batches_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if not set(self.statistics[1:]) <= set(STATISTICS[1:]) or self.statistics[:1] != STATISTICS[:1]:
            raise ValueError(f"statistics are {self.statistics}, must be of {STATISTICS}, the first among them")
        if self.num_gates < 0:
            raise ValueError(f"num_gates is {self.num_gates}, must be at least 0")
        grid = tuple((position, head_type) for position in self.positions for head_type in self.head_types)
        if self.exits != grid or list(self.positions) != sorted(self.positions):
            raise ValueError(f"exits {self.exits} are not every head type at every position, positions increasing")

    @property
    def rows(self) -> tuple[ExitRow, ...]:
        """The exits, then the backbone."""
        return (*self.exits, BACKBONE_ROW)

    @property
    def positions(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(position for position, _ in self.exits))

    @property
    def head_types(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(head_type for _, head_type in self.exits))

    @property
    def num_batches(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def shard_batches(self) -> list[tuple[int, int]]:
        """First and last batch of every shard, in order."""
        starts = range(0, self.num_batches, self.batches_per_shard)
        return [(first, min(first + self.batches_per_shard, self.num_batches) - 1) for first in starts]

    def sample_range(self, first_batch: int, last_batch: int | None = None) -> tuple[int, int]:
        """First sample of `first_batch`, and one past the last of `last_batch` (without it: of the same batch)."""
        stop = ((first_batch if last_batch is None else last_batch) + 1) * self.batch_size
        return first_batch * self.batch_size, min(stop, self.num_samples)

    def arrays(self, num_samples: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of every array of a shard; samples are last, so that one row of a shard is contiguous.

        `probability` holds the softmax probabilities of the top-k predictions; its first is the max probability.
        """
        rows = len(self.rows)
        float32, int32 = np.dtype(np.float32), np.dtype(np.int32)
        arrays: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "index": (np.dtype(np.int64), (num_samples,)),
            "label": (int32, (num_samples,)),
            "prediction": (int32, (rows, self.topk, num_samples)),
            "probability": (float32, (rows, self.topk, num_samples)),
        }
        for name in self.statistics[1:]:
            arrays[name] = (float32, (rows, num_samples))
        if self.num_gates:
            arrays["gate"] = (float32, (self.num_gates, num_samples))
        return arrays

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "exits": [list(row) for row in self.exits], "statistics": list(self.statistics)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Layout":
        """The inverse of to_json; raises ValueError, TypeError or KeyError where the content is not of its making."""
        values = {field.name: content[field.name] for field in fields(cls)}
        values["exits"] = tuple((int(position), str(head_type)) for position, head_type in values["exits"])
        values["statistics"] = tuple(values["statistics"])
        return cls(**values)


@dataclass(frozen=True)
class Shard:
    """One complete shard file as its manifest lists it.

    CRC-32 is what reading checks (without SHA instructions a CPU takes nine times as long for SHA-256); SHA-256 makes
    the digest of a manifest stand for the whole record.
    """

    first_batch: int
    last_batch: int
    num_samples: int
    bytes: int
    crc32: str
    sha256: str

    @property
    def file(self) -> str:
        return shard_file(self.first_batch, self.last_batch)


def shard_file(first_batch: int, last_batch: int) -> str:
    """The name of the shard of a range of batches, the last included."""
    return f"shard-{first_batch:06d}-{last_batch:06d}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What was recorded of what. `header` holds free facts, among them `checkpoint_sha256`."""

    layout: Layout
    header: Mapping[str, Any]
    shards: tuple[Shard, ...]

    def write(self, path: Path) -> None:
        """Writes the manifest as JSON, shards in order of their batches."""
        shards = sorted(self.shards, key=lambda shard: shard.first_batch)
        arrays = self.layout.arrays(self.layout.num_samples)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "header": dict(self.header),
            "layout": self.layout.to_json(),
            "arrays": {name: {"dtype": str(dtype), "shape": list(shape)} for name, (dtype, shape) in arrays.items()},
            "num_samples": sum(shard.num_samples for shard in shards),
            "shards": [{"file": shard.file, **asdict(shard)} for shard in shards],
        }
        write_json(path, content)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """The manifest in `path`. Raises Failure where it is damaged, UserError where it is of a later version."""
        content = read_json(path)
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format is {content['format']!r}")
            if content["version"] > VERSION:
                raise UserError(f"{path} has format version {content['version']}, this dynexit reads up to {VERSION}")
            shards = [Shard(**{f.name: entry[f.name] for f in fields(Shard)}) for entry in content["shards"]]
            return cls(Layout.from_json(content["layout"]), dict(content["header"]), tuple(shards))
        except (KeyError, TypeError, ValueError) as error:
            raise Failure(f"{path} is damaged (not a record's manifest: {error}); {move_aside(path.parent)}") from error


def read_manifests(directory: Path) -> Manifest | None:
    """All that the manifests in `directory` list, merged; None where there is no manifest.

    Raises Failure where manifests differ in what they record, or list one shard with different contents.
    """
    manifests = _read_all(directory)
    if not manifests:
        return None
    shards: dict[str, Shard] = {}
    for path, manifest in manifests.items():
        check_same_record(directory, manifest, next(iter(manifests.values())))
        for shard in manifest.shards:
            if shards.setdefault(shard.file, shard) != shard:
                raise Failure(
                    f"{path} lists {shard.file} once more with other contents (a duplicate); {move_aside(directory)}"
                )
    first = next(iter(manifests.values()))
    return Manifest(first.layout, first.header, tuple(shards.values()))


def _read_all(directory: Path) -> dict[Path, Manifest]:
    for _ in range(10):
        merged = directory / MANIFEST
        paths: Sequence[Path] = [merged] if merged.exists() else sorted(directory.glob("manifest-rank*.json"))
        try:
            return {path: Manifest.read(path) for path in paths}
        except FileNotFoundError:  # another rank merged them between our two looks
            continue
    raise Failure(f"the manifests in {directory} come and go while they are read; wait for its writers to end")


def check_same_record(directory: Path, found: Manifest, expected: Manifest) -> None:
    """Raises Failure, naming what differs, where two manifests are not about the same record."""
    for part, have, want in (
        ("header", dict(found.header), dict(expected.header)),
        ("layout", found.layout.to_json(), expected.layout.to_json()),
    ):
        for key in sorted(have.keys() | want.keys()):
            if have.get(key) != want.get(key):
                raise Failure(
                    f"{directory} holds another record: its {part} has {key} {have.get(key)!r}, expected "
                    f"{want.get(key)!r}; {move_aside(directory)}"
                )


def merge_manifests(directory: Path) -> bool:
    """Puts one manifest.json in the place of the ranks' manifests; False, and nothing done, while shards are missing.

    Every rank may call it at any time: whoever sees the last shard merges.
    """
    manifest = read_manifests(directory)
    if manifest is None:
        return False
    listed = {shard.file for shard in manifest.shards}
    if any(shard_file(*batches) not in listed for batches in manifest.layout.shard_batches()):
        return False
    if not (directory / MANIFEST).exists():
        manifest.write(directory / MANIFEST)
    for path in directory.glob("manifest-rank*.json"):
        path.unlink(missing_ok=True)
    return True
