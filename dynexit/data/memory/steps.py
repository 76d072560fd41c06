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
    """`still` makes what is kept; `crop_and_flip`, if there is one, draws from torch's generator.

    `values_CV` (C, 256) has what becomes of each intensity of a channel.
    """

    still: Sequence[Callable[[Image.Image], Image.Image]]
    crop_and_flip: tuple[Any, Any] | None
    values_CV: np.ndarray

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The pixels (C, S, S) uint8 that are kept of an image."""
        for step in self.still:
            image = step(image)
        return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)

    def augment(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels after a random crop of the padded image and a random flip, by torch's generator as it is."""
        assert self.crop_and_flip is not None
        crop, flip = self.crop_and_flip
        padding, (height, width) = crop.padding, pixels.shape[1:]
        padded = np.zeros((len(pixels), height + 2 * padding, width + 2 * padding), np.uint8)
        padded[:, padding : padding + height, padding : padding + width] = pixels
        top, left, height, width = crop.get_params(torch.empty(padded.shape, device="meta"), crop.size)
        cropped: np.ndarray = padded[:, top : top + height, left : left + width]
        return cropped[..., ::-1] if torch.rand(1) < flip.p else cropped

    def finish(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """Normalised images (B, C, H, W) float32, image by image: all of a batch do not fit in a processor's cache."""
        images = np.empty((len(pixels), *pixels[0].shape), np.float32)
        for image, planes in zip(images, pixels, strict=True):
            for out, values_V, plane in zip(image, self.values_CV, planes, strict=True):
                np.take(values_V, plane, out=out, mode="clip")  # no index is out of range: clip is the fastest mode
        return torch.from_numpy(images)


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
    intensity_V = torch.arange(256, dtype=torch.uint8).to(torch.float32).div(255)
    values_CV = normalise(intensity_V.expand(len(normalise.mean), 1, 256).contiguous())[:, 0].numpy()
    if not is_random:
        return Steps(before, None, values_CV)
    *still, crop, flip = before if len(before) > 2 else (None, None)
    kinds = (transforms.RandomCrop, transforms.RandomHorizontalFlip)
    if (type(crop), type(flip)) != kinds or not all(
        type(step) in (transforms.Grayscale, transforms.Resize) for step in still
    ):
        return None
    return Steps(still, (crop, flip), values_CV)
