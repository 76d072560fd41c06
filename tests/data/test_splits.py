"""Batches are the same however they are loaded."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dynexit.data import DataSets, Split, Workers, epoch_batches, load_batches, load_data, workers_of
from dynexit.data.splits import stratified_order
from dynexit.errors import UserError
from dynexit.study.dist import DistSettings
from dynexit.study.schema import DataSettings
from tests.data.on_disk import write_folders

TWO = Workers(2)
AUGMENTATION = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5, "re_mode": "pixel", "color_jitter": 0.4}


def folder_data(root: Path, **keys: object) -> DataSettings:
    """Two classes, 13 and 12 images, three held out twice; everything random that timm offers."""
    if not root.exists():
        write_folders(root, {"": {"cat": 13, "dog": 12}})
    keys = {"image_size": 24, "num_validation": 3, "num_test": 3, "train_transform": AUGMENTATION, **keys}
    return DataSettings.model_validate({"name": "image_folder", "dir": str(root), **keys})


@pytest.fixture
def images(tmp_path: Path) -> DataSets:
    return load_data(folder_data(tmp_path / "images"))


def joined(split: Split, batches: list[list[int]], epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    index, found, labels = zip(*load_batches(split, batches, epoch), strict=True)
    return torch.cat(index), torch.cat(found), torch.cat(labels)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("persistent", [True, False])
def test_loading_processes_give_the_same_bits_in_the_same_order(tmp_path: Path, persistent: bool) -> None:
    data = folder_data(tmp_path / "images")
    here, there = load_data(data).train, load_data(data, Workers(2, persistent)).train
    for epoch in (0, 1, 1, 5):
        batches = epoch_batches(len(here), 4, 7, epoch)
        assert same(joined(here, batches, epoch), joined(there, batches, epoch))


def test_digits_come_through_processes_unchanged() -> None:
    data = DataSettings(num_train_views=1, num_evaluation_views=1)
    here, there = load_data(data).train, load_data(data, TWO).train
    batches = epoch_batches(len(here), 100, 7, 0)
    assert same(joined(here, batches, 0), joined(there, batches, 0))
    order = torch.tensor([index for batch in batches for index in batch])
    assert same(joined(here, batches, 0), (order, here.images[order], here.labels[order]))


def test_an_augmented_image_depends_on_seed_epoch_and_index_alone(images: DataSets, tmp_path: Path) -> None:
    _, whole, _ = joined(images.train, [list(range(19))], 2)
    for index in (4, 0, 18):
        _, alone, _ = joined(images.train, [[index]], 2)
        assert torch.equal(alone[0], whole[index])
        _, epoch_3, _ = joined(images.train, [[index]], 3)
        assert not torch.equal(epoch_3[0], whole[index])
    order, shuffled, _ = joined(images.train, epoch_batches(19, 5, 1, 2), 2)
    assert torch.equal(shuffled, whole[order])
    changed = load_data(folder_data(tmp_path / "images", seed=1))
    path = {images.train.images.source.path(int(row)): i for i, row in enumerate(images.train.origin)}
    both = [
        (path[p], i)
        for i, row in enumerate(changed.train.origin)
        if (p := changed.train.images.source.path(int(row))) in path
    ]
    assert any(mine == theirs for mine, theirs in both)  # the same image at the same index, so only the seed differs
    _, others, _ = joined(changed.train, [list(range(19))], 2)
    assert not any(torch.equal(whole[mine], others[theirs]) for mine, theirs in both)


def test_validation_and_test_are_the_same_in_every_epoch(images: DataSets) -> None:
    for split in (images.validation, images.test):
        assert same(joined(split, [[0, 1, 2]], 0), joined(split, [[0, 1, 2]], 4))


@pytest.mark.parametrize("workers", [Workers(), TWO])
def test_loading_leaves_the_generators_of_training_alone(tmp_path: Path, workers: Workers) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002

    def seed() -> None:
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        torch.manual_seed(3)

    data = load_data(folder_data(tmp_path / "images"), workers)
    seed()
    expected = draw()
    seed()
    joined(data.train, [[0, 1], [2]], 0)
    joined(data.validation, [[0, 1], [2]], 0)
    assert draw() == expected


def test_an_empty_batch_has_the_shape_of_others(images: DataSets) -> None:
    index, found, labels = joined(images.train, [[]], 0)
    assert (index.shape, found.shape, labels.shape) == ((0,), (0, 3, 24, 24), (0,))


@pytest.mark.parametrize("workers", [Workers(), TWO])
def test_an_image_damaged_meanwhile_is_named_in_one_sentence(tmp_path: Path, workers: Workers) -> None:
    data = load_data(folder_data(tmp_path / "images"), workers)
    path = data.train.images.source.path(int(data.train.origin[5]))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=rf"^the image {path} does not decode \(.*\); replace it or remove it$"):
        joined(data.train, [[0, 1], [4, 5]], 0)
    joined(data.train, [[0, 1], [4, 6]], 1)  # the processes still serve


def test_persistent_processes_serve_one_reader_at_a_time(tmp_path: Path) -> None:
    data = load_data(folder_data(tmp_path / "images"), TWO)
    first = load_batches(data.train, [[0], [1], [2], [3], [4], [5], [6], [7]])
    next(first)
    joined(data.train, [[9], [8]], 0)
    with pytest.raises(RuntimeError, match="were given other batches"):
        list(first)


def test_memory_is_pinned_for_a_gpu_only() -> None:
    dist = DistSettings(num_workers=3, persistent_workers=False, prefetch_batches=4)
    assert workers_of(dist, torch.device("cuda")) == Workers(3, False, True, 4)
    assert workers_of(dist, torch.device("cpu")) == Workers(3, False, False, 4)
    assert not workers_of(DistSettings(pin_memory=False), torch.device("cuda")).pin_memory


@pytest.mark.parametrize("counts", [[1, 2, 3, 40], [100] * 7, [500, 3, 90, 1, 1]])
def test_every_part_of_a_stratified_order_has_the_classes_shares(counts: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    num_samples = len(labels)
    order = stratified_order(labels, 3)
    assert torch.equal(order.sort().values, torch.arange(num_samples))
    assert not torch.equal(order, stratified_order(labels, 4))
    assert not torch.equal(order, order.sort().values)
    for start, end in ((0, num_samples // 5), (num_samples // 5, num_samples // 2), (0, num_samples // 2)):
        found = labels[order[start:end]].bincount(minlength=len(counts))
        share = torch.tensor(counts) * (end - start) / num_samples
        assert (found - share).abs().max() < 2
    last = labels[order[num_samples - len(counts) :]]
    assert sorted(last.tolist()) == list(range(len(counts)))  # one of each class comes last


def test_held_out_splits_are_stratified(tmp_path: Path) -> None:
    write_folders(tmp_path, {"": {"cat": 40, "dog": 20}})
    for seed in range(5):
        data = load_data(folder_data(tmp_path, seed=seed, num_validation=6, num_test=12))
        assert data.validation.labels.bincount().tolist() == [4, 2]
        assert data.test.labels.bincount().tolist() == [8, 4]
