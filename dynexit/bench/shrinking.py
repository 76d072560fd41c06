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
_FEW_EXITS = 4  # as operating points have; with many only a few samples reach most of the stages


def with_shrinking(engine: Engine, table: LatencyTable, num_warm_up: int, num_repeats: int) -> LatencyTable:
    """Returns the table with `shrunk` and `streamed` measured for the batch sizes of interest.

    `engine` is one of `timing_engine`.
    """
    for batch in table.batch_sizes:
        if batch > 1:
            table = _measured(engine, table, batch, num_warm_up, num_repeats)
    return table


def _measured(engine: Engine, table: LatencyTable, batch: int, num_warm_up: int, num_repeats: int) -> LatencyTable:
    """Times batches of which a third leaves at each of a few exits, and a stream of them; solves the times for both."""
    num_positions = len(table.positions)
    image_bytes = 4 * math.prod(engine.model.backbone.input_size)
    num_batches = min(max(_MOST_BYTES // (batch * image_bytes), 1), _MOST_BATCHES)
    images = random_images(engine, num_batches * batch)
    batches = torch.split(images, batch)
    logits = torch.cat([engine.all_logits(part)[0] for part in torch.split(images, 16)], 2)
    shares_L = np.zeros(num_positions + 1)
    num_exits = num_positions if engine.is_additive else _FEW_EXITS  # additive heads need all before them
    enabled = np.unique(np.linspace(0, num_positions - 1, num_exits).astype(int))
    shares_L[enabled] = [(2 / 3) ** i / 3 for i in range(len(enabled))]
    shares_L[-1] = 1 - shares_L.sum()
    heads = [0 if p in enabled else -1 for p in range(num_positions)]
    configuration = Configuration(tuple((head, 1.0) for head in heads))
    router = engine.router(thresholds_for(max_probability(logits).cpu().numpy(), configuration, shares_L.tolist()))
    exits = np.concatenate([router.classify(part).exit_index_B for part in batches])
    fractions = (np.bincount(exits, minlength=num_positions + 1) / len(exits)).tolist()
    with torch.inference_mode():
        seconds = interleaved_seconds(
            [
                lambda: [engine.plain(part) for part in batches],
                lambda: [router.classify(part) for part in batches],
                lambda: list(stream(router, batches, batch)),
            ],
            images.device,
            num_warm_up,
            num_repeats,
        )
    taken, taken_as_stream = np.median(seconds[:, 1:] / seconds[:, :1], axis=0).tolist()

    def with_factors(**factors: float) -> LatencyTable:
        times = replace(table.times[batch], **factors)  # type: ignore[arg-type]
        return replace(table, times={**table.times, batch: times})

    plain, whole = (with_factors(shrunk=share).relative(heads, fractions, batch) for share in (0.0, 1.0))
    # where confidences are equal nobody leaves
    shrunk = float(np.clip((taken - plain) / (whole - plain), _LEAST, _MOST)) if whole > plain else 1.0
    expected = with_factors(shrunk=shrunk).relative_as_stream(heads, fractions, batch, len(exits))
    return with_factors(shrunk=shrunk, streamed=float(np.clip(taken_as_stream / expected, _LEAST, _MOST)))
