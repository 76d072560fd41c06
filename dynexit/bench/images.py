"""Images for timing a model folder, which holds no data set, and thresholds at which as many leave as on validation.

Shapes: N images, P positions, H head types, L exits.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dynexit.core.confidence import CONFIDENCES
from dynexit.core.tradeoff import Configuration
from dynexit.deploy.description import SavedPoint
from dynexit.deploy.engine import Engine


def mixed_images(probe: Tensor, count: int) -> Tensor:
    """Returns `count` images made of those of a probe, mixed in pairs and with noise, so that confidences differ."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(len(probe), (2, count), generator=generator)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    mixed = share * probe[first] + (1 - share) * probe[second]
    noise = torch.randn(mixed.shape, generator=generator) * probe.std()
    return mixed + noise * torch.rand(count, 1, 1, 1, generator=generator)


def with_shares(point: SavedPoint, engine: Engine, images: Tensor) -> Configuration | None:
    """Returns the point's exits with thresholds at which, on these images, the shares of validation leave.

    Where confidences are equal the shares differ a little. None, the gates, stays.
    """
    way = point.configuration
    if way is None or point.confidence == "gate":
        return way
    function = CONFIDENCES[point.confidence].function
    parts = [function(engine.all_logits(part)[0]).cpu() for part in torch.split(images, 64)]
    confidence_PHN = torch.cat(parts, dim=-1).numpy()
    return thresholds_for(confidence_PHN, way, point.exit_fractions)


def thresholds_for(confidence_PHN: np.ndarray, way: Configuration, exit_fractions: Sequence[float]) -> Configuration:
    """Returns `way` with thresholds at which about these shares (L,) leave."""
    num_images = confidence_PHN.shape[-1]
    inside_N, exits = np.arange(num_images), list[tuple[int, float]]()
    left = 0
    for p, (head, threshold) in enumerate(way.exits):
        if head >= 0:
            # whole images by the sum of shares, so that rounding does not add up
            count = round(sum(exit_fractions[: p + 1]) * num_images) - left
            order_n = -np.sort(-confidence_PHN[p, head, inside_N])
            if count >= len(inside_N):
                threshold = -1.0
            elif count <= 0:
                threshold = 1.0
            else:
                threshold = float(order_n[count])
            leaves_n = confidence_PHN[p, head, inside_N] > np.float32(threshold)
            left += int(leaves_n.sum())
            inside_N = inside_N[~leaves_n]
        exits.append((head, threshold))
    return Configuration(tuple(exits))
