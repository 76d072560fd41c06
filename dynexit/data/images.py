"""Images that are read, transformed and, in training, augmented when they are asked for.

What is random in an augmented image follows from (seed, epoch, index) alone.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dynexit.data.memory.intensities import Intensities
from dynexit.data.memory.pixels import LIMIT_BYTES, PixelMemory, fits
from dynexit.data.memory.steps import steps_of
from dynexit.data.pixels import NOT_AN_IMAGE, decode_path, open_image

Transform = Callable[[Image.Image], Tensor]  # to (C, H, W) float32, normalised


class Source(Protocol):
    """Images as the data set holds them."""

    @property
    def labels(self) -> Tensor:
        """(N,) int64"""

    def image(self, row: int) -> Image.Image:
        """The image in RGB. Raises UserError, naming it, where it does not decode."""

    def file_name(self, row: int) -> str | None:
        """The image's file, relative to data.dir; None if it is in no file of its own."""


@dataclasses.dataclass(frozen=True)
class Sources:
    """A data set as it was found: None stands for a split that is held out of `train`.

    `class_names` are in the order of the labels, None where the data set has none. `remarks` are lines for the log.
    """

    train: Source
    test: Source | None
    validation: Source | None = None
    class_names: tuple[str, ...] | None = None
    remarks: tuple[str, ...] = ()


class ArraySource:
    """Images in memory: `pixels` (N, H, W, 3) uint8."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, torch.as_tensor(labels, dtype=torch.int64)

    def image(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])

    def file_name(self, row: int) -> None:
        return None


class FileSource:
    """Images in files: `names` below `folder`, `labels` one each; `root` is data.dir."""

    def __init__(self, root: Path, folder: Path, names: Sequence[str], labels: Sequence[int]) -> None:
        self.root, self.folder, self.labels = root, folder, torch.tensor(labels, dtype=torch.int64)
        # one array: a list of a million strings would be copied into every loading process as its counts change
        self._names = np.array([name.encode(errors="surrogateescape") for name in names], dtype=np.bytes_)

    def path(self, row: int) -> Path:
        name: bytes = self._names[row]
        return self.folder / name.decode(errors="surrogateescape")

    def image(self, row: int) -> Image.Image:
        return decode_path(str(self.path(row)))

    def size(self, row: int) -> tuple[int, int]:
        """Height and width, from the file's header; (0, 0) if it has none that can be read."""
        try:
            with open_image(self.path(row)) as image:
                return image.height, image.width
        except NOT_AN_IMAGE:
            return 0, 0

    def file_name(self, row: int) -> str:
        return str(self.path(row).relative_to(self.root))


class TransformedImages:
    """The images in `rows` of `source` under `transform`; where `seed` is given, it is a random one.

    `cache` is data.cache: what is kept in memory is an image as it was decoded, or, at `image_size`, what the transform
    always makes of it; then the rest is done in batches. The images are the same bit for bit.
    """

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        transform: Transform,
        seed: int | None = None,
        *,
        cache: str = "none",
        image_size: int = 0,
    ) -> None:
        self.source, self.rows, self.transform, self.seed = source, rows.numpy(), transform, seed
        self.cache, self.image_size = cache, image_size
        self.steps = steps_of(transform, is_random=seed is not None)
        self.memory: PixelMemory | None = None
        self._is_decided = cache == "none" or not len(self.rows)

    def share(self) -> None:
        if not self._is_decided:
            self._is_decided = True
            shapes_N3 = self._kept_shapes()
            num_bytes = 0 if shapes_N3 is None else int(shapes_N3.prod(1).sum())
            if shapes_N3 is not None and fits(num_bytes, self.cache, f"{len(self.rows)} images"):
                self.memory = PixelMemory(shapes_N3)

    def _kept_shapes(self) -> np.ndarray | None:
        """(N, 3): the shape of what would be kept of each image; None where that is not known or far too much."""
        channels = 3 if self.steps is None else len(self.steps.values_CV)
        shapes_N3 = np.array([[channels, self.image_size, self.image_size]]).repeat(len(self.rows), 0)
        if self.steps is not None:
            return shapes_N3
        is_likely = self.cache == "memory" or int(shapes_N3.prod(1).sum()) <= LIMIT_BYTES
        if not isinstance(self.source, FileSource) or not is_likely:
            return None
        return np.array([(*self.source.size(row), 3) for row in self.rows.tolist()])

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        self.share()
        if not indices:
            return self.load([0], epoch)[:0]
        with kept_random_state():
            if self.memory is None or self.steps is None:
                return torch.stack([self._one(index, epoch) for index in indices])
            return self.steps.finish([self._pixels(index, epoch) for index in indices])

    def intensities(self, indices: Sequence[int], epoch: int) -> Intensities | None:
        self.share()
        if self.memory is None or self.steps is None or not indices:
            return None
        with kept_random_state():
            pixels_BCHW = np.stack([self._pixels(index, epoch) for index in indices])
        return Intensities(torch.from_numpy(pixels_BCHW), torch.from_numpy(self.steps.values_CV))

    def file_names(self) -> list[str] | None:
        names = [self.source.file_name(row) for row in self.rows.tolist()]
        return None if None in names else names  # type: ignore[return-value]

    def _one(self, index: int, epoch: int) -> Tensor:
        if self.memory is None:
            image = self.source.image(int(self.rows[index]))
        else:
            image = Image.fromarray(self._kept(self.memory, index))
        if self.seed is not None:
            seed_all(self.seed, epoch, index)
        return self.transform(image)

    def _kept(self, memory: PixelMemory, index: int) -> np.ndarray:
        """What is kept of the image, from memory or, the first time, from its file."""
        pixels = memory.get(index)
        if pixels is None:
            image = self.source.image(int(self.rows[index]))
            pixels = np.asarray(image) if self.steps is None else self.steps.pixels(image)
            memory.put(index, pixels)
        return pixels

    def _pixels(self, index: int, epoch: int) -> np.ndarray:
        assert self.memory is not None
        assert self.steps is not None
        pixels = self._kept(self.memory, index)
        if self.seed is None:
            return pixels
        _seed_torch(self.seed, epoch, index)
        return self.steps.augment(pixels)


def seed_all(*entropy: int) -> None:
    """Seeds the three generators that transforms draw from: Python's, numpy's and torch's."""
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(words[:2].tobytes())
    np.random.seed(words[2])  # noqa: NPY002  timm draws from the global generator
    torch.default_generator.manual_seed(int(words[3]))


def _seed_torch(*entropy: int) -> None:
    """Seeds torch's generator as `_seed_all` does."""
    torch.default_generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(4)[3]))


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Puts the state of the three generators back at its end: loading in the training process must not show there."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
