"""Data sets as three splits; every sample carries its index.

A split holds `images` and `labels` of its own and is asked for batches by index, so that batch i is the same whatever
the number of ranks or of loading processes, and a run can start again in the middle of an epoch.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dynexit.config import Data
from dynexit.errors import UserError

Batch = tuple[Tensor, Tensor, Tensor]  # index (B,) int64, images (B, C, H, W) float32, labels (B,) int64


class Split(Dataset[Batch]):
    """Samples in memory: `images` (N, C, H, W) float32, `labels` (N,) int64, `origin` (N,) their original images."""

    def __init__(self, images: Tensor, labels: Tensor, origin: Tensor) -> None:
        self.images, self.labels, self.origin = images, labels, origin

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices, dtype=torch.int64)
        return index, self.images[index], self.labels[index]


@dataclasses.dataclass(frozen=True)
class DataSets:
    """Train, validation and test split of a data set, and what a model must know of it."""

    train: Split
    validation: Split
    test: Split
    num_classes: int
    in_channels: int
    image_size: int

    def split(self, name: str) -> Split:
        """The split called `train`, `validation` or `test`."""
        split: Split = getattr(self, name)
        return split


def describe_data(data: Data) -> tuple[int, int]:
    """(classes, channels) of the data set, without reading it."""
    return {"digits": (10, 1)}[data.name]


def load_data(data: Data) -> DataSets:
    """The splits of the data set that the section `data` names."""
    return {"digits": _digits}[data.name](data)


def epoch_batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches as lists of indices: a permutation that depends on (seed, epoch) alone; the last is short."""
    order = np.random.default_rng([seed, epoch]).permutation(num_samples).tolist()
    return [order[i : i + batch_size] for i in range(0, num_samples, batch_size)]


def load_batches(split: Split, batches: Sequence[Sequence[int]], num_workers: int = 0) -> Iterator[Batch]:
    """Yields (index, images, labels) of each of `batches`, in order."""
    return iter(DataLoader(split, batch_sampler=batches, collate_fn=_as_is, num_workers=num_workers))  # type: ignore[arg-type]


def _as_is(batch: Batch) -> Batch:
    return batch


_DIGITS_MEAN, _DIGITS_STD = 0.13, 0.27  # of the views at the default settings
_SMALLEST_DIGIT, _LARGEST_DIGIT, _SMALLEST_CANVAS = 20, 28, 32


def _digits(data: Data) -> DataSets:
    """scikit-learn's 1,797 digits of 8x8 pixels, made harder.

    Each is enlarged to a random size at a random place, with random contrast and noise, several fixed times; the splits
    are made by original image, so no digit of the test set was ever trained on in another view.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    originals = torch.from_numpy(digits.images.astype(np.float32) / 16.0)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    num_train = len(labels) - data.num_validation - data.num_test
    if num_train < data.num_validation:
        raise UserError(
            f"data.num_validation = {data.num_validation} and data.num_test = {data.num_test} leave {num_train} of "
            f"{len(labels)} digits for training; make them smaller"
        )
    order = torch.from_numpy(np.random.default_rng([data.seed, 0]).permutation(len(labels)))
    ends = (num_train, num_train + data.num_validation, len(labels))
    views = (data.num_train_views, data.num_evaluation_views, data.num_evaluation_views)
    splits: list[Split] = []
    for i, (start, end, num_views) in enumerate(zip((0, *ends[:2]), ends, views, strict=True)):
        origin = order[start:end].repeat(num_views)
        images = _digit_views(originals[origin], data, np.random.default_rng([data.seed, 1 + i]))
        splits.append(Split(images, labels[origin], origin))
    train, validation, test = splits
    return DataSets(train, validation, test, num_classes=10, in_channels=1, image_size=data.image_size)


def _digit_views(originals: Tensor, data: Data, random: np.random.Generator) -> Tensor:
    """One random view of each of `originals` (N, 8, 8) as (N, 1, image_size, image_size), normalised."""
    size = data.image_size
    scale = size / _SMALLEST_CANVAS
    sides = np.round(random.integers(_SMALLEST_DIGIT, _LARGEST_DIGIT + 1, len(originals)) * scale).astype(int)
    rows, columns = (random.integers(0, size - sides + 1) for _ in range(2))
    contrast = random.uniform(0.7, 1.0, len(originals)).astype(np.float32)
    noise = random.standard_normal((len(originals), 1, size, size), dtype=np.float32)
    views = torch.zeros(len(originals), 1, size, size)
    for side in np.unique(sides).tolist():
        chosen = np.flatnonzero(sides == side)
        enlarged = torch.nn.functional.interpolate(originals[chosen][:, None], size=(side, side), mode="bilinear")
        for image, i in zip(enlarged, chosen.tolist(), strict=True):
            views[i, :, rows[i] : rows[i] + side, columns[i] : columns[i] + side] = image * float(contrast[i])
    views += data.noise * torch.from_numpy(noise)
    return (views - _DIGITS_MEAN) / _DIGITS_STD
