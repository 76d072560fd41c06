"""A stand-in for a model whose output for a sample depends on that sample only, and a slow look at its logits."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynexit.record.recorder import Recorder

MEMBERS, CLASSES, GATES, TOPK, NUM_SAMPLES, BATCH_SIZE = 2, 11, 5, 3, 103, 8
EXITS = [(position, head_type) for position in (1, 2, 4) for head_type in ("linear", "mlp1x20")]
SETTINGS: dict[str, Any] = {
    "exits": EXITS,
    "topk": TOPK,
    "num_samples": NUM_SAMPLES,
    "batch_size": BATCH_SIZE,
    "num_gates": GATES,
    "samples_per_shard": 17,  # two batches
}


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


def record_rank(directories: Sequence[Path], rank: int = 0, world_size: int = 1, stop_after: int | None = None) -> None:
    """Records this rank's share; with `stop_after` only that many of its missing batches."""
    with Recorder(directories, headers(len(directories)), rank=rank, world_size=world_size, **SETTINGS) as recorder:
        for batch in recorder.missing_batches()[:stop_after]:
            samples = recorder.layout.sample_range(batch)
            recorder.add(batch, *outputs(*samples, range(len(directories))))


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
