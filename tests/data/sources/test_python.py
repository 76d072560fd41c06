"""Data sets that a program passes: what they may return, and what is refused."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms

from dynexit.data import DataSets, Workers, load_batches, load_data
from dynexit.data.sources.python import offering
from dynexit.errors import UserError
from dynexit.study.schema import DataSettings
from tests.data.on_disk import random_pixels

PIXELS = random_pixels(12, seed=0)
PIXELS.flags.writeable = False


class Pets(Dataset[Any]):
    """12 images of 3 classes; `make` returns what is seen of the pixels."""

    classes = ("cat", "dog", "emu")

    def __init__(self, make: Callable[[np.ndarray], Any] = Image.fromarray, labels: Any = None, num: int = 12) -> None:
        self.make, self.labels, self.num = make, labels or [0, 1, 2] * 4, num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> Any:
        return self.make(PIXELS[i].copy()), self.labels[i]


def loaded(*datasets: Any, workers: Workers | None = None, **keys: object) -> DataSets:
    keys = {"image_size": 32, "transform": "none", "normalisation": "none", **keys}
    data = DataSettings.model_validate({"name": "own/pets-v1", **keys})
    with offering("pets-v1", datasets if len(datasets) == 3 else (datasets[0], Pets(), Pets())):
        return load_data(data, workers)


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


EXPECTED = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()) / 255


@pytest.mark.parametrize("make", [Image.fromarray, as_tensor, lambda pixels: as_tensor(pixels) / 255])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_and_labels_are_the_programs(make: Any, num_workers: int) -> None:
    data = loaded(*[Pets(make)] * 3, workers=Workers(num_workers))
    assert (data.num_classes, data.in_channels, data.class_names) == (3, 3, ("cat", "dog", "emu"))
    for name in ("train", "validation", "test"):
        for index, images, labels in load_batches(data.split(name), [[3, 1], [], [11]]):
            assert torch.allclose(images, EXPECTED[index])
            assert torch.equal(labels, index % 3)


def test_grey_images_stay_grey_and_others_become_colour() -> None:
    grey = Pets(lambda pixels: Image.fromarray(pixels[..., 0]))
    assert [loaded(grey, grey, grey, channels=c).in_channels for c in (None, 3, 1)] == [1, 3, 1]
    _, images, _ = loaded(grey, grey, grey).test.__getitems__([5])
    assert torch.allclose(images, EXPECTED[5:6, :1])
    assert loaded(grey).in_channels == 3  # the other splits are coloured


def test_random_transforms_depend_on_seed_epoch_and_index() -> None:
    make = transforms.Compose([Image.fromarray, transforms.RandomCrop(32, 4), transforms.ToTensor()])
    first, again = (loaded(*[Pets(make)] * 3).train for _ in range(2))
    _, batch, _ = first.__getitems__([4, 7], epoch=3)
    torch.rand(5)
    assert torch.equal(batch[1], again.__getitems__([7], epoch=3)[1][0])
    assert not torch.equal(batch[1], again.__getitems__([7], epoch=4)[1][0])


def test_torchs_own_data_sets_are_taken() -> None:
    tensors = TensorDataset(EXPECTED, torch.arange(12) % 3)
    data = loaded(Subset(tensors, range(6)), Subset(tensors, range(6, 9)), Subset(tensors, range(9, 12)))
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [6, 3, 3]
    assert data.class_names == ("0", "1", "2")
    assert torch.equal(data.test.__getitems__([0, 2])[1], EXPECTED[[9, 11]])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    ("train", "text"),
    [
        (Stream(), "own/pets-v1, split train is a Stream without a length; give a data set with __len__"),
        (Pets(num=0), "own/pets-v1, split train is empty; give images for each of train, validation, test"),
        (Pets(num=13), "sample 12 of own/pets-v1, split train cannot be read (IndexError: index 12 is out of bounds"),
        (
            Pets(lambda pixels: pixels),
            "sample 0 of own/pets-v1, split train is a ndarray of shape (32, 32, 3) and uint8;",
        ),
        (Pets(labels=["cat"] * 12), "sample 0 of own/pets-v1, split train has the label 'cat'; return a whole number"),
        (
            Pets(labels=[0, 1, 3] * 4),
            "own/pets-v1, split train has labels from 0 to 3, and 3 classes need labels from 0",
        ),
        (Pets(labels=[0, -1, 2] * 4), "own/pets-v1, split train has labels from -1 to 2, and 3 classes need labels"),
        (
            Pets(lambda pixels: as_tensor(pixels) / 255),
            "own/pets-v1: some splits return PIL images and others tensors",
        ),
        ([(EXPECTED[0],)], "sample 0 of own/pets-v1, split train is a tuple; return a pair of image and class index"),
    ],
)
def test_other_data_sets_are_refused(train: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        loaded(train)
    assert str(caught.value).startswith(text)


def test_tensors_of_other_sizes_are_refused() -> None:
    unequal = [(EXPECTED[0], 0), (EXPECTED[1], 1), (EXPECTED[2][:, :20], 1)]
    with pytest.raises(UserError) as caught:
        loaded(unequal, unequal, unequal)
    assert str(caught.value) == (
        "sample 2 of own/pets-v1, split train is a tensor of shape (3, 20, 32), and data.image_size = 32 needs (3, 32, "
        "32); resize in the data set's transform, or return PIL images, which are resized"
    )
    with pytest.raises(UserError, match=r"^sample 0 of .* of shape \(3, 32, 32\), and data.image_size = 24 needs \(3,"):
        loaded(unequal[:2], unequal[:2], unequal[:2], image_size=24)


def test_changes_of_length_and_label_are_refused() -> None:
    train = Pets(labels=[0, 1, 2] * 4)
    data = loaded(train)
    train.labels[4] = 0
    with pytest.raises(UserError, match=r"^the label of sample 4 of own/pets-v1, split train changed from 1 to 0$"):
        data.train.__getitems__([4])
    train.num = 11
    with pytest.raises(UserError) as caught:
        data.train.__getitems__([0])
    assert str(caught.value) == (
        "the length of own/pets-v1, split train changed from 12 to 11; give a data set of a constant length"
    )


def test_without_the_program_its_images_are_missing() -> None:
    data = DataSettings(name="own/pets-v1")
    with pytest.raises(UserError) as caught:
        load_data(copy.copy(data))
    assert str(caught.value) == (
        "data.name = own/pets-v1: its images come from a Python program; pass them there to dynexit.load_study as "
        "data=(train, validation, test), data_name='pets-v1'"
    )
