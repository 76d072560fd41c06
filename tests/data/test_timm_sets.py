"""Data sets that timm opens: torchvision's others, Hugging Face's, and those that only stream."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data.dataset_factory
import torch
from PIL import Image
from timm.data.dataset import ImageDataset, IterableImageDataset

from dynexit.data import describe_data, load_batches, load_data
from dynexit.data.timm_sets import _offline
from dynexit.errors import UserError
from dynexit.study.schema import DataSettings
from tests.data.on_disk import random_pixels, write_fashion_mnist


def timm_data(name: str, root: Path | None, **keys: object) -> DataSettings:
    keys = {"image_size": 28, "num_validation": 4, "num_test": 5, "transform": "none", "normalisation": "none", **keys}
    keys = {"test_transform": {"crop_pct": 1.0}, **keys}
    return DataSettings.model_validate({"name": name, "dir": None if root is None else str(root), **keys})


def test_torchvision_s_others(tmp_path: Path) -> None:
    sets = write_fashion_mnist(tmp_path)
    data = load_data(timm_data("torch/fashion_mnist", tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (26, 4, 10)
    assert (data.num_classes, data.in_channels) == (10, 3)
    for split, source in (("train", "train"), ("validation", "train"), ("test", "test")):
        samples = data.split(split)
        pixels, labels = sets[source]
        _, images, found = next(load_batches(samples, [list(range(len(samples)))]))
        assert torch.equal(found, torch.from_numpy(labels)[samples.origin])
        grey = torch.from_numpy(pixels[samples.origin])[:, None].expand(-1, 3, -1, -1)
        assert torch.equal((images * 255).round().byte(), grey)
    held_out = load_data(timm_data("torch/fashion_mnist", tmp_path, test_split=None))
    assert (len(held_out.train), len(held_out.validation), len(held_out.test)) == (21, 4, 5)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("torch/no_such_set", "Unknown torchvision dataset no_such_set"),
        ("tfds/mnist", "could not be opened ("),
    ],
)
def test_what_timm_cannot_open_is_said_with_the_place(tmp_path: Path, name: str, part: str, capsys: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_data(timm_data(name, tmp_path, num_classes=10))
    text = str(caught.value)
    assert text.startswith(f"{name}, split train, was looked for in data.dir = {tmp_path} and could not be opened (")
    assert part in text
    assert text.endswith("); fix that, or set data.download=true if it may be fetched")
    assert "\n" not in text
    capsys.readouterr()  # timm says what to install


def test_classes_that_nothing_names_must_be_set(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^data.num_classes is not set, and nothing else says how many classes hfds/a/b"
    ):
        describe_data(timm_data("hfds/a/b", None))
    assert describe_data(timm_data("hfds/a/b", None, num_classes=7)) == (7, 3)
    with pytest.raises(UserError, match=r"^data.num_classes = 9: torch/mnist has 10 classes; remove the key$"):
        describe_data(timm_data("torch/mnist", tmp_path, num_classes=9))


PIXELS, LABELS = random_pixels(12, seed=1)[:, :28, :28], [0, 1, 2, 3] * 3


class Reader:
    """Gives images as timm's readers of Hugging Face's sets do (by index) and as those that stream do."""

    num_samples = 12

    def __init__(self, num_given: int = 12, damaged: int = -1) -> None:
        self.num_given, self.damaged = num_given, damaged

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        file = io.BytesIO()
        Image.fromarray(PIXELS[index]).save(file, "PNG")
        return io.BytesIO(file.getvalue()[: 60 if index == self.damaged else None]), LABELS[index]

    def iter_targets(self) -> Iterator[int]:
        return iter(LABELS)

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return ((Image.fromarray(PIXELS[i]), LABELS[i]) for i in range(self.num_given))


def opens(monkeypatch: pytest.MonkeyPatch, dataset: Any) -> None:
    monkeypatch.setattr(timm.data.dataset_factory, "create_dataset", lambda *_, **__: dataset)


@pytest.mark.parametrize("kind", [ImageDataset, IterableImageDataset])
def test_readers_by_index_and_readers_that_stream(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opens(monkeypatch, kind(None, reader=Reader()))
    data = load_data(timm_data("hfds/a/b", None, num_classes=4, test_split=None))
    assert (len(data.train), len(data.validation), len(data.test)) == (3, 4, 5)
    origin = torch.cat([split.origin for split in (data.train, data.validation, data.test)])
    assert sorted(origin.tolist()) == list(range(12))
    for split in (data.train, data.validation, data.test):
        _, images, labels = next(load_batches(split, [list(range(len(split)))]))
        expected = PIXELS[split.origin].transpose(0, 3, 1, 2)
        assert np.array_equal((images * 255).round().byte().numpy(), expected)
        assert labels.tolist() == [LABELS[row] for row in split.origin.tolist()]


def test_no_image_stands_in_for_one_that_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    opens(monkeypatch, ImageDataset(None, reader=Reader(damaged=5)))
    data = load_data(timm_data("hfds/a/b", None, num_classes=4, num_validation=1, num_test=1))
    at = data.train.origin.tolist().index(5) if 5 in data.train.origin else None
    assert at is not None
    with pytest.raises(UserError, match=r"^the image 5 of hfds/a/b, split train does not decode \("):
        next(load_batches(data.train, [[at]]))


def test_streams_that_drop_images_or_would_be_divided_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    opens(monkeypatch, IterableImageDataset(None, reader=Reader(num_given=11)))
    with pytest.raises(UserError, match=r"^wds/x, split train gave 11 images of 12: timm drops what does not decode"):
        load_data(timm_data("wds/x", None, num_classes=4))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"^wds/x, split train streams, and every rank would see another part of it"):
        load_data(timm_data("wds/x", None, num_classes=4))


def test_labels_outside_the_classes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    opens(monkeypatch, ImageDataset(None, reader=Reader()))
    with pytest.raises(UserError) as caught:
        load_data(timm_data("hfds/a/b", None, num_classes=3))
    assert str(caught.value) == (
        "hfds/a/b has labels from 0 to 3, and its 3 classes need labels from 0 to 2; correct data.num_classes or the "
        "labels"
    )


def test_hugging_face_stays_off_the_network_unless_asked() -> None:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    for download in (False, True):
        with _offline(download):
            assert constants.HF_HUB_OFFLINE is (before or not download)
        assert constants.HF_HUB_OFFLINE is before
