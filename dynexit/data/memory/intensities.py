"""Batches of uint8 that a device finishes: a quarter of the bytes to copy, and the host computes no floats."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Intensities(NamedTuple):
    """Images cropped and flipped but not normalised: uint8 (B, C, H, W), and the value (C, 256) of each intensity."""

    intensity_BCHW: Tensor
    value_CV: Tensor

    def images(self, move: Callable[[Tensor], Tensor]) -> Tensor:
        """The images (B, C, H, W) float32 on the device that `move` copies to. They are looked up: no bit differs."""
        intensity_BCHW, value_CV = move(self.intensity_BCHW), move(self.value_CV)
        num_channels, num_values = value_CV.shape
        start_C11 = torch.arange(0, num_channels * num_values, num_values, device=value_CV.device)[:, None, None]
        return value_CV.take(intensity_BCHW + start_C11)


@runtime_checkable
class GivesIntensities(Protocol):
    """Images that may be held as uint8."""

    def intensities(self, indices: Sequence[int], epoch: int) -> Intensities | None:
        """What `load` makes the images of, with the same random draws; None if these are not held so."""
