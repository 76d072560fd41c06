"""Small data sets in the true formats on disk, and torchvision's checksums put in step with them."""

import gzip
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def random_pixels(num_images: int, seed: int) -> np.ndarray:
    """(N, 32, 32, 3) uint8"""
    return np.random.default_rng(seed).integers(0, 256, (num_images, 32, 32, 3), dtype=np.uint8)


def cyclic_labels(num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """Each class about equally often, in random order."""
    return np.random.default_rng([seed, 1]).permutation(np.arange(num_images) % num_classes)


def write_cifar(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch, num_train: int = 50, num_test: int = 20
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes the python version of `cifar10` or `cifar100`; returns (pixels, labels) of `train` and `test`."""
    cls: Any = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    num_classes = 10 if name == "cifar10" else 100
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    sets = {}
    for split, files, count in (("train", cls.train_list, num_train), ("test", cls.test_list, num_test)):
        pixels, labels = random_pixels(count, seed=count), cyclic_labels(count, num_classes, seed=count)
        sets[split] = (pixels, labels)
        rows = np.array_split(np.arange(count), len(files))
        checked = []
        for (file, _), row in zip(files, rows, strict=True):
            content = {"data": pixels[row].transpose(0, 3, 1, 2).reshape(len(row), -1), "batch_label": file}
            content["labels" if name == "cifar10" else "fine_labels"] = labels[row].tolist()
            (folder / file).write_bytes(pickle.dumps(content, protocol=2))
            checked.append([file, md5(folder / file)])
        monkeypatch.setattr(cls, f"{split}_list", checked)
    meta = folder / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: [f"class {i}" for i in range(num_classes)]}, protocol=2))
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(meta)})
    return sets


def write_svhn(
    root: Path, monkeypatch: pytest.MonkeyPatch, num_train: int = 40, num_test: int = 15
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes SVHN's .mat files, in which a zero is called 10; returns (pixels, labels) of `train` and `test`."""
    sets, split_list = {}, dict(datasets.SVHN.split_list)
    for split, count in (("train", num_train), ("test", num_test)):
        pixels, labels = random_pixels(count, seed=count), cyclic_labels(count, 10, seed=count)
        sets[split] = (pixels, labels)
        url, name, _ = split_list[split]
        named = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        scipy.io.savemat(root / name, {"X": pixels.transpose(1, 2, 3, 0), "y": named})
        split_list[split] = [url, name, md5(root / name)]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    return sets


def write_folders(root: Path, splits: dict[str, dict[str, int]], seed: int = 0) -> None:
    """Writes so many images per class and split (split "" is the root), of all sizes, some as PNG, some grey."""
    random = np.random.default_rng(seed)
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = random.integers(24, 60, 2)
                pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
                image = Image.fromarray(pixels) if i % 3 else Image.fromarray(pixels[..., 0])
                image.save(folder / f"{i}.{'png' if i % 2 else 'JPEG'}")


def write_fashion_mnist(
    root: Path, num_train: int = 30, num_test: int = 10
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes the gzipped and the plain idx files of `torch/fashion_mnist`; returns (pixels, labels)."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    sets = {}
    for split, prefix, count in (("train", "train", num_train), ("test", "t10k", num_test)):
        pixels, labels = random_pixels(count, seed=count)[:, :28, :28, 0], cyclic_labels(count, 10, seed=count)
        sets[split] = (pixels, labels)
        for name, array in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", labels.astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = header + np.ascontiguousarray(array).tobytes()
            (folder / f"{prefix}-{name}").write_bytes(content)
            (folder / f"{prefix}-{name}.gz").write_bytes(gzip.compress(content))
    return sets
