"""Images in folders: layouts, classes, and what is found before training starts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dynexit.data import describe_data, load_batches, load_data
from dynexit.errors import UserError
from dynexit.study.schema import DataSettings
from tests.data.on_disk import write_folders

PETS = {"cat": 4, "dog": 5, "emu": 3}


def folder(root: Path, **keys: object) -> DataSettings:
    keys = {"name": "image_folder", "image_size": 24, "num_validation": 2, "num_test": 3, **keys}
    return DataSettings.model_validate({"dir": str(root), **keys})


def test_the_layouts_of_folders(tmp_path: Path) -> None:
    layouts = {
        "bare": ({"": PETS}, (7, 2, 3)),
        "train alone": ({"train": PETS}, (7, 2, 3)),
        "val": ({"train": PETS, "val": {"cat": 1, "dog": 2, "emu": 1}}, (10, 2, 4)),
        "test": ({"train": PETS, "test": {"cat": 2, "dog": 2, "emu": 1}}, (10, 2, 5)),
        "both": ({"train": PETS, "val": dict.fromkeys(PETS, 1), "test": dict.fromkeys(PETS, 2)}, (12, 3, 6)),
    }
    for name, (splits, sizes) in layouts.items():
        write_folders(tmp_path / name, splits)
        data = load_data(folder(tmp_path / name))
        assert (len(data.train), len(data.validation), len(data.test)) == sizes, name
        assert describe_data(folder(tmp_path / name)) == (3, 3)


def test_images_keep_their_class_and_their_pixels(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": PETS, "val": dict.fromkeys(PETS, 3)})
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "cat" / "more").mkdir()
    Image.new("RGB", (24, 24), (255, 0, 51)).save(tmp_path / "train" / "cat" / "more" / "ünï.png")
    keys = {"transform": "none", "normalisation": "none", "test_transform": {"crop_pct": 1.0}}
    data = load_data(folder(tmp_path, num_validation=1, **keys))
    paths = []
    for split in (data.train, data.validation, data.test):
        assert len({*split.origin.tolist()}) == len(split)
        for index, images, labels in load_batches(split, [[i] for i in range(len(split))]):
            path = split.images.source.path(int(split.origin[index]))
            assert path.relative_to(tmp_path).parts[1] == ["cat", "dog", "emu"][int(labels)]
            assert images.shape == (1, 3, 24, 24)
            paths.append(path)
            if path.name == "ünï.png":
                expected = torch.tensor([1.0, 0.0, 0.2])[None, :, None, None].expand(1, 3, 24, 24)
                assert torch.allclose(images, expected)
    assert len(paths) == len(set(paths)) == 12 + 1 + 9


def test_the_split_is_drawn_by_the_seed(tmp_path: Path) -> None:
    write_folders(tmp_path, {"": {"cat": 20, "dog": 20}})
    held = [load_data(folder(tmp_path, seed=seed)).validation.origin.tolist() for seed in (0, 0, 1, 2)]
    assert held[0] == held[1]
    assert len({tuple(rows) for rows in held}) == 3
    large = load_data(folder(tmp_path, num_validation=9))
    assert set(held[0]) <= set(large.validation.origin.tolist())


@pytest.mark.parametrize("check", ["headers", "pixels"])
def test_images_that_do_not_decode_are_named_before_training(tmp_path: Path, check: str) -> None:
    write_folders(tmp_path, {"": PETS})
    truncated = tmp_path / "dog" / "2.JPEG"
    truncated.write_bytes(truncated.read_bytes()[:-400])
    load_data(folder(tmp_path, check_images="headers"))  # its header is whole
    empty = tmp_path / "emu" / "1.png"
    empty.write_bytes(b"")
    damaged = [empty] if check == "headers" else [truncated, empty]
    with pytest.raises(UserError) as caught:
        load_data(folder(tmp_path, check_images=check))
    assert str(caught.value) == (
        f"{len(damaged)} of 12 images in {tmp_path} do not decode: {', '.join(map(str, damaged))}; replace them or "
        "remove them"
    )
    load_data(folder(tmp_path, check_images="none"))
    with pytest.raises(UserError, match=r"^1 of 12 images"):  # without being asked
        load_data(folder(tmp_path))
    load_data(folder(tmp_path), checked=True)


def test_damaged_images_of_all_splits_are_named_at_once(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": {"cat": 5, "dog": 4}, "test": {"cat": 3, "dog": 2}})
    damaged = [tmp_path / "train" / "cat" / "0.JPEG", tmp_path / "test" / "dog" / "0.JPEG"]
    for path in damaged:
        assert path.is_file()
        path.write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        load_data(folder(tmp_path))
    lines = str(caught.value).splitlines()
    assert [line.partition(" do not")[0] for line in lines] == [
        f"1 of 9 images in {tmp_path / 'train'}",
        f"1 of 5 images in {tmp_path / 'test'}",
    ]
    assert all(str(path) in line for path, line in zip(damaged, lines, strict=True))


def test_of_many_damaged_images_five_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path, {"": {"cat": 5, "dog": 4}})
    for path in tmp_path.glob("*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^9 of 9 images in .*/4.JPEG and 4 more; replace them or remove them$"):
        load_data(folder(tmp_path))


def test_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    def text(splits: dict[str, dict[str, int]], **keys: object) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        root.mkdir()
        write_folders(root, splits)
        with pytest.raises(UserError) as caught:
            load_data(folder(root, **keys))
        return str(caught.value).replace(str(root), "DIR")

    assert text({}) == "DIR holds no class folders; sort its images into one folder per class"
    assert text({"": {"cat": 2, "dog": 0}}).startswith(
        "1 of 2 class folders in DIR hold no images (dog); known are files"
    )
    assert text({"train": PETS, "val": {"cat": 1, "emu": 1, "fox": 1}}) == (
        "DIR/val holds 3 class folders and the training images 3: it lacks dog and also has fox; all splits "
        "must have the same classes"
    )
    assert text({"": PETS}, num_classes=4) == "data.num_classes = 4: image_folder has 3 classes; remove the key"
    assert text({"": {"cat": 9}}) == ("image_folder in data.dir = DIR has 1 class; a classifier needs two at least")
    assert text({"val": PETS}) == "data.dir = DIR: there is val but no train folder next to it"
    assert text({"": PETS}, num_test=10) == (
        "data.num_validation = 2 and data.num_test = 10 leave none of 12 images for training; make them smaller"
    )
    assert text({"train": PETS, "val": PETS}, num_validation=12) == (
        "data.num_validation = 12 leaves none of 12 images for training; make them smaller"
    )


def test_imagenet_is_train_and_val_of_a_thousand_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_data(folder(tmp_path, name="imagenet"))
    assert str(caught.value).startswith(
        f"imagenet was looked for in {tmp_path}: train and val missing; its owners give"
    )
    assert describe_data(DataSettings(name="imagenet")) == (1000, 3)  # without a folder
    write_folders(tmp_path, {"train": PETS, "val": dict.fromkeys(PETS, 1), "test": {"unlabelled": 2}})
    with pytest.raises(
        UserError, match=r"/train holds 3 class folders and should hold 1000; complete it, or set data.num"
    ):
        load_data(folder(tmp_path, name="imagenet"))
    data = load_data(folder(tmp_path, name="imagenet", num_classes=3))
    assert (len(data.train), len(data.validation), len(data.test), data.num_classes) == (10, 2, 3, 3)
    index, images, labels = next(load_batches(data.train, [[3, 1]]))
    assert index.tolist() == [3, 1]
    assert images.shape == (2, 3, 24, 24)
    assert labels.tolist() == data.train.labels[[3, 1]].tolist()
    flat = tmp_path / "flat"
    write_folders(flat, {"train": PETS})
    (flat / "val").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(flat / "val" / "0.png")
    with pytest.raises(
        UserError, match=r"/flat/val holds no class folders; sort its images into one folder per class$"
    ):
        load_data(folder(flat, name="imagenet", num_classes=3))
