"""Fashion-MNIST: 60,000 + 10,000 grey images of 28x28 pixels in idx files, held in memory, augmented in batches.

Source: Xiao et al. 2017. Random numbers of an augmented image follow from (seed, epoch, index) alone.
"""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynexit.data.memory.intensities import Intensities
from dynexit.data.splits import DataSets, Split, Workers, stratified_order
from dynexit.data.transforms import CROP_PADDING, GREY
from dynexit.errors import UserError
from dynexit.study.data.names import PACKAGE, find_fashion_mnist
from dynexit.study.schema import DataSettings

SIDE = 28
CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def check_fashion_mnist(data: DataSettings) -> None:
    """Raises UserError for keys that the data set does not take, without reading any file."""
    if data.transform == "timm":
        raise UserError("data.transform = 'timm': fashion_mnist takes pad_crop or none")
    for name in ("train_transform", "test_transform", "normalisation", "download"):
        if getattr(data, name):
            raise UserError(f"data.{name} = {getattr(data, name)!r}: fashion_mnist does not take it; remove the key")
    if data.image_size < SIDE:
        raise UserError(
            f"data.image_size = {data.image_size}: images of {SIDE} pixels are padded to it; give at least {SIDE}"
        )


def load_fashion_mnist(data: DataSettings, workers: Workers) -> DataSets:
    """Returns the splits; data.num_validation images, drawn by class, are held out of the 60,000.

    Raises UserError, naming it, where a file is missing or damaged.
    """
    folder = find_fashion_mnist(data.dir)
    pixels, labels = {}, {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels[split] = read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels[split] = torch.from_numpy(read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64))
        if len(pixels[split]) != len(labels[split]) or pixels[split].shape[1:] != (SIDE, SIDE):
            raise UserError(f"{folder}: {len(labels[split])} labels and images {pixels[split].shape} of {split} misfit")
    order = stratified_order(labels["train"], data.seed)
    if data.num_validation >= len(order):
        raise UserError(f"data.num_validation = {data.num_validation} leaves none of {len(order)} images for training")
    rows = {
        "train": order[data.num_validation :].sort().values,
        "validation": order[: data.num_validation].sort().values,
        "test": torch.arange(len(labels["test"])),
    }

    def split_of(name: str, seed: int | None = None) -> Split:
        source = "test" if name == "test" else "train"
        images = GreyImages(pixels[source][rows[name].numpy()], data.image_size, GREY[data.name], seed)
        return Split(images, labels[source][rows[name]], rows[name], workers)

    plain_train = split_of("train")
    return DataSets(
        plain_train if data.transform == "none" else split_of("train", data.seed),
        plain_train,
        split_of("validation"),
        split_of("test"),
        num_classes=10,
        in_channels=1,
        image_size=data.image_size,
        class_names=CLASS_NAMES,
    )


class GreyImages:
    """Images in memory, `pixels` (N, H, W) uint8, padded with 0 to `size`, brought to `mean_and_std` of 0 and 1.

    Where `seed` is given, each is cropped at a random place of the padded image and flipped in half of the cases.
    """

    def __init__(
        self, pixels: np.ndarray, size: int, mean_and_std: tuple[float, float], seed: int | None = None
    ) -> None:
        self.pixels, self.size, self.seed = pixels, size, seed
        mean, std = mean_and_std
        self.values = ((np.arange(256, dtype=np.float32) / 255 - mean) / std).astype(np.float32)
        self.shift = 0 if seed is None else round(size * CROP_PADDING)

    def file_names(self) -> None:
        return None

    def share(self) -> None:
        """The images are in memory."""

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        return torch.from_numpy(self.values[self._chosen(indices, epoch)])[:, None]

    def intensities(self, indices: Sequence[int], epoch: int) -> Intensities:
        pixels_BHW = self._chosen(indices, epoch)
        return Intensities(torch.from_numpy(pixels_BHW)[:, None], torch.from_numpy(self.values)[None])

    def _chosen(self, indices: Sequence[int], epoch: int) -> np.ndarray:
        chosen = np.asarray(indices, dtype=np.int64)
        pixels_BHW = self.pixels[chosen]
        around = [margins(self.size - side, self.shift) for side in pixels_BHW.shape[1:]]
        pixels_BHW = np.pad(pixels_BHW, ((0, 0), *around))
        if self.seed is not None:
            pixels_BHW = self._augment(pixels_BHW, chosen, [self.seed, 2, epoch])
        return pixels_BHW

    def _augment(self, pixels_BHW: np.ndarray, chosen: np.ndarray, seed: list[int]) -> np.ndarray:
        random = np.random.default_rng(seed)
        place_N2 = random.integers(0, 2 * self.shift + 1, (len(self.pixels), 2))
        is_flipped_N = random.random(len(self.pixels)) < 0.5
        side = np.arange(self.size)
        top_B, left_B = place_N2[chosen].T
        row_BH = top_B[:, None] + side
        column_BW = left_B[:, None] + np.where(is_flipped_N[chosen, None], side[::-1], side)
        crops: np.ndarray = pixels_BHW[np.arange(len(chosen))[:, None, None], row_BH[:, :, None], column_BW[:, None, :]]
        return crops


def margins(missing: int, shift: int = 0) -> tuple[int, int]:
    """Returns what is added before and after a side that is `missing` pixels short, and `shift` more at both ends."""
    return missing // 2 + shift, missing - missing // 2 + shift


def read_idx(folder: Path, name: str, num_dimensions: int) -> np.ndarray:
    """Returns the bytes of an idx file, plain or with .gz, in their shape. Raises UserError, naming the file.

    The format: 0, 0, 8 (unsigned bytes), the number of dimensions, each size as 4 bytes from high to low, the data.
    """
    packed = folder / f"{name}.gz"
    path = packed if packed.is_file() else folder / name
    try:
        content = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing (also with .gz); install Debian's package {PACKAGE}, or copy it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cannot be read ({error}); install or copy it again") from None
    header = 4 + 4 * num_dimensions
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4")) if len(content) >= header else ()
    if content[:4] != bytes([0, 0, 8, num_dimensions]) or len(content) != header + math.prod(shape):
        raise UserError(f"{path} is no whole idx file of {num_dimensions} dimensions; install or copy it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
