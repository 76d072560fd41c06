"""Images are opened in known formats only, and what becomes of their numbers."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data.dataset_factory
import torch
from PIL import EpsImagePlugin, Image
from timm.data.dataset import ImageDataset, IterableImageDataset
from torchvision.datasets import ImageFolder

from dynexit.data import load_batches, load_data
from dynexit.data.pixels import FORMATS, decode, decode_path
from dynexit.errors import UserError
from dynexit.study.schema import DataSettings
from tests.data.on_disk import write_folders

POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
0 0 20 20 rectfill
showpage
%%EOF
"""
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def folder(root: Path, **keys: object) -> DataSettings:
    keys = {"name": "image_folder", "image_size": 24, "num_validation": 2, "num_test": 2, **keys}
    return DataSettings.model_validate({"dir": str(root), **keys})


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called gs, the first on the path, that leaves the file returned where it is started."""
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{started}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    return started


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of images; the file `0.jpg` of the first is PostScript."""
    write_folders(tmp_path / "images", {"": {"cat": 6, "dog": 6}})
    (tmp_path / "images" / "cat" / "0.jpg").write_bytes(POSTSCRIPT)
    return tmp_path / "images"


def test_pillow_alone_would_start_ghostscript(ghostscript: Path, images: Path) -> None:
    with pytest.raises(OSError), Image.open(images / "cat" / "0.jpg") as image:
        image.load()
    assert ghostscript.exists()


@pytest.mark.parametrize("check", ["headers", "pixels"])
def test_postscript_is_named_and_starts_no_program(ghostscript: Path, images: Path, check: str) -> None:
    path = images / "cat" / "0.jpg"
    with pytest.raises(UserError) as caught:
        load_data(folder(images, check_images=check))
    assert str(caught.value) == f"1 of 13 images in {images} do not decode: {path}; replace them or remove them"
    with pytest.raises(UserError) as caught:
        decode_path(str(path))
    assert str(caught.value) == (
        f"the image {path} does not decode (not one of the accepted formats {', '.join(sorted(FORMATS))}); replace it "
        "or remove it"
    )
    assert not ghostscript.exists()


