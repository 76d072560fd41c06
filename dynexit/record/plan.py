"""Who records which batches: shares for ranks, cut into shards; and the end, when all shards are complete.

One rank makes the plan and hands it to the others: ranks that each looked at the folder could see different shards.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from dynexit.errors import Failure
from dynexit.record.manifest import (
    MANIFEST,
    RANK_MANIFESTS,
    Layout,
    Manifest,
    Shard,
    check_same_record,
    read_manifests,
)
from dynexit.record.shard_file import check_size
from dynexit.run_dir import move_aside

Batches = tuple[int, int]
"""First and last batch of a shard."""

_MAX_SHARD_BYTES = 256 << 20  # what a rank keeps in memory
_MIN_SHARD_SAMPLES = 2048
_NUM_SHARDS = 64
_COMPLETE = "manifest-complete.json"  # the shards of earlier runs


@dataclass(frozen=True)
class Plan:
    """What is recorded where, and by whom.

    `directories` has the folder of each member's record; their shards are in `folder`. `manifest` lists the shards that
    were complete before. `shares` has the shards that each rank writes.
    """

    folder: Path
    directories: tuple[Path, ...]
    manifest: Manifest
    shares: tuple[tuple[Batches, ...], ...]


def make_plan(
    directories: Sequence[Path],
    headers: Sequence[Mapping[str, Any]],
    layout: Layout,
    *,
    shards_dir: Path | None = None,
    samples_per_shard: int | None = None,
    world_size: int = 1,
) -> Plan:
    """Returns the plan that completes the records of the members of a pack: one header (JSON) and one folder each.

    A record that is alone may keep its shards in its own folder (`shards_dir` is None). Shards that are complete are
    kept, whatever world size wrote them; what else a killed writer left in the folder is removed. Only one process may
    call this, before any writes.
    Raises Failure where the folder holds other records, or lacks a shard that its manifest lists.
    """
    if len(headers) != len(directories) or (shards_dir is None and len(directories) != 1):
        raise ValueError("every directory needs a header, and several need a folder for their shards")
    folder = directories[0] if shards_dir is None else shards_dir
    expected = Manifest(layout, tuple(json.loads(json.dumps(list(headers)))), (), len(headers))
    found = read_manifests(folder) or expected
    check_same_record(folder, found, expected)
    for shard in found.shards:
        check_size(folder, shard)
    _clear(folder, found)
    most = batches_per_shard(layout, len(headers), samples_per_shard)
    shares = deal(layout.num_batches, [(s.first_batch, s.last_batch) for s in found.shards], world_size, most)
    return Plan(folder, tuple(directories), found, shares)


def _clear(folder: Path, found: Manifest) -> None:
    """Removes what killed writers left, and puts one manifest in the place of several."""
    complete = {shard.file for shard in found.shards}
    for path in [*folder.glob(".shard-*.tmp"), *folder.glob(".manifest*.tmp"), *folder.glob("shard-*.safetensors")]:
        if path.name not in complete:
            path.unlink()
    ranks = [path for path in folder.glob(RANK_MANIFESTS) if path.name != _COMPLETE]
    if ranks and not (folder / MANIFEST).exists():
        found.write(folder / _COMPLETE)
    for path in ranks:
        path.unlink()


def batches_per_shard(layout: Layout, num_members: int, samples_per_shard: int | None = None) -> int:
    """Most batches in a shard: a 64th of all, but at least 2048 samples, and at most 256 MiB or `samples_per_shard`."""
    samples = max(_MIN_SHARD_SAMPLES, -(-layout.num_batches // _NUM_SHARDS) * layout.batch_size)
    samples = min(samples, _MAX_SHARD_BYTES // (num_members * layout.num_bytes(1)))
    return max(min(samples, samples_per_shard or samples) // layout.batch_size, 1)


def deal(
    num_batches: int, complete: Iterable[Batches], world_size: int, most_batches: int
) -> tuple[tuple[Batches, ...], ...]:
    """Returns the shards of each rank: all batches that are in no `complete` shard, each once.

    Shares differ by at most one batch. A shard has at most `most_batches`, which are neighbours.
    """
    done = {batch for first, last in complete for batch in range(first, last + 1)}
    missing = [batch for batch in range(num_batches) if batch not in done]
    bounds = [rank * len(missing) // world_size for rank in range(world_size + 1)]
    return tuple(tuple(_shards(missing[start:stop], most_batches)) for start, stop in pairwise(bounds))


def _shards(batches: Sequence[int], most_batches: int) -> Iterable[Batches]:
    for _, group in groupby(enumerate(batches), lambda item: item[1] - item[0]):
        run = [batch for _, batch in group]
        yield from ((first, min(first + most_batches - 1, run[-1])) for first in run[::most_batches])


def finish(plan: Plan, shards: Sequence[Shard]) -> None:
    """Writes the manifests of the records, given the shards that all ranks wrote. One process calls this.

    Raises Failure where a batch is in no shard.
    """
    manifest = replace(plan.manifest, shards=(*plan.manifest.shards, *shards))
    if gap := manifest.gap():
        raise Failure(f"{plan.folder}: {gap} although recording has ended; {move_aside(plan.folder)}")
    if shards or not (plan.folder / MANIFEST).exists():
        manifest.write(plan.folder / MANIFEST)
    for path in plan.folder.glob(RANK_MANIFESTS):
        path.unlink()
    for member, directory in enumerate(plan.directories):
        for path in directory.glob(f".{MANIFEST}.*.tmp"):  # what a killed writer left
            path.unlink()
        if directory != plan.folder:
            manifest.of_member(member, os.path.relpath(plan.folder, directory)).write(directory / MANIFEST)
