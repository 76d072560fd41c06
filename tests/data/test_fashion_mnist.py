"""Fashion-MNIST from idx files: what comes out, the augmentation, and what is said of files that are wrong."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dynexit.data import DataSets, describe_data, load_batches, load_data
from dynexit.data.fashion_mnist import CLASS_NAMES, GreyImages
from dynexit.data.splits import Workers
from dynexit.deploy.predict import image_transform
from dynexit.errors import UserError
from dynexit.study.schema import DataSettings
from tests.data.on_disk import write_fashion_mnist

NUM_TRAIN, NUM_TEST = 60, 20


def write_set(root: Path, below: str = ".", *, packed: bool = True) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The idx files, only plain or only with .gz, in the folder `below` the root."""
    sets = write_fashion_mnist(root, NUM_TRAIN, NUM_TEST)
    (root / below).mkdir(parents=True, exist_ok=True)
    for path in (root / "FashionMNIST" / "raw").iterdir():
        if packed != (path.suffix == ".gz"):
            path.unlink()
        else:
            path.rename(root / below / path.name)
    return sets


def settings(root: Path, **keys: object) -> DataSettings:
    keys = {"num_validation": 10, **keys}
    return DataSettings.model_validate({"name": "fashion_mnist", "dir": str(root), **keys})


def padded(pixels: np.ndarray, size: int = 32, shift: int = 0) -> np.ndarray:
    """(N, H, W) in [0, 255] with zeros around it."""
    out = np.zeros((len(pixels), size + 2 * shift, size + 2 * shift), np.uint8)
    start = (size - 28) // 2 + shift
    out[:, start : start + 28, start : start + 28] = pixels
    return out


def as_pixels(images: Tensor) -> np.ndarray:
    return ((images[:, 0] * 0.353 + 0.286) * 255).round().byte().numpy()


def all_of(data: DataSets, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    samples = data.split(split)
    _, images, labels = samples.__getitems__(range(len(samples)))
    return as_pixels(images), labels.numpy(), samples.origin.numpy()


@pytest.mark.parametrize(("below", "packed"), [(".", True), (".", False), ("FashionMNIST/raw", True)])
def test_every_image_comes_out_once_with_its_label(below: str, packed: bool, tmp_path: Path) -> None:
    sets = write_set(tmp_path, below, packed=packed)
    assert describe_data(settings(tmp_path)) == (10, 1)
    data = load_data(settings(tmp_path))
    pixels, labels = sets["train"]
    seen = []
    for split in ("train", "validation"):
        found, found_labels, origin = all_of(data, split)
        assert np.array_equal(found, padded(pixels[origin]))
        assert np.array_equal(found_labels, labels[origin])
        seen += origin.tolist()
    assert sorted(seen) == list(range(NUM_TRAIN))
    assert np.bincount(data.validation.labels).tolist() == [1] * 10  # held out by class
    found, found_labels, _ = all_of(data, "test")
    assert np.array_equal(found, padded(sets["test"][0]))
    assert np.array_equal(found_labels, sets["test"][1])
    assert data.class_names == CLASS_NAMES


@pytest.mark.parametrize("size", [28, 31, 40])
def test_augmented_images_are_crops_of_the_padded_image(size: int) -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (50, 28, 28), dtype=np.uint8)
    images = GreyImages(pixels, size, (0.286, 0.353), seed=5)
    shift = round(size / 8)
    wide = padded(pixels, size, shift)
    found = as_pixels(images.load(range(50), 3))
    places = set()
    for image, whole in zip(found, wide, strict=True):
        fits = [
            (top, left, flip)
            for top in range(2 * shift + 1)
            for left in range(2 * shift + 1)
            for flip in (False, True)
            if np.array_equal(image[:, ::-1] if flip else image, whole[top : top + size, left : left + size])
        ]
        assert len(fits) == 1
        places.add(fits[0])
    assert {flip for *_, flip in places} == {False, True}
    assert len(places) > 25


def test_an_augmented_image_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    write_set(tmp_path)
    whole = load_data(settings(tmp_path)).train.__getitems__(range(50), 2)[1]
    split = load_data(settings(tmp_path), Workers(num_workers=1)).train
    batches = [[9, 3], [49], [], [3]]
    for indices, (_, images, _) in zip(batches, load_batches(split, batches, 2), strict=True):
        assert images.shape == (len(indices), 1, 32, 32)
        assert torch.equal(images, whole[indices])
    others = [split.__getitems__(range(50), 1)[1], load_data(settings(tmp_path, seed=1)).train.__getitems__([3], 2)[1]]
    assert not torch.equal(others[0], whole)
    plain = load_data(settings(tmp_path, transform="none"))
    assert torch.equal(plain.train.__getitems__(range(50))[1], plain.plain_train.__getitems__(range(50))[1])


def test_an_image_file_gets_the_pixels_of_the_test_split(tmp_path: Path) -> None:
    from PIL import Image

    sets = write_set(tmp_path)
    for size in (28, 31, 32):
        data = settings(tmp_path, image_size=size)
        file = Image.fromarray(sets["test"][0][4]).convert("RGB")
        expected = load_data(data).test.__getitems__([4])[1][0]
        torch.testing.assert_close(image_transform(data, 1)(file), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"transform": "timm"}, "data.transform = 'timm': fashion_mnist takes pad_crop or none"),
        ({"download": True}, "data.download = True: fashion_mnist does not take it; remove the key"),
        ({"image_size": 24}, "data.image_size = 24: images of 28 pixels are padded to it; give at least 28"),
        ({"num_classes": 9}, "data.num_classes = 9: fashion_mnist has 10 classes; remove the key"),
        ({"num_validation": 60}, "data.num_validation = 60 leaves none of 60 images for training"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict[str, object], message: str, tmp_path: Path) -> None:
    write_set(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        load_data(settings(tmp_path, **keys))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is missing; install Debian's package dataset-"):
        load_data(settings(tmp_path))
    write_set(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = labels.read_bytes()
    for damaged in (content[:-9], b"x" + content[1:], gzip.compress(gzip.decompress(content)[:-1]), b""):
        labels.write_bytes(damaged)
        with pytest.raises(UserError, match=re.escape(str(labels))):
            load_data(settings(tmp_path))
    labels.unlink()
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte is missing"):
        load_data(settings(tmp_path))
