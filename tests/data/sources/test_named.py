"""torchvision's data sets by name: spellings, missing files, grey channels, defaults for small images."""

import bz2
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from dynexit.data import describe_data, load_data
from dynexit.data.transforms import test_transform as transform_of
from dynexit.errors import UserError
from dynexit.study.data.names import TORCHVISION_SETS, check_files, data_set_name
from dynexit.study.schema import DataSettings
from tests.data.on_disk import random_pixels, write_fashion_mnist


def test_spellings_are_one_name_with_one_id() -> None:
    spellings = {
        "FashionMNIST": "fashion_mnist",
        "CIFAR-10": "cifar10",
        "Oxford_IIIT_Pet": "oxford_iiit_pet",
        "OxfordIIITPet": "oxford_iiit_pet",
        "torch/EuroSAT": "eurosat",
        "torch/FashionMNIST": "torch/fashion_mnist",
        "torch/fashion_mnist": "torch/fashion_mnist",
        "hfds/Some_Set": "hfds/Some_Set",
    }
    assert {name: data_set_name(name) for name in spellings} == spellings
    assert DataSettings(name="STL-10").name == "stl10"


def test_the_table_fits_torchvision() -> None:
    for name, known in TORCHVISION_SETS.items():
        assert hasattr(torchvision.datasets, known.class_name), name
        assert data_set_name(known.class_name) in (name, "emnist")
        assert describe_data(DataSettings(name=name)) == (known.num_classes, known.channels)


@pytest.mark.parametrize("name", ["torch/fashion_mnist", *TORCHVISION_SETS])
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^data.dir is not set; {name} needs it: the folder with \w") as caught:
        check_files(name, None, download=False, is_here=True)
    expected = str(caught.value).partition("the folder with ")[2]
    with pytest.raises(UserError) as caught:
        load_data(DataSettings(name=name, dir=str(tmp_path)))
    assert str(caught.value) == (
        f"{name} was looked for in data.dir = {tmp_path}: {expected} missing; give the folder that holds them, or set "
        "data.download=true if they may be fetched"
    )
    check_files(name, str(tmp_path), download=True, is_here=True)
    check_files(name, "/elsewhere", download=False, is_here=False)


def settings(name: str, root: Path, **keys: object) -> DataSettings:
    keys = {"image_size": 28, "num_validation": 4, "num_test": 5, "normalisation": "none", **keys}
    return DataSettings.model_validate({"name": name, "dir": str(root), **keys})


@pytest.mark.parametrize("channels", [None, 3])
def test_grey_sets_have_one_channel_or_three(channels: int | None, tmp_path: Path) -> None:
    sets = write_fashion_mnist(tmp_path)
    (tmp_path / "FashionMNIST").rename(tmp_path / "KMNIST")
    data = load_data(settings("kmnist", tmp_path, channels=channels))
    assert (len(data.train), len(data.validation), len(data.test)) == (26, 4, 10)
    assert data.in_channels == (channels or 1)
    for name, source in (("train", "train"), ("test", "test")):
        split = data.split(name)
        _, images, labels = split.__getitems__(range(len(split)))
        grey = torch.from_numpy(sets[source][0][split.origin])[:, None].expand(-1, channels or 1, -1, -1)
        assert torch.equal((images * 255).round().byte(), grey)
        assert torch.equal(labels, torch.from_numpy(sets[source][1])[split.origin])


def test_sets_without_splits_are_divided(tmp_path: Path) -> None:
    for label in range(10):
        folder = tmp_path / "eurosat" / "2750" / f"class {label}"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(random_pixels(1, seed=10 * label + i)[0]).save(folder / f"{i}.png")
    data = load_data(settings("eurosat", tmp_path, image_size=32, transform="none"))
    assert (len(data.train), len(data.validation), len(data.test), data.in_channels) == (21, 4, 5, 3)
    assert data.class_names == tuple(f"class {label}" for label in range(10))
    _, images, labels = data.test.__getitems__(range(5))
    for image, label, origin in zip(images, labels.tolist(), data.test.origin.tolist(), strict=True):
        pixels = random_pixels(1, seed=10 * label + origin % 3)[0].transpose(2, 0, 1)
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(pixels))  # all of the image, not 87.5 %


def test_damaged_files_are_reported_with_the_folder(tmp_path: Path) -> None:
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / name).write_bytes(bz2.compress(b"1 1:0.5\n"))
    with pytest.raises(UserError, match=rf"^usps: torchvision cannot read data.dir = {tmp_path} \(ValueError: can"):
        load_data(settings("usps", tmp_path))


def test_small_images_are_not_cropped_for_the_test() -> None:
    image = Image.fromarray(random_pixels(1, seed=0)[0])
    whole = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
    for name in ("food101", "stl10", "gtsrb", "eurosat"):
        for size, crops in ((32, False), (96, name == "food101")):
            steps = str(transform_of(DataSettings(name=name, image_size=size)))
            assert ("CenterCrop" in steps) is crops, (name, size)
        seen = transform_of(DataSettings(name=name, normalisation="none"))(image)
        assert torch.equal((seen * 255).round().byte(), whole)


def test_normalisation_by_numbers() -> None:
    image = Image.fromarray(random_pixels(1, seed=0)[0])
    plain = transform_of(DataSettings(name="cifar10", normalisation="none"))(image)
    numbers = [[0.1, 0.2, 0.3], [0.5, 0.25, 2]]
    found = transform_of(DataSettings(name="cifar10", normalisation=numbers))(image)
    mean, std = (torch.tensor(values)[:, None, None] for values in numbers)
    assert torch.allclose(found, (plain - mean) / std)
    one = transform_of(DataSettings(name="cifar10", normalisation=[[0.1], [0.5]]))(image)
    assert torch.allclose(one, (plain - 0.1) / 0.5)
    grey = transform_of(DataSettings(name="cifar10", normalisation=[[0.1], [0.5]], channels=1))(image)
    assert grey.shape == (1, 32, 32)
    assert torch.allclose(grey, (torch.from_numpy(np.array(image.convert("L"))) / 255 - 0.1) / 0.5)
    with pytest.raises(UserError, match=r"has numbers of 3 channels, and the images have 1; give 1$"):
        describe_data(DataSettings(name="kmnist", normalisation=numbers))
    for wrong in ([[0.5]], [[0.5], [0.0]], [[0.5, 0.5], [0.5, 0.5]], [[0.1], [0.1, 0.2]], []):
        with pytest.raises(ValueError, match=r"should be the means and the standard deviations of 1 or 3 channels"):
            DataSettings(name="cifar10", normalisation=wrong)


def test_a_cached_grey_set_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / "FashionMNIST").rename(tmp_path / "MNIST")
    for transform in ("none", "pad_crop", "timm"):
        loaded = [load_data(settings("mnist", tmp_path, transform=transform, cache=c)) for c in ("memory", "none")]
        images = [data.train.__getitems__(range(26), epoch)[1] for data in loaded for epoch in (0, 1, 1)]
        assert torch.equal(torch.stack(images[:3]), torch.stack(images[3:]))
        assert torch.equal(images[1], images[2])
        assert torch.equal(images[0], images[1]) is (transform == "none")
