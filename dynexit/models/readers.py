"""Readers: what an exit sees of the state between two blocks, one vector for each sample.

Shapes: B batch, C channels, H x W places of a map, N patch tokens, D features.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from dynexit.core.cost import STEM
from dynexit.errors import UserError
from dynexit.models.backbones import Backbone, ImageSize
from dynexit.models.families import Cut, State

_OF_MAPS = ("average", "average_max_std", "grid2", "grid4")
_OF_TOKENS = ("average", "tokens_average_std")
_WITH_STD = ("average_max_std", "tokens_average_std")


@dataclasses.dataclass(frozen=True)
class Reading:
    """How exits read features: `reader` None is the family's own; `concatenate` adds what all exits before read."""

    reader: str | None = None
    concatenate: bool = False


def read(cut: Cut, reader: str, h: State) -> Tensor:
    """What the reader makes of the state between two blocks, (B, D).

    `average` is what MLP heads read by default; `token` is the class token through the final norm. A standard
    deviation is that of the places of a map or of the normalised patch tokens, divided by their number.
    `tokens_average_std` begins with the class token if the model has one. A grid has at most the places of the map.
    """
    if reader == "token":
        return cut.feature(h)
    average = (cut.pooled or cut.feature)(h)
    if reader == "average":
        return average
    places = cut.places(h)
    if reader == "tokens_average_std":
        token = [cut.feature(h)] if cut.pooled else []
        return torch.cat((*token, average, _deviation(places, 1)), 1)
    if reader == "average_max_std":
        return torch.cat((average, places.amax((2, 3)), _deviation(places, (2, 3))), 1)
    side = int(reader.removeprefix("grid"))
    height, width = places.shape[2:]
    return adaptive_avg_pool2d(places, (min(side, height), min(side, width))).flatten(1)


def _deviation(values: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The standard deviation along `dim`. Tensor.std gives the same to the last bits, in up to 30 times the time."""
    return (values - values.mean(dim, keepdim=True)).square_().mean(dim).sqrt_()


@torch.no_grad()
def measure_reads(
    backbone: Backbone, positions: Sequence[int], reader: str | None, image_size: ImageSize | None = None
) -> tuple[list[int], list[int]]:
    """(Width, MACs) of what is read at each of `positions`, of one image of `image_size` (the backbone's own if None).

    Pooling is free but for a standard deviation: a square for each value that it pools. Raises UserError where the
    reader does not fit the backbone's features.
    """
    if reader is None and STEM not in positions:
        return [backbone.feature_dims[position] for position in positions], [0] * len(positions)
    cut = backbone.shapes_only()
    widths, macs = [], []
    h = cut.stem(backbone.blank(image_size))
    if reader is not None:
        _check_fits(backbone.name, cut, reader, h)
    for position in range(STEM + 1, max(positions) + 1):
        h = cut.blocks[position](h) if position >= 0 else h
        if (position if position >= 0 else STEM) in positions:
            widths.append((cut.feature(h) if reader is None else read(cut, reader, h)).shape[1])
            macs.append(cut.places(h).numel() if reader in _WITH_STD else 0)
    return widths, macs


def _check_fits(name: str, cut: Cut, reader: str, h: State) -> None:
    is_map = cut.places(h).dim() == 4
    fitting = _OF_MAPS if is_map else ("token", *_OF_TOKENS) if cut.pooled else _OF_TOKENS
    if reader not in fitting:
        what = "maps" if is_map else "tokens, with a class token," if cut.pooled else "tokens, without a class token,"
        raise UserError(
            f"exits.reader = {reader}: {name} has {what} between its blocks; use one of {', '.join(fitting)}, or null "
            "for the family's own"
        )
