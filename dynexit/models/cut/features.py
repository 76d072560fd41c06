"""What exits read of the states of somebody else's module: inferred from the shapes, or set by name.

Shapes: B batch, C channels, H x W places, N tokens, D features.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from dynexit.models.families import Cut, State

FEATURES = ("channels_first", "channels_last", "tokens", "class_token")


@dataclasses.dataclass(frozen=True)
class Features:
    """How states are read: where the channels of (B, _, _, _) are, and whether (B, N, D) begins with a class token."""

    channels_last: bool = False
    class_token: bool = False

    def cut(
        self,
        stem: Callable[[Any], State],
        blocks: Sequence[Callable[[State], State]],
        tail: Callable[[State], Tensor],
    ) -> Cut:
        """Returns the cut with these parts.

        Exits read the mean over a map or over tokens, or the class token; a vector as it is. Tokens are normalised to
        mean 0 and variance 1 first, as the last norm of a transformer does.
        """
        return Cut(
            stem=stem,
            blocks=blocks,
            tail=tail,
            feature=partial(_token if self.class_token else _mean, self),
            places=partial(_places, self),
            pooled=partial(_mean, self) if self.class_token else None,
        )


def _tensor(h: State) -> Tensor:
    tensor: Tensor = h[0] if isinstance(h, tuple) else h
    return tensor


def _normed(tokens: Tensor) -> Tensor:
    return layer_norm(tokens, tokens.shape[-1:])


def _token(features: Features, h: State) -> Tensor:
    tensor = _tensor(h)
    return _normed(tensor[:, 0]) if tensor.dim() == 3 else _mean(features, h)


def _mean(features: Features, h: State) -> Tensor:
    places = _places(features, h)
    return places.mean(1) if places.dim() == 3 else places.mean((2, 3))


def _places(features: Features, h: State) -> Tensor:
    """The state as a map (B, C, H, W), or its normalised tokens (B, N, D) but the class token."""
    tensor = _tensor(h)
    if tensor.dim() == 3:
        return _normed(tensor[:, 1:] if features.class_token else tensor)
    if tensor.dim() == 2:
        return tensor[:, :, None, None]
    return tensor.permute(0, 3, 1, 2) if features.channels_last else tensor


def infer_features(
    states: Sequence[State], tail: Callable[[State], Tensor], size: tuple[int, int], name: str | None
) -> Features:
    """Returns how the states after the stem and the blocks are read; `name` is one of FEATURES, or None.

    Maps have their channels last if more states have the images' proportions (`size` is height and width) on the first
    two axes than on the last two. There is a class token if the tail's answer depends on the first token alone.
    """
    if name is not None:
        return Features(name == "channels_last", name == "class_token")
    maps = [tensor.shape[1:] for tensor in map(_tensor, states) if tensor.dim() == 4]
    first = sum(_alike(b, c, size) and not _alike(a, b, size) for a, b, c in maps)
    last = sum(_alike(a, b, size) and not _alike(b, c, size) for a, b, c in maps)
    return Features(last > first, _reads_first_token(states[-1], tail))


def _alike(height: int, width: int, size: tuple[int, int]) -> bool:
    return abs(height * size[1] - width * size[0]) <= 0.1 * width * size[0]


@torch.no_grad()
def _reads_first_token(h: State, tail: Callable[[State], Tensor]) -> bool:
    tokens = _tensor(h)
    if tokens.dim() != 3 or tokens.shape[1] < 2:
        return False
    others = torch.cat((tokens[:, :1], tokens[:, 1:].roll(1, 0) + 1), 1)
    changed = (others, *h[1:]) if isinstance(h, tuple) else others
    return torch.equal(tail(changed), tail(h))
