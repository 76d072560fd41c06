"""The format of a record: the layout of its samples, its shards, and the manifests that list them.

A record is a directory with a `manifest.json`. Records that are made together (the members of a pack) share shards in a
folder of their own; then `shards_dir` of each record's manifest names that folder, relative to the record. The folder
has a manifest too, with all members. While ranks write shards, each keeps `manifest-rank{rank}of{world_size}.json`
there.

In a shard every array but `index` and `label` has a leading member axis. In version 1 each record had shards of its
own, without that axis.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from dynexit.core.confidence import LOGIT_CONFIDENCES
from dynexit.errors import Failure, UserError
from dynexit.run_dir import move_aside, read_json, write_json

FORMAT = "dynexit record"
VERSION = 2
MANIFEST = "manifest.json"
RANK_MANIFESTS = "manifest-*.json"
BACKBONE_ROW = (-1, "backbone")
"""The last row of every record: the backbone's own classifier."""
STATISTICS = (*LOGIT_CONFIDENCES, "label_probability")
"""What is recorded of each row and sample in addition to its predictions; all in [0, 1]."""

MOST_SAMPLES, MOST_EXITS = 2**31 - 1, 10_000
"""Of a record; a manifest with more is damaged."""
SHARED = ("index", "label")
"""The arrays that are the same for all members of a shard."""

ExitRow = tuple[int, str]
"""(position, head type)"""