class Opening:
    """A data set that opens its images itself, by index and in turn, as several of torchvision's and timm's do."""

    def __init__(self, root: Path) -> None:
        self.paths = sorted(root.glob("*/*"))
        self.targets = [int(path.parent.name == "dog") for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        with Image.open(self.paths[row]) as image:
            return image.convert("RGB"), self.targets[row]

    def __iter__(self) -> Any:
        return (self[row] for row in range(len(self)))


class Reading(Opening):
    """A reader of timm's, which gives bytes."""

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return io.BytesIO(self.paths[row].read_bytes()), self.targets[row]


@pytest.mark.parametrize("kind", ["files", "itself", "reader", "stream"])
def test_sets_of_other_libraries_start_no_program(
    ghostscript: Path, images: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    own = Opening(images)
    sets = {
        "files": lambda: ImageFolder(images),
        "itself": lambda: own,
        "reader": lambda: ImageDataset(None, reader=Reading(images)),
        "stream": lambda: IterableImageDataset(None, reader=own),
    }
    monkeypatch.setattr(timm.data.dataset_factory, "create_dataset", lambda *_, **__: sets[kind]())
    keys = {"num_classes": 2, "test_split": None, "transform": "none"}

    def load_all() -> None:
        data = load_data(folder(images, name="hfds/a/b", **keys))
        for split in (data.train, data.validation, data.test):
            list(load_batches(split, [[i] for i in range(len(split))]))

    with pytest.raises(UserError, match=r"^the image (.*/cat/0\.jpg|\d+ of hfds/a/b, split train) does not decode"):
        load_all()
    assert not ghostscript.exists()
    assert Image.open.__module__ == "PIL.Image"


def written(path: Path, array: np.ndarray) -> np.ndarray:
    """The first channel of the image that is read back from `path`."""
    Image.fromarray(array).save(path)
    image = decode(path, str(path))
    assert image.mode == "RGB"
    return np.asarray(image)[..., 0]


@pytest.mark.parametrize("name", ["16.png", "16.tif", "16.pgm"])
def test_images_of_16_bits_are_scaled(tmp_path: Path, name: str) -> None:
    assert np.array_equal(written(tmp_path / name, GREY.astype(np.uint16) * 257), GREY)
    assert written(tmp_path / name, np.full((2, 2), 255, np.uint16)).max() == 1  # dark, and not white


def test_the_range_of_a_pgm_counts(tmp_path: Path) -> None:
    values = np.array([[0, 1000], [2047, 4095]], dtype=">u2")
    (tmp_path / "12.pgm").write_bytes(b"P5 2 2 4095\n" + values.tobytes())
    found = np.asarray(decode(tmp_path / "12.pgm", "12.pgm"))[..., 0]
    assert found.tolist() == [[0, 62], [127, 255]]


def test_integers_of_32_bits_take_the_smallest_depth(tmp_path: Path) -> None:
    for name, factor in (("8.tif", 1), ("16.tif", 257), ("31.tif", 0x7FFFFFFF // 255)):
        assert np.array_equal(written(tmp_path / name, GREY.astype(np.int32) * factor), GREY)
    with pytest.raises(UserError) as caught:
        written(tmp_path / "negative.tif", np.array([[-5, 9]], np.int32))
    assert str(caught.value) == (
        f"the image {tmp_path / 'negative.tif'} has integers from -5 to 9; they must not be negative: shift them, or "
        "save unsigned integers"
    )


def test_floats_outside_the_unit_range_are_refused(tmp_path: Path) -> None:
    assert np.array_equal(written(tmp_path / "f.tif", (GREY / 255).astype(np.float32)), GREY)
    for value, text in ((255.0, "0 to 255"), (-0.5, "-0.5 to 0"), (np.nan, "nan to nan")):
        with pytest.raises(UserError) as caught:
            written(tmp_path / "f.tif", np.array([[0, value]], np.float32))
        assert f"has floats from {text}; they must lie in [0, 1]" in str(caught.value)


def test_images_without_a_range_are_named_before_training(tmp_path: Path) -> None:
    write_folders(tmp_path, {"": {"cat": 6, "dog": 6}})
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "cat" / "x.tif")
    (tmp_path / "dog" / "y.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        load_data(folder(tmp_path, check_images="pixels"))
    assert str(caught.value).splitlines() == [
        f"1 of 14 images in {tmp_path} do not decode: {tmp_path}/dog/y.png; replace them or remove them",
        f"1 of 14 images in {tmp_path} have numbers that are no intensities (floats outside [0, 1], or negative "
        f"integers): {tmp_path}/cat/x.tif; replace them or remove them",
    ]


def test_alpha_is_dropped_and_palettes_are_expanded(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(colours).save(tmp_path / "rgba.png")
    assert np.array_equal(np.asarray(decode(tmp_path / "rgba.png", "")), colours[..., :3])
    grey = np.stack([GREY, GREY[::-1]], -1)
    Image.fromarray(grey).save(tmp_path / "la.png")
    assert np.array_equal(np.asarray(decode(tmp_path / "la.png", ""))[..., 1], GREY)
    palette = Image.fromarray(GREY % 4).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    palette.save(tmp_path / "p.png", transparency=b"\x00\x80\xff\x10")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.asarray(decode(tmp_path / "p.png", ""))
    assert {tuple(pixel) for pixel in found.reshape(-1, 3).tolist()} == {
        (10, 20, 30),
        (40, 50, 60),
        (70, 80, 90),
        (100, 110, 120),
    }
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    cmyk.save(tmp_path / "cmyk.tif")
    assert np.asarray(decode(tmp_path / "cmyk.tif", ""))[0, 0].tolist() == [0, 255, 255]


def test_rotation_is_ignored_and_counted(tmp_path: Path) -> None:
    write_folders(tmp_path, {"": {"cat": 6, "dog": 6}})
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, :15] = 255
    for suffix in ("jpg", "png"):
        Image.fromarray(pixels).save(tmp_path / "cat" / f"turned.{suffix}", exif=exif)
        found = decode(tmp_path / "cat" / f"turned.{suffix}", "")
        assert found.size == (30, 10)
        assert np.abs(np.asarray(found).astype(int) - pixels).max() < 40
    Image.fromarray(GREY.astype(np.int32)).save(tmp_path / "dog" / "deep.tif")
    for check in ("headers", "pixels"):
        remarks = load_data(folder(tmp_path, check_images=check)).remarks
        assert "2 images have an EXIF rotation, which is ignored: pixels are read as they are stored" in remarks
        assert any(line.startswith("1 image holds 32-bit integers: each is scaled by") for line in remarks)
    assert not any("EXIF" in line for line in load_data(folder(tmp_path, check_images="none")).remarks)


def test_sets_of_torchvision_scale_16_bits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("cat", 10), ("dog", 200)):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(np.full((24, 24), value * 257, np.uint16)).save(tmp_path / name / f"{i}.png")
    monkeypatch.setattr(timm.data.dataset_factory, "create_dataset", lambda *_, **__: ImageFolder(tmp_path))
    keys = {"num_classes": 2, "test_split": None, "transform": "none", "normalisation": "none"}
    data = load_data(folder(tmp_path, name="hfds/a/b", **keys))
    for _, found, labels in load_batches(data.train, [[i] for i in range(len(data.train))]):
        assert torch.allclose(found, torch.tensor([10 / 255, 200 / 255])[labels][:, None, None, None].expand_as(found))
    assert data.class_names == ("cat", "dog")
    assert data.test.file_names() is not None
