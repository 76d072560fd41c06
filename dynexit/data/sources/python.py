"""Data sets of a Python program: any map-style torch.utils.data.Dataset of (PIL image or tensor, class index)."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dynexit.data.images import Transform, kept_random_state, seed_all
from dynexit.data.pixels import to_rgb
from dynexit.data.splits import DataSets, Split, Workers
from dynexit.data.transforms import test_transform, train_transform
from dynexit.errors import UserError
from dynexit.study.data.names import OWN
from dynexit.study.schema import DataSettings

SPLITS = ("train", "validation", "test")
_offered: dict[str, "OwnData"] = {}


class OwnSplit:
    """One of the three data sets, read once from beginning to end to know its labels and shapes.

    Raises UserError for a sample that is not (image, label), and for a length that changes.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self.dataset = name, dataset
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise UserError(f"{name} is a {type(dataset).__name__} without a length; give a data set with __len__")
        self.num_samples = len(dataset)
        if not self.num_samples:
            raise UserError(f"{name} is empty; give images for each of {', '.join(SPLITS)}")
        labels: list[int] = []
        self.kinds: dict[tuple[str, tuple[int, ...]], int] = {}  # and the first sample of each
        with kept_random_state():
            for i in range(self.num_samples):
                image, label = self.sample(i)
                labels.append(label)
                self.kinds.setdefault(_kind(image), i)
        if len({kind[0] for kind in self.kinds}) > 1:
            raise UserError(f"{name} returns PIL images and tensors; return one kind")
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def sample(self, i: int) -> tuple[Image.Image | Tensor, int]:
        """Returns image and label. Tensors of uint8 become PIL images. Raises UserError for anything else."""
        if len(self.dataset) != self.num_samples:
            raise UserError(
                f"the length of {self.name} changed from {self.num_samples} to {len(self.dataset)}; give a data set of "
                "a constant length"
            )
        where = f"sample {i} of {self.name}"
        try:
            found = self.dataset[i]
        except Exception as error:  # code of somebody else
            raise UserError(f"{where} cannot be read ({type(error).__name__}: {error})") from error
        if not (isinstance(found, tuple | list) and len(found) == 2):
            raise UserError(f"{where} is a {type(found).__name__}; return a pair of image and class index")
        image, label = found
        if isinstance(label, Tensor | np.integer) and np.ndim(label) == 0:
            label = label.item()
        if type(label) is not int:
            raise UserError(f"{where} has the label {label!r}; return a whole number, the index of its class")
        if isinstance(image, Tensor) and image.dtype == torch.uint8:
            from torchvision.transforms.functional import to_pil_image

            image = to_pil_image(image)
        is_map = isinstance(image, Tensor) and image.dim() == 3 and image.is_floating_point()
        if not (is_map or isinstance(image, Image.Image)):
            shape = f" of shape {tuple(image.shape)} and {image.dtype}" if hasattr(image, "shape") else ""
            raise UserError(
                f"{where} is a {type(image).__name__}{shape}; return a PIL image or a float tensor (C, H, W)"
            )
        return image, label