@dataclass(frozen=True)
class Layout:
    """The shape of a record. It does not depend on the world size or on the shards.

    Batch i holds the samples [i * batch_size, (i + 1) * batch_size), cut off at num_samples.
    Raises ValueError where sizes are not positive or the exits are not every head type at every position in order.
    """

    exits: tuple[ExitRow, ...]  # position-major, positions increasing, without the backbone
    topk: int
    num_gates: int  # 0: the record has no gates
    num_samples: int
    batch_size: int
    statistics: tuple[str, ...] = STATISTICS

    def __post_init__(self) -> None:
        for name in ("topk", "num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        for name, number, most in (
            ("num_samples", self.num_samples, MOST_SAMPLES),
            ("the number of exits", len(self.exits), MOST_EXITS),
        ):
            if number > most:
                raise ValueError(f"{name} is {number}, must be at most {most}")
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

    def shard_arrays(self, num_samples: int, num_members: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Type and shape of every array of a shard of `num_members` records; 0: of version 1, without a member axis."""
        leading = (num_members,) if num_members else ()
        arrays = self.arrays(num_samples)
        return {n: (dtype, shape if n in SHARED else leading + shape) for n, (dtype, shape) in arrays.items()}

    def num_bytes(self, num_samples: int) -> int:
        """Bytes of all arrays of one record of `num_samples` samples."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.arrays(num_samples).values())

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

    Each CRC-32 covers what one member reads: the file's header, `index`, `label` and the member's own arrays in order
    of their names (version 1: the whole file). That is what reading checks. SHA-256 is of the file, so that the digest
    of a manifest stands for the whole record; without SHA instructions it takes nine times as long as CRC-32.
    """

    first_batch: int
    last_batch: int
    num_samples: int
    bytes: int
    crc32: tuple[str, ...]  # one per member that the manifest lists
    sha256: str

    def __post_init__(self) -> None:
        if not 0 <= self.first_batch <= self.last_batch:
            raise ValueError(f"a shard has batches {self.first_batch} to {self.last_batch}")

    @property
    def file(self) -> str:
        return shard_file(self.first_batch, self.last_batch)


def shard_file(first_batch: int, last_batch: int) -> str:
    """The name of the shard of a range of batches, the last included."""
    return f"shard-{first_batch:06d}-{last_batch:06d}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """The records of some members and their shards.

    A header holds free facts, among them `checkpoint_sha256`. `shards_dir` is relative to the manifest's folder. The
    members listed are `first_member`, first_member + 1, ... of the `num_members` in each shard (0: version 1).
    """

    layout: Layout
    headers: tuple[Mapping[str, Any], ...]
    shards: tuple[Shard, ...]
    num_members: int
    first_member: int = 0
    shards_dir: str = "."

    def __post_init__(self) -> None:
        if not 0 <= self.first_member <= max(self.num_members, 1) - len(self.headers):
            raise ValueError(f"{len(self.headers)} members from {self.first_member} are not in {self.num_members}")
        if any(len(shard.crc32) != len(self.headers) for shard in self.shards):
            raise ValueError("a shard needs one crc32 per member")
        if Path(self.shards_dir).is_absolute():
            raise ValueError(f"shards_dir is {self.shards_dir}, must be relative")

    def of_member(self, member: int, shards_dir: str) -> "Manifest":
        """The manifest of one member alone, for a folder from which the shards are in `shards_dir`."""
        shards = tuple(replace(shard, crc32=(shard.crc32[member],)) for shard in self.shards)
        return Manifest(self.layout, (self.headers[member],), shards, self.num_members, member, shards_dir)

    def shards_folder(self, directory: Path) -> Path:
        """Where the shards are if the manifest is in `directory`."""
        path = Path(os.path.normpath(directory / self.shards_dir))
        return path if path.is_dir() else Path(os.path.realpath(directory / self.shards_dir))  # past a symbolic link

    def gap(self) -> str:
        """A sentence on the first batch that is in no shard or in two, or '' if each is in one."""
        batch = 0
        for shard in sorted(self.shards, key=lambda shard: shard.first_batch):
            if shard.first_batch < batch:
                return f"{shard.file} holds batches that other shards hold too"
            if shard.first_batch > batch:
                break
            batch = shard.last_batch + 1
        if batch > self.layout.num_batches:
            return f"there are shards past the last of {self.layout.num_batches} batches"
        return f"batch {batch} is in no shard (a gap)" if batch < self.layout.num_batches else ""

    def write(self, path: Path) -> None:
        """Writes the manifest as JSON, shards in order of their batches."""
        shards = sorted(self.shards, key=lambda shard: shard.first_batch)
        arrays = self.layout.arrays(self.layout.num_samples)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "headers": [dict(header) for header in self.headers],
            "layout": self.layout.to_json(),
            "arrays": {name: {"dtype": str(dtype), "shape": list(shape)} for name, (dtype, shape) in arrays.items()},
            "num_samples": sum(shard.num_samples for shard in shards),
            "num_members": self.num_members,
            "first_member": self.first_member,
            "shards_dir": self.shards_dir,
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
            layout = Layout.from_json(content["layout"])
            if content["version"] == 1:
                shards = tuple(_shard_of({**entry, "crc32": [entry["crc32"]]}) for entry in content["shards"])
                return cls(layout, (dict(content["header"]),), shards, num_members=0)
            return cls(
                layout,
                tuple(map(dict, content["headers"])),
                tuple(map(_shard_of, content["shards"])),
                content["num_members"],
                content["first_member"],
                content["shards_dir"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Failure(f"{path} is damaged (not a record's manifest: {error}); {move_aside(path.parent)}") from error


def _shard_of(entry: Mapping[str, Any]) -> Shard:
    return Shard(**{field.name: entry[field.name] for field in fields(Shard)} | {"crc32": tuple(entry["crc32"])})


def read_manifests(directory: Path) -> Manifest | None:
    """All that the manifests in `directory` list, merged; None where there is no manifest.

    Raises Failure where manifests differ in what they record, or list one shard with different contents.
    """
    merged = directory / MANIFEST
    paths: Sequence[Path] = [merged] if merged.exists() else sorted(directory.glob(RANK_MANIFESTS))
    manifests = {path: Manifest.read(path) for path in paths}
    if not manifests:
        return None
    first = next(iter(manifests.values()))
    shards: dict[str, Shard] = {}
    for path, manifest in manifests.items():
        check_same_record(directory, manifest, first)
        for shard in manifest.shards:
            if shards.setdefault(shard.file, shard) != shard:
                raise Failure(
                    f"{path} lists {shard.file} again with other contents (a duplicate); {move_aside(directory)}"
                )
    return replace(first, shards=tuple(shards.values()))


def check_same_record(directory: Path, found: Manifest, expected: Manifest) -> None:
    """Raises Failure, naming what differs, where two manifests are not about the same records."""
    if found.num_members != expected.num_members or len(found.headers) != len(expected.headers):
        raise Failure(
            f"{directory} holds shards of {found.num_members} records, expected {expected.num_members}; "
            f"{move_aside(directory)}"
        )
    pairs = [("layout", found.layout.to_json(), expected.layout.to_json())]
    pairs += [("header", dict(f), dict(e)) for f, e in zip(found.headers, expected.headers, strict=True)]
    for part, have, want in pairs:
        for key in sorted(have.keys() | want.keys()):
            if have.get(key) != want.get(key):
                raise Failure(
                    f"{directory} holds another record: its {part} has {key} {have.get(key)!r}, expected "
                    f"{want.get(key)!r}; {move_aside(directory)}"
                )
