"""Labels from a CSV file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynexit.data import check_class_order, describe_data, load_data
from dynexit.errors import UserError
from dynexit.study.schema import DataSettings


def flat_folder(root: Path, lines: str, num_images: int = 12, **keys: object) -> DataSettings:
    """Images 0.png, 1.png, … of one intensity each, and labels.csv."""
    root.mkdir(exist_ok=True)
    for i in range(num_images):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / f"{i}.png")
    (root / "labels.csv").write_text(lines)
    keys = {"image_size": 8, "num_validation": 2, "num_test": 2, "transform": "none", "normalisation": "none", **keys}
    return DataSettings.model_validate({"name": "image_folder", "dir": str(root), "labels": "labels.csv", **keys})


def rows(labels: list[str], header: str = "file,label") -> str:
    return "\n".join([header, *(f"{i}.png,{label}" for i, label in enumerate(labels))])


def labels_of(data: DataSettings) -> dict[str, dict[int, str]]:
    """By split and image the name of its class; the image's intensity is its number."""
    loaded = load_data(data)
    found = {}
    for name in ("train", "validation", "test"):
        _, images, labels = loaded.split(name).__getitems__(range(len(loaded.split(name))))
        numbers = (images[:, 0, 0, 0] * 255).round().int().tolist()
        found[name] = dict(zip(numbers, (loaded.class_names[i] for i in labels), strict=True))
    return found


def test_every_file_gets_its_label(tmp_path: Path) -> None:
    names = ["cat", "dog", "emu"] * 4
    data = flat_folder(tmp_path, "\ufeff" + rows(names))
    assert describe_data(data) == (3, 3)
    found = labels_of(data)
    assert [len(split) for split in found.values()] == [8, 2, 2]
    assert {i: name for split in found.values() for i, name in split.items()} == dict(enumerate(names))
    assert sorted(load_data(data).test.file_names() or []) == sorted(f"{i}.png" for i in found["test"])


def test_a_column_split_names_the_splits(tmp_path: Path) -> None:
    lines = [f"a{i % 2},{i}.png,x,{'Val' if i < 3 else 'test' if i < 5 else 'train'}" for i in range(12)]
    data = flat_folder(tmp_path, "\n".join(["label,file,note,split", *lines]))
    found = labels_of(data)
    assert {name: sorted(split) for name, split in found.items()} == {
        "train": [*range(5, 12)],
        "validation": [0, 1, 2],
        "test": [3, 4],
    }
    assert all(name == f"a{i % 2}" for split in found.values() for i, name in split.items())


def test_whole_numbers_are_the_indices_of_classes(tmp_path: Path) -> None:
    labels = [0, 2, 10, 3] * 3
    data = flat_folder(tmp_path, rows([f"{label:02}" for label in labels]))
    assert describe_data(data) == (11, 3)
    check_class_order(data)  # libraries cannot differ in it
    loaded = load_data(data)
    assert loaded.class_names == tuple(map(str, range(11)))
    found = labels_of(data)
    assert {i: int(name) for split in found.values() for i, name in split.items()} == dict(enumerate(labels))
    assert describe_data(data.model_copy(update={"num_classes": 20}))[0] == 20
    named = flat_folder(tmp_path, rows(["class1", "class10", "class2"] * 4))
    with pytest.raises(UserError, match=r"^data.class_order is not set, and class 1 of .* is 'class10' in torchvision"):
        check_class_order(named)


def test_wrong_files_of_labels_are_refused(tmp_path: Path) -> None:
    def text(lines: str, **keys: object) -> str:
        with pytest.raises(UserError) as caught:
            load_data(flat_folder(tmp_path / "images", lines, **keys))
        return str(caught.value).replace(str(tmp_path), "DIR").removeprefix("data.labels = labels.csv: ")

    good = ["cat", "dog"] * 6
    assert text(rows(good, "path,label")) == (
        "has no column file (its first line is 'path,label'); that line should name file and label"
    )
    assert text("").startswith("has no column file and no column label (its first line is ''); that line")
    assert text(rows(good) + "\n12.png,cat\nmore/x.png,dog") == (
        "2 of 14 files are not in DIR/images (12.png, more/x.png); correct their paths, which are relative to "
        "data.dir, or remove them"
    )
    assert text(rows(good) + "\n./3.png,dog\n4.png,cat") == (
        "2 files are duplicated (3.png, 4.png); give each file one row"
    )
    assert text(rows(good) + "\n../3.png,dog\n/etc/x.png,cat") == (
        "2 of 14 files are not below data.dir (../3.png, /etc/x.png); give their paths relative to it"
    )
    assert text(rows([*good[:3], ""])) == "row 5 has no label; complete or remove it"
    assert text("file,label,split\n0.png,cat,dev") == "row 2 has split 'dev'; allowed are train, val and test"
    assert text("file,label") == "lists no images; give a row per image"
    assert text(rows(["0", "7", "1"]), num_classes=7) == (
        "has the label 7, and data.num_classes = 7 allows 0 to 6; correct one of them"
    )
    assert text(rows(good), num_classes=3) == ("data.num_classes = 3: image_folder has 2 classes; remove the key")
    assert text(rows(good), labels="no.csv") == (
        "data.labels = no.csv: there is no such file in DIR/images or in the working directory; give a CSV file"
    )
    assert text(rows(good), name="imagenet") == "imagenet has its own labels; remove the key"
