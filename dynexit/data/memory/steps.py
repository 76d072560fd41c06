"""A transform in parts: what makes the same image every time, a random crop and flip, and what follows in batches.

Numbers and bits are those of the transform itself, image by image.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Steps:
    """`still` makes the pixels that are kept; `crop_and_flip`, if there is one, draws from torch's generator."""

    still: Sequence[Callable[[Image.Image], Image.Image]]
    crop_and_flip: tuple[Any, Any] | None
    normalise: Callable[[Tensor], Tensor]

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The pixels (S, S, 3) uint8 that are kept of an image."""
        for step in self.still:
            image = step(image)
        return np.asarray(image)

    def augment(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels after a random crop of the padded image and a random flip, by torch's generator as it is."""
        assert self.crop_and_flip is not None
        crop, flip = self.crop_and_flip
        padding, (height, width) = crop.padding, pixels.shape[:2]
        padded = np.zeros((height + 2 * padding, width + 2 * padding, 3), np.uint8)
        padded[padding : padding + height, padding : padding + width] = pixels
        top, left, height, width = crop.get_params(torch.empty(1, *padded.shape[:2], device="meta"), crop.size)
        cropped: np.ndarray = padded[top : top + height, left : left + width]
        return cropped[:, ::-1] if torch.rand(1) < flip.p else cropped

    def finish(self, pixels_BHW3: np.ndarray) -> Tensor:
        """Normalised images (B, 3, H, W) float32."""
        images = torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2).contiguous()
        return self.normalise(images.to(torch.float32).div_(255))


def steps_of(transform: Callable[[Image.Image], Tensor], *, is_random: bool) -> Steps | None:
    """The parts of a transform, None if it has others: it then starts from the image as it was decoded."""
    from timm.data.transforms import MaybeToTensor
    from torchvision import transforms

    steps = list(getattr(transform, "transforms", ()))
    if not steps or not isinstance(steps[-1], transforms.Normalize):
        return None
    *before, to_tensor, normalise = steps
    if not isinstance(to_tensor, transforms.ToTensor | MaybeToTensor):
        return None
    if not is_random:
        return Steps(before, None, normalise)
    kinds = [transforms.Resize, transforms.RandomCrop, transforms.RandomHorizontalFlip]
    if list(map(type, before)) != kinds:
        return None
    return Steps(before[:1], (before[1], before[2]), normalise)
