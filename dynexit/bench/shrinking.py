"""How much longer few samples take within a batch that shrank than as a batch of their own.

Between the stages of a shrinking batch caches are cold, other sizes of kernels are prepared, and rows are rounded up:
of 8 images that are left of 64 a small network takes a third longer than of batches of 8.

Shapes: L exits.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from dynexit.bench.images import thresholds_for
from dynexit.bench.measure import interleaved_seconds, random_images
from dynexit.core.confidence import max_probability
from dynexit.core.latency import LatencyTable
from dynexit.core.tradeoff import Configuration
from dynexit.deploy.engine import Engine

_MOST_BATCHES, _MOST_BYTES = 8, 1 << 26  # of images
_LEAST, _MOST = 0.5, 3.0


def with_shrinking(engine: Engine, table: LatencyTable, num_warm_up: int, num_repeats: int) -> LatencyTable:
    """Returns the table with `shrunk` measured for the batch sizes of interest. `engine` is one of `timing_engine`."""
    shrunk = {
        batch: _shrunk(engine, table, batch, num_warm_up, num_repeats) for batch in table.batch_sizes if batch > 1
    }
    times = {batch: replace(one, shrunk=shrunk.get(batch, 1.0)) for batch, one in table.times.items()}
    return replace(table, times=times)


def _shrunk(engine: Engine, table: LatencyTable, batch: int, num_warm_up: int, num_repeats: int) -> float:
    """Times batches of which half leave at every exit and solves the table's mean time for `shrunk`."""
    num_positions = len(table.positions)
    image_bytes = 4 * math.prod(engine.model.backbone.input_size)
    num_batches = min(max(_MOST_BYTES // (batch * image_bytes), 1), _MOST_BATCHES)
    images = random_images(engine, num_batches * batch)
    batches = torch.split(images, batch)
    logits = torch.cat([engine.all_logits(part)[0] for part in torch.split(images, 16)], 2)
    shares_L = [0.5 ** (p + 1) for p in range(num_positions)] + [0.5**num_positions]
    every = Configuration(((0, 1.0),) * num_positions)
    router = engine.router(thresholds_for(max_probability(logits).cpu().numpy(), every, shares_L))
    exits = np.concatenate([router.classify(part).exit_index_B for part in batches])
    fractions = (np.bincount(exits, minlength=num_positions + 1) / len(exits)).tolist()
    with torch.inference_mode():
        seconds = interleaved_seconds(
            [
                lambda: [engine.plain(part) for part in batches],
                lambda: [router.classify(part) for part in batches],
            ],
            images.device,
            num_warm_up,
            num_repeats,
        )
    taken = float(np.median(seconds[:, 1] / seconds[:, 0]))
    plain, whole = (
        replace(table, times={**table.times, batch: replace(table.times[batch], shrunk=share)}).relative(
            [0] * num_positions, fractions, batch
        )
        for share in (0.0, 1.0)
    )
    if whole <= plain:  # confidences are equal, and nobody leaves
        return 1.0
    return float(np.clip((taken - plain) / (whole - plain), _LEAST, _MOST))
