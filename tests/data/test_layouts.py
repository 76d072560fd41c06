"""Folders as users bring them: names of splits, order of classes, hidden copies, links, other files, copies."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynexit.data import DataSets, check_class_order, describe_data, load_data
from dynexit.data.folders import class_folders
from dynexit.errors import UserError
from dynexit.study.schema import DataSettings
from tests.data.on_disk import write_folders

PETS = {"cat": 8, "dog": 8}


def folder(root: Path, **keys: object) -> DataSettings:
    keys = {"name": "image_folder", "image_size": 24, "num_validation": 2, "num_test": 4, **keys}
    return DataSettings.model_validate({"dir": str(root), **keys})


def sizes(data: DataSets) -> tuple[int, int, int]:
    return len(data.train), len(data.validation), len(data.test)


def has_line(remarks: Sequence[str], start: str) -> bool:
    return any(line.startswith(start) for line in remarks)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("Train", "Test"), (14, 2, 16)),
        (("training", "validation"), (14, 2, 16)),
        (("train", "valid"), (14, 2, 16)),
        (("TRAIN", "Val", "Testing"), (16, 16, 16)),
    ],
)
def test_splits_have_several_names_in_any_case(tmp_path: Path, names: tuple[str, ...], expected: object) -> None:
    for seed, name in enumerate(names):
        write_folders(tmp_path, {name: PETS}, seed)
    data = load_data(folder(tmp_path))
    assert sizes(data) == expected
    assert (data.num_classes, data.class_names) == (2, ("cat", "dog"))
    assert {Path(file).parts[0] for file in data.test.file_names() or []} == {names[-1]}


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    write_folders(tmp_path, dict.fromkeys(("train", "val", "valid"), PETS))
    with pytest.raises(UserError) as caught:
        load_data(folder(tmp_path))
    assert str(caught.value) == (
        f"data.dir = {tmp_path}: val and valid both name the validation split; keep one of them there"
    )


def test_a_splits_name_is_never_a_class(tmp_path: Path) -> None:
    write_folders(tmp_path / "nested", {"train": {"Train": 4, "cat": 4}})
    write_folders(tmp_path / "alone", {"": {"Testing": 4, "cat": 4}})
    with pytest.raises(
        UserError, match=r"/train holds Train among its class folders, and the name of a split is never"
    ):
        describe_data(folder(tmp_path / "nested"))
    with pytest.raises(UserError, match=r"there is Testing but no train folder next to it$"):
        describe_data(folder(tmp_path / "alone"))


def test_unused_folders_next_to_train_are_named(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": PETS, "test": PETS, "extra": PETS, "unlabelled": {"x": 1}}, 1)
    line = f"{tmp_path}: not used: extra, unlabelled; used are train, test"
    assert line in load_data(folder(tmp_path)).remarks
    shutil.move(tmp_path / "extra", tmp_path / "val")
    line = f"{tmp_path}: not used: unlabelled, test; used are train, val"
    assert line in load_data(folder(tmp_path, name="imagenet", num_classes=2)).remarks


def test_hidden_entries_are_skipped_everywhere(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": PETS, "test": PETS})
    expected = sizes(load_data(folder(tmp_path)))
    source = tmp_path / "train" / "cat"
    hidden = source / ".ipynb_checkpoints"
    hidden.mkdir()
    for path in sorted(source.glob("*.png"))[:3]:
        shutil.copy(path, hidden / f"{path.stem}-checkpoint.png")
    shutil.copy(source / "1.png", source / "._1.png")
    shutil.copytree(tmp_path / "test", tmp_path / "__MACOSX" / "test")
    shutil.copytree(tmp_path / "test", tmp_path / "train" / "__MACOSX")
    shutil.copytree(tmp_path / "test" / "dog", tmp_path / "test" / ".dog")
    data = load_data(folder(tmp_path))
    assert sizes(data) == expected
    assert data.num_classes == 2
    assert f"{tmp_path}/train: skipped 2 hidden files and folders, as .ipynb_checkpoints or __MACOSX" in data.remarks
    assert not has_line(data.remarks, f"{tmp_path}: not used")
    below_hidden = tmp_path / ".cache" / "set"  # what lies above data.dir does not matter
    write_folders(below_hidden, {"": PETS})
    assert sizes(load_data(folder(below_hidden))) == (10, 2, 4)


def test_each_folder_is_read_once_whatever_links_lead_to_it(tmp_path: Path) -> None:
    write_folders(tmp_path / "images", {"train": PETS, "test": PETS})
    write_folders(tmp_path / "elsewhere", {"": {"more": 3}})
    cat = tmp_path / "images" / "train" / "cat"
    (cat / "self").symlink_to("../cat")
    (cat / "all").symlink_to("../..")
    (tmp_path / "images" / "train" / "dog" / "a").symlink_to("../cat")
    for name in ("one", "two"):
        (cat / name).symlink_to(tmp_path / "elsewhere" / "more")
    data = load_data(folder(tmp_path / "images"))
    assert sizes(data) == (17, 2, 16)
    assert f"{tmp_path}/images/train: skipped 4 links to folders that are read already" in data.remarks
    assert data.train.labels.bincount().tolist() == [10, 7]
    (tmp_path / "images" / "train" / "emu").symlink_to("dog")
    with pytest.raises(UserError, match=r"train: the class folder emu is a link to the class folder dog; remove it$"):
        load_data(folder(tmp_path / "images" / "train"))


def test_files_of_other_kinds_are_counted_and_named(tmp_path: Path) -> None:
    write_folders(tmp_path, {"": PETS})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    image.save(tmp_path / "cat" / "a.jfif", "JPEG")
    image.save(tmp_path / "cat" / "b.GIF")
    image.save(tmp_path / "cat" / "c.avif")
    image.save(tmp_path / "dog" / "deep.PGM", "PPM")
    for name in ("a.heic", "b.HEIC", "notes.txt", "README"):
        (tmp_path / "dog" / name).write_text("x")
    data = load_data(folder(tmp_path))
    assert sum(sizes(data)) == 20
    start = f"{tmp_path}: skipped 4 files without an image's suffix (2 .heic, 1 .txt, 1 no suffix); read are .jpg"
    start_of_either_order = (start, start.replace("1 .txt, 1 no suffix", "1 no suffix, 1 .txt"))
    assert any(line.startswith(start_of_either_order) for line in data.remarks)
    assert "20 images" not in " ".join(data.remarks)
    (tmp_path / "cat" / "masks").mkdir()
    image.save(tmp_path / "cat" / "masks" / "1.png")
    assert has_line(
        load_data(folder(tmp_path)).remarks,
        f"{tmp_path}: 1 image lies in folders inside the class folders (1 in masks); each has the class of its",
    )


def test_byte_equal_images_in_two_splits_are_reported(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": PETS}, 0)
    write_folders(tmp_path, {"test": PETS}, 1)
    assert not has_line(load_data(folder(tmp_path)).remarks, "warning")
    first, second = tmp_path / "train" / "cat", tmp_path / "train" / "dog"
    for i, path in enumerate([*sorted(first.iterdir())[:4], *sorted(second.iterdir())[:4]]):
        shutil.copy(path, tmp_path / "test" / "dog" / f"copy{i}{path.suffix}")
    data = load_data(folder(tmp_path))
    lines = [line for line in data.remarks if line.startswith("warning")]
    assert sum(int(line.split()[1]) for line in lines) == 8
    line = next(line for line in lines if " in train and test" in line)
    assert f"{tmp_path}/train/" in line
    assert f" = {tmp_path}/test/dog/copy" in line
    assert line.endswith("; results on these are too good")
    assert not has_line(load_data(folder(tmp_path, check_images="none")).remarks, "warning")


def test_copies_that_are_held_out_are_reported_too(tmp_path: Path) -> None:
    write_folders(tmp_path, {"": {"cat": 1, "dog": 1}})
    for name in PETS:
        for i in range(1, 9):
            shutil.copy(tmp_path / name / "0.JPEG", tmp_path / name / f"{i}.JPEG")
    remarks = load_data(folder(tmp_path)).remarks
    assert has_line(remarks, "warning: 2 images are byte-equal in train and validation and test, the first")


def test_classes_and_counts_are_given(tmp_path: Path) -> None:
    write_folders(tmp_path / "few", {"": {"cat": 20, "dog": 20, "rare": 1}})
    remarks = load_data(folder(tmp_path / "few")).remarks
    assert remarks[:3] == (
        "3 classes, with images in train/validation/test: cat 17/1/2, dog 17/1/2, rare 1/0/0",
        "warning: validation has no image of rare: 1 of 3 classes too small",
        "warning: test has no image of rare: 1 of 3 classes too small",
    )
    write_folders(tmp_path / "many", {"": {f"{i:02}": 3 for i in range(30)}})
    remarks = load_data(folder(tmp_path / "many", num_validation=30, num_test=20)).remarks
    assert remarks[0] == (
        "30 classes, 00 to 29: train 40 images, 1 to 2 a class; validation 30 images, 1 to 1 a class; test 20 images, "
        "0 to 1 a class"
    )
    assert remarks[1].startswith("warning: test has no image of ")
    assert remarks[1].endswith(" and 5 more: 10 of 30 classes too small")


NUMBERS = ["0", "1", "10", "2", "Ape", "ant"]


def test_classes_have_the_order_asked_for(tmp_path: Path) -> None:
    write_folders(tmp_path / "images", {"": dict.fromkeys(NUMBERS, 4)})
    listed = tmp_path / "names.txt"
    listed.write_text("ant\nApe\n10\n2\n\n1\n0\n")
    natural = ["0", "1", "2", "10", "ant", "Ape"]
    expected = {
        None: NUMBERS,
        "torchvision": NUMBERS,
        "timm": natural,
        str(listed): ["ant", "Ape", "10", "2", "1", "0"],
    }
    held = set()
    for order, names in expected.items():
        data = load_data(folder(tmp_path / "images", class_order=order))
        assert list(data.class_names) == names == class_folders(folder(tmp_path / "images", class_order=order))
        for split in (data.train, data.validation, data.test):
            files = split.file_names()
            assert files is not None
            assert [Path(file).parts[0] for file in files] == [names[label] for label in split.labels.tolist()]
        held.add(tuple(sorted(data.train.file_names() or [])))
    assert len(held) == 1  # the order changes labels, and not what is held out


def test_a_class_order_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write_folders(tmp_path / "images", {"": PETS})
    listed = tmp_path / "names.txt"

    def text(**keys: object) -> str:
        with pytest.raises(UserError) as caught:
            describe_data(folder(tmp_path / "images", **keys))
        return str(caught.value)

    assert text(class_order=str(listed)).startswith(f"data.class_order = {listed}: cannot be read (")
    listed.write_bytes(b"\xff\xfe")
    assert text(class_order=str(listed)).startswith(f"data.class_order = {listed}: cannot be read (")
    listed.write_text("cat\ncow\n")
    assert text(class_order=str(listed)) == (
        f"data.class_order = {listed}: lacks dog and also has cow; name each class folder of the training images once"
    )
    listed.write_text("cat\ndog\ncat\n")
    assert text(class_order=str(listed)) == f"data.class_order = {listed}: cat duplicated; give each class one line"
    assert text(class_order="timm", name="svhn") == (
        "data.class_order = timm: svhn has no class folders; remove the key"
    )
    assert text(name="torch/image_folder", num_classes=2).startswith(
        "data.name = torch/image_folder: set data.name=image_folder"
    )


def test_an_ambiguous_order_is_refused_for_a_backbone_used_as_it_is(tmp_path: Path) -> None:
    write_folders(tmp_path / "images", {"train": dict.fromkeys(NUMBERS, 1)})
    write_folders(tmp_path / "same", {"": PETS})
    with pytest.raises(UserError) as caught:
        check_class_order(folder(tmp_path / "images"))
    assert str(caught.value) == (
        f"data.class_order is not set, and class 2 of {tmp_path}/images is '10' in torchvision's order and '2' in "
        "timm's; set data.class_order to torchvision, timm, or a file with one name per line, as the weights need it"
    )
    check_class_order(folder(tmp_path / "images", class_order="timm"))
    check_class_order(folder(tmp_path / "same"))
    check_class_order(DataSettings())
    check_class_order(folder(tmp_path / "elsewhere", name="imagenet"))


def test_a_split_that_leaves_little_for_training_is_said(tmp_path: Path) -> None:
    write_folders(tmp_path, {"train": PETS, "test": PETS})
    start = "only 4 of 16 images are left for training; make data.num_validation or data.num_test smaller"
    assert has_line(load_data(folder(tmp_path, num_validation=12)).remarks, start)
    assert not has_line(load_data(folder(tmp_path, num_validation=8)).remarks, "only")
