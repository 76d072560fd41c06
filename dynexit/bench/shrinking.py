"""How much longer samples take within a batch that shrank, or in a stream, than as batches of their own.

Between the stages of a shrinking batch caches are cold, other sizes of kernels are prepared, and rows are rounded up:
of 8 images that are left of 64 a small network takes a third longer than of batches of 8. A stream joins what is left
of several batches, which takes time too.

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
from dynexit.deploy.stream import stream

_MOST_BATCHES, _MOST_BYTES = 8, 1 << 26  # of images
_LEAST, _MOST = 0.5, 3.0


def with_shrinking(engine: Engine, table: LatencyTable, num_warm_up: int, num_repeats: int) -> LatencyTable:
    """Returns the table with `shrunk` and `streamed` measured for the batch sizes of interest.

    `engine` is one of `timing_engine`.
    """
    for batch in table.batch_sizes:
        if batch > 1:
            table = _measured(engine, table, batch, num_warm_up, num_repeats)
    return table


def _measured(engine: Engine, table: LatencyTable, batch: int, num_warm_up: int, num_repeats: int) -> LatencyTable:
    """Times batches of which a third leaves at every exit, and a stream of them; solves the table's times for both."""
    num_positions = len(table.positions)
    image_bytes = 4 * math.prod(engine.model.backbone.input_size)
    num_batches = min(max(_MOST_BYTES // (batch * image_bytes), 1), _MOST_BATCHES)
    images = random_images(engine, num_batches * batch)
    batches = torch.split(images, batch)
    logits = torch.cat([engine.all_logits(part)[0] for part in torch.split(images, 16)], 2)
    shares_L = [(2 / 3) ** p / 3 for p in range(num_positions)] + [(2 / 3) ** num_positions]
    every = Configuration(((0, 1.0),) * num_positions)
    router = engine.router(thresholds_for(max_probability(logits).cpu().numpy(), every, shares_L))
    exits = np.concatenate([router.classify(part).exit_index_B for part in batches])
    fractions = (np.bincount(exits, minlength=num_positions + 1) / len(exits)).tolist()
    with torch.inference_mode():
        seconds = interleaved_seconds(
            [
                lambda: [engine.model.backbone(part) for part in batches],
                lambda: [router.classify(part) for part in batches],
                lambda: list(stream(router, batches, batch)),
            ],
            images.device,
            num_warm_up,
            num_repeats,
        )
    taken, taken_as_stream = np.median(seconds[:, 1:] / seconds[:, :1], axis=0).tolist()
    heads = [0] * num_positions

    def with_factors(**factors: float) -> LatencyTable:
        times = replace(table.times[batch], **factors)  # type: ignore[arg-type]
        return replace(table, times={**table.times, batch: times})

    plain, whole = (with_factors(shrunk=share).relative(heads, fractions, batch) for share in (0.0, 1.0))
    # where confidences are equal nobody leaves
    shrunk = float(np.clip((taken - plain) / (whole - plain), _LEAST, _MOST)) if whole > plain else 1.0
    expected = with_factors(shrunk=shrunk).relative_as_stream(heads, fractions, batch, len(exits))
    return with_factors(shrunk=shrunk, streamed=float(np.clip(taken_as_stream / expected, _LEAST, _MOST)))
