"""Decoded images in memory: the same images bit for bit, decoded once, and no more than the limit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from dynexit.data import DataSets, Split, Workers, images, load_batches, load_data
from dynexit.data.images import ArraySource, TransformedImages
from dynexit.data.memory import pixels as memory_pixels
from dynexit.data.transforms import train_transform
from dynexit.errors import UserError
from dynexit.study.schema import DataSettings

NUM_IMAGES = 14
TRANSFORMS: dict[str, dict[str, Any]] = {
    "timm": {"transform": "timm", "train_transform": {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.7}},
    "timm_plain": {"transform": "timm"},
    "pad_crop": {"transform": "pad_crop"},
    "none": {"transform": "none", "test_transform": {"crop_pct": 1.0}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of many sizes and modes in two classes."""
    root = tmp_path_factory.mktemp("pets")
    random = np.random.default_rng(0)
    for i in range(2 * NUM_IMAGES):
        height, width = random.integers(30, 70, 2)
        path = root / ("cat", "dog")[i % 2] / f"{i}.{('png', 'jpg')[i // 2 % 2]}"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.convert("L" if i % 5 == 0 else "RGB").save(path)
    return root


def pets(folder: Path, cache: str, workers: Workers | None = None, **data: Any) -> DataSets:
    sizes = {"num_validation": 4, "num_test": 4, "image_size": 32, "check_images": "none"}
    settings = {"name": "image_folder", "dir": str(folder), "cache": cache, **sizes, **data}
    return load_data(DataSettings.model_validate(settings), workers)


def loaded(split: Split, epoch: int, batches: Sequence[Sequence[int]] = ((3, 0, 5), (), (1, 3))) -> list[torch.Tensor]:
    return [batch[1] for batch in load_batches(split, batches, epoch)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_images_from_memory_are_the_same_bit_for_bit(name: str, folder: Path) -> None:
    plain, kept = (pets(folder, cache, **TRANSFORMS[name]) for cache in ("none", "auto"))
    for split in ("train", "plain_train", "validation", "test"):
        one, other = getattr(plain, split), getattr(kept, split)
        for epoch in (0, 1, 0):  # from files, then from memory
            batches = ([3, 0, 2], [], [1, 3])
            assert same(loaded(one, epoch, batches), loaded(other, epoch, batches)), (split, epoch)
        assert isinstance(other.images, TransformedImages)
        assert other.images.memory is not None
    assert same(loaded(plain.train, 0), loaded(plain.train, 1)) == (name == "none")


def test_arrays_are_cropped_and_flipped_as_image_by_image() -> None:
    data = DataSettings(name="cifar10")
    pixels = np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    source, rows, transform = ArraySource(pixels, np.zeros(9)), torch.arange(9), train_transform(data)[0]
    one = TransformedImages(source, rows, transform, seed=5)
    kept = TransformedImages(source, rows, transform, seed=5, cache="auto", image_size=32)
    batches = [kept.load([4, 8, 0, 4], epoch) for epoch in range(20)]
    assert all(torch.equal(one.load([4, 8, 0, 4], epoch), batch) for epoch, batch in enumerate(batches))
    assert len({batch.numpy().tobytes() for batch in batches}) == 20


@pytest.mark.parametrize("name", ["timm", "pad_crop"])
def test_each_file_is_decoded_once(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    decode = images.decode_path
    monkeypatch.setattr(images, "decode_path", lambda path: [decoded.append(path), decode(path)][1])
    data = pets(folder, "auto", **TRANSFORMS[name])
    for epoch in range(3):
        loaded(data.train, epoch, [range(len(data.train))])
    assert len(decoded) == len(set(decoded)) == len(data.train)


def test_loading_processes_share_the_memory(folder: Path) -> None:
    data = pets(folder, "auto", Workers(2), transform="pad_crop")
    expected = pets(folder, "none", transform="pad_crop")
    batches = [[0, 1], [2, 3], [4, 5], [0, 5]]
    for epoch in (0, 1):
        assert same(loaded(data.train, epoch, batches), loaded(expected.train, epoch, batches))
    kept = data.train.images
    assert isinstance(kept, TransformedImages)
    assert kept.memory is not None
    assert [kept.memory.get(i) is not None for i in range(7)] == [True] * 6 + [False]


def test_loading_leaves_the_random_state_as_it_was(folder: Path) -> None:
    data = pets(folder, "auto", transform="pad_crop")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    loaded(data.train, 0)
    assert torch.equal(torch.rand(2), expected)


def test_only_what_fits_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()
    for split_bytes, is_kept in ((20 * 32 * 32 * 3, True), (1000, False)):
        monkeypatch.setattr(memory_pixels, "LIMIT_BYTES", split_bytes)
        data = pets(folder, "auto", transform="pad_crop")
        loaded(data.train, 0)
        assert (data.train.images.memory is not None) == is_kept  # type: ignore[union-attr]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free._replace(available=50_000))
    data = pets(folder, "auto", transform="pad_crop")
    loaded(data.train, 0)
    assert data.train.images.memory is None  # type: ignore[union-attr]
    with pytest.raises(UserError) as caught:
        loaded(pets(folder, "memory", transform="pad_crop").train, 0)
    assert str(caught.value) == (
        "data.cache = memory: 20 images take 6.14e-05 GB decoded, and 5e-05 GB of memory are available; set "
        "data.cache=auto, which keeps what fits"
    )


def test_a_damaged_image_is_named_as_without_memory(folder: Path, tmp_path: Path) -> None:
    for cls in ("cat", "dog"):
        (tmp_path / cls).mkdir()
        for path in (folder / cls).iterdir():
            (tmp_path / cls / path.name).write_bytes(path.read_bytes())
    broken = sorted((tmp_path / "cat").iterdir())[0]
    broken.write_bytes(b"no image")
    texts = []
    for cache in ("none", "auto"):
        data = pets(tmp_path, cache, transform="timm")
        everything = [(split, [range(len(split))]) for split in (data.train, data.validation, data.test)]
        with pytest.raises(UserError) as caught:
            [loaded(split, 0, batches) for split, batches in everything]
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert str(broken) in texts[0]