def _kind(image: Image.Image | Tensor) -> tuple[str, tuple[int, ...]]:
    """Whether it is a tensor, and what differs between images that fit the same model."""
    if isinstance(image, Tensor):
        return "tensor", tuple(image.shape)
    return "image", (1 if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;") else 3,)


@dataclasses.dataclass
class OwnData:
    """Three data sets, each read once when it is first needed."""

    name: str
    datasets: tuple[Any, Any, Any]
    found: dict[str, OwnSplit] = dataclasses.field(default_factory=dict)

    def splits(self) -> dict[str, OwnSplit]:
        for name, dataset in zip(SPLITS, self.datasets, strict=True):
            if name not in self.found:
                self.found[name] = OwnSplit(f"{self.name}, split {name}", dataset)
        return self.found

    def describe(self, data: DataSettings) -> tuple[int, int, bool]:
        """Returns classes, channels and whether the images are tensors. Raises UserError if these do not fit `data`."""
        splits = self.splits()
        classes = getattr(self.datasets[0], "classes", None)
        named = len(classes) if isinstance(classes, list | tuple) else 0
        highest = max(int(split.labels.max()) for split in splits.values())
        num_classes = data.num_classes or named or highest + 1
        for split in splits.values():
            low, high = (int(label) for label in split.labels.aminmax())
            if low < 0 or high >= num_classes:
                raise UserError(
                    f"{split.name} has labels from {low} to {high}, and {num_classes} classes need labels from 0 to "
                    f"{num_classes - 1}; correct data.num_classes or the labels"
                )
        if num_classes < 2:
            raise UserError(f"{self.name} has {num_classes} class; a classifier needs two at least")
        kinds: dict[tuple[str, tuple[int, ...]], tuple[OwnSplit, int]] = {}
        for split in splits.values():
            for kind, i in split.kinds.items():
                kinds.setdefault(kind, (split, i))
        if len({kind for kind, _ in kinds}) > 1:
            raise UserError(f"{self.name}: some splits return PIL images and others tensors; return one kind")
        if next(iter(kinds))[0] == "image":
            return num_classes, data.channels or max(channels for _, (channels,) in kinds), False
        size, first = data.image_size, next(iter(kinds))[1]
        for (_, shape), (split, i) in kinds.items():
            if shape[1:] != (size, size) or shape[0] != (data.channels or first[0]):
                raise UserError(
                    f"sample {i} of {split.name} is a tensor of shape {shape}, and data.image_size = {size} needs "
                    f"({data.channels or first[0]}, {size}, {size}); resize in the data set's transform, or return PIL "
                    "images, which are resized"
                )
        return num_classes, first[0], True


class OwnImages:
    """Images of a program's data set. What is random in one follows from (seed, epoch, index)."""

    def __init__(self, split: OwnSplit, transform: Transform | None, seed: int) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def file_names(self) -> None:
        return None

    def share(self) -> None:
        """Nothing is kept in memory."""

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        if not indices:
            return self.load([0], epoch)[:0]
        with kept_random_state():
            return torch.stack([self._one(index, epoch) for index in indices])

    def _one(self, index: int, epoch: int) -> Tensor:
        seed_all(self.seed, epoch, index)
        image, label = self.split.sample(index)
        if label != self.split.labels[index]:
            raise UserError(
                f"the label of sample {index} of {self.split.name} changed from {self.split.labels[index]} to {label}"
            )
        if isinstance(image, Tensor):
            return image.to(torch.float32)
        assert self.transform is not None
        return self.transform(to_rgb(image, f"{index} of {self.split.name}"))


@contextlib.contextmanager
def offering(name: str, datasets: tuple[Any, Any, Any]) -> Iterator[None]:
    """Until the block is left, data.name = own/NAME means these data sets, in this process."""
    full = f"{OWN}{name}"
    before = _offered.get(full)
    if before is None or before.datasets is not datasets:
        _offered[full] = OwnData(full, datasets)
    try:
        yield
    finally:
        _offered.pop(full)


def _own_data(data: DataSettings) -> OwnData:
    if data.name not in _offered:
        raise UserError(
            f"data.name = {data.name}: its images come from a Python program; pass them there to dynexit.load_study as "
            f"data=(train, validation, test), data_name={data.name.removeprefix(OWN)!r}"
        )
    return _offered[data.name]


def describe_own(data: DataSettings) -> tuple[int, int]:
    """Returns (classes, channels). Reads every image once in a process. Raises UserError for what does not fit."""
    return _own_data(data).describe(data)[:2]


def gives_tensors(data: DataSettings) -> bool:
    """Whether images are float tensors, which the backbone gets as they are."""
    return _own_data(data).describe(data)[2]


def load_own(data: DataSettings, workers: Workers) -> DataSets:
    """Returns the splits of a program's data set. Float tensors stay as they are; images are transformed."""
    own = _own_data(data)
    num_classes, channels, is_tensor = own.describe(data)
    data = data.model_copy(update={"channels": channels})
    plain = None if is_tensor else test_transform(data)
    augment = None if is_tensor else train_transform(data)[0]

    def split_of(name: str, transform: Transform | None) -> Split:
        split = own.splits()[name]
        images = OwnImages(split, transform, data.seed)
        return Split(images, split.labels, torch.arange(split.num_samples), workers)

    names = getattr(own.datasets[0], "classes", None) or ()
    return DataSets(
        split_of("train", augment),
        split_of("train", plain),
        split_of("validation", plain),
        split_of("test", plain),
        num_classes=num_classes,
        in_channels=channels,
        image_size=data.image_size,
        class_names=tuple(map(str, names if len(names) == num_classes else range(num_classes))),
    )
