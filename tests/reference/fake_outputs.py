"""A stand-in for a model whose output for a sample depends on that sample only, and a slow look at its logits."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynexit.record.manifest import Layout, Shard
from dynexit.record.plan import Plan, finish, make_plan
from dynexit.record.recorder import Recorder
from dynexit.record.shards import Record

MEMBERS, CLASSES, GATES, TOPK, NUM_SAMPLES, BATCH_SIZE = 2, 11, 5, 3, 103, 8
EXITS = [(position, head_type) for position in (1, 2, 4) for head_type in ("linear", "mlp1x20")]
LAYOUT = Layout(tuple(EXITS), TOPK, GATES, NUM_SAMPLES, BATCH_SIZE)
SAMPLES_PER_SHARD = 17  # two batches


def outputs(first: int, stop: int, members: Sequence[int] = range(MEMBERS)) -> tuple[torch.Tensor, ...]:
    """index (B,), label (B,), logits (M, R, B, K) and gates (M, G, B) of the samples first .. stop-1."""
    label, logits, gates = [], [], []
    for sample in range(first, stop):
        generator = np.random.default_rng(sample)
        label.append(int(generator.integers(CLASSES)))
        logits.append(3 * generator.standard_normal((MEMBERS, len(EXITS) + 1, CLASSES), np.float32))
        gates.append(generator.random((MEMBERS, GATES), np.float32))
    return (
        torch.arange(first, stop),
        torch.tensor(label),
        torch.from_numpy(np.stack(logits, 2)[list(members)]),
        torch.from_numpy(np.stack(gates, 2)[list(members)]),
    )


def headers(num_members: int = MEMBERS) -> list[dict[str, Any]]:
    return [{"checkpoint_sha256": f"{member:064d}", "split": "validation"} for member in range(num_members)]


def plan(directories: Sequence[Path], world_size: int = 1) -> Plan:
    """The plan for records in these folders; several have their shards in `shards` next to them."""
    shards_dir = directories[0].parent / "shards" if len(directories) > 1 else None
    return make_plan(
        directories,
        headers(len(directories)),
        LAYOUT,
        shards_dir=shards_dir,
        samples_per_shard=SAMPLES_PER_SHARD,
        world_size=world_size,
    )


def record_rank(planned: Plan, rank: int = 0, stop_after: int | None = None) -> list[Shard]:
    """Records this rank's share; with `stop_after` only that many of its missing batches. Returns the shards."""
    with Recorder(planned, rank) as recorder:
        for batch in recorder.missing_batches()[:stop_after]:
            samples = recorder.layout.sample_range(batch)
            recorder.add(batch, *outputs(*samples, range(len(planned.directories))))
    return recorder.shards


def record_all(directories: Sequence[Path], world_size: int = 1) -> None:
    """Records all that is missing, rank after rank."""
    planned = plan(directories, world_size)
    finish(planned, [shard for rank in range(world_size) for shard in record_rank(planned, rank)])


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of every array of a record, and its header and layout."""
    record = Record.open(directory)
    parts = list(record.parts())
    arrays = {name: np.concatenate([part[name] for part in parts], -1).tobytes() for name in parts[0]}
    return {**arrays, "header": repr(record.header).encode(), "layout": repr(record.layout).encode()}


def files(directory: Path) -> dict[str, bytes]:
    """Every file under `directory`, by its name."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def slow_statistics(logits_K: Sequence[float], label: int) -> dict[str, Any]:
    """The statistics of one sample at one exit, from the definitions, in double precision."""
    top = max(logits_K)
    weights = [math.exp(value - top) for value in logits_K]
    p = [weight / sum(weights) for weight in weights]
    order = sorted(range(len(p)), key=lambda c: (-logits_K[c], c))
    return {
        "prediction": order,
        "probability": [p[c] for c in order],
        "margin": p[order[0]] - p[order[1]],
        "entropy": 1 + sum(value * math.log(value) for value in p if value > 0) / math.log(len(p)),
        "label_probability": p[label],
    }
