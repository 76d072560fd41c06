"""scikit-learn's digits: 1,797 images of 8x8 pixels, made harder. They come with the library, in no folder."""

import numpy as np
import torch
from torch import Tensor

from dynexit.data.splits import DataSets, Split, Workers, stratified_order
from dynexit.data.transforms import GREY
from dynexit.errors import UserError
from dynexit.study.schema import DataSettings

NUM_DIGITS = 1797
_SMALLEST_DIGIT, _LARGEST_DIGIT, _SMALLEST_CANVAS = 20, 28, 32


def num_train_digits(data: DataSettings) -> int:
    """How many originals are left for training. Raises UserError where they are fewer than those of validation."""
    num_train = NUM_DIGITS - data.num_validation - data.num_test
    if num_train < data.num_validation:
        raise UserError(
            f"data.num_validation = {data.num_validation} and data.num_test = {data.num_test} leave {num_train} of "
            f"{NUM_DIGITS} digits for training; make them smaller"
        )
    return num_train


def load_digits(data: DataSettings, workers: Workers) -> DataSets:
    """The digits in three splits.

    Each is enlarged to a random size at a random place, with random contrast and noise, several fixed times; the splits
    are made by original image, so no digit of the test set was ever trained on in another view.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    originals = torch.from_numpy(digits.images.astype(np.float32) / 16.0)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    num_train = num_train_digits(data)
    order = stratified_order(labels, data.seed)
    ends = (num_train, num_train + data.num_validation, len(labels))
    views = (data.num_train_views, data.num_evaluation_views, data.num_evaluation_views)
    splits: list[Split] = []
    for i, (start, end, num_views) in enumerate(zip((0, *ends[:2]), ends, views, strict=True)):
        origin = order[start:end].repeat(num_views)
        images = _digit_views(originals[origin], data, np.random.default_rng([data.seed, 1 + i]))
        splits.append(Split(images, labels[origin], origin, workers))
    train, validation, test = splits
    return DataSets(
        train,
        train,
        validation,
        test,
        num_classes=10,
        in_channels=1,
        image_size=data.image_size,
        class_names=tuple("0123456789"),
    )


def _digit_views(originals: Tensor, data: DataSettings, random: np.random.Generator) -> Tensor:
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
    mean, std = GREY["digits"]
    return (views - mean) / std
