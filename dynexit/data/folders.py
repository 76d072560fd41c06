"""ImageNet and other images in one folder per class."""

import collections
from collections.abc import Sequence
from pathlib import Path

from dynexit.data.file_tree import read_tree, remarks_of, some
from dynexit.data.images import FileSource, Sources
from dynexit.data.inspection import inspect_images
from dynexit.data.pixels import EXTENSIONS
from dynexit.data.sources.labels import are_numbers, check_labelled_files, read_labels
from dynexit.data.sources.listings import visible_folders
from dynexit.errors import UserError
from dynexit.files import read_text
from dynexit.study.schema import DataSettings

IMAGENET_CLASSES = 1000
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The split of each folder name, in lower case. A folder with such a name is never a class."""
CLASS_ORDERS = ("torchvision", "timm")


def existing_dir(data: DataSettings, what: str) -> Path:
    """`data.dir`. Raises UserError, saying `what` it should be, where it is not set or not there."""
    if data.dir is None:
        raise UserError(f"data.dir is not set; {data.name} needs it: {what}")
    root = Path(data.dir).expanduser()
    if not root.is_dir():
        raise UserError(f"data.dir = {data.dir}: there is no such folder; it should be {what}")
    return root


def class_folders(data: DataSettings) -> list[str]:
    """Names of the class folders of the training images in the order of their labels. Reads no image.

    The order is `data.class_order`; null takes torchvision's. Raises UserError if there is none, or if the order does
    not fit.
    """
    if data.labels is not None:
        return _labelled_classes(data)
    return _ordered(data, _class_names(_split_folders(data)[0]["train"]))


def _labels(data: DataSettings) -> dict[str, dict[str, str]]:
    assert data.labels is not None
    return read_labels(data.labels, existing_dir(data, "the folder with the images"), SPLIT_NAMES)


def _labelled_classes(data: DataSettings) -> list[str]:
    """The names of data.labels in their order. Whole numbers are indices of classes, unless data.class_order is set."""
    labels = _labels(data)
    names = {label for split in labels.values() for label in split.values()}
    if data.class_order is not None or not are_numbers(labels):
        return _ordered(data, sorted(names))
    highest = max(map(int, names))
    if data.num_classes is not None and highest >= data.num_classes:
        raise UserError(
            f"data.labels = {data.labels}: has the label {highest}, and data.num_classes = {data.num_classes} allows 0 "
            f"to {data.num_classes - 1}; correct one of them"
        )
    return [str(i) for i in range(data.num_classes or highest + 1)]


def check_class_order(data: DataSettings) -> None:
    """Raises UserError if a trained classifier's order of the classes cannot be known: libraries sort them differently.

    torchvision sorts the folders as strings (1, 10, 2), timm naturally and without regard to case (1, 2, 10).
    """
    is_known = data.name not in ("image_folder", "imagenet") or data.class_order is not None
    if is_known or data.dir is None or not Path(data.dir).expanduser().is_dir():  # the job's node may have the folder
        return
    if data.labels is not None and are_numbers(_labels(data)):
        return
    names = _labelled_classes(data) if data.labels is not None else _class_names(_split_folders(data)[0]["train"])
    pairs = zip(_sorted_by(names, "torchvision"), _sorted_by(names, "timm"), strict=True)
    differing = next(((i, ours, theirs) for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if differing:
        label, ours, theirs = differing
        raise UserError(
            f"data.class_order is not set, and class {label} of {data.dir} is {ours!r} in torchvision's order and "
            f"{theirs!r} in timm's; set data.class_order to torchvision, timm, or a file with one name per line, as "
            "the weights need it"
        )


def _sorted_by(names: Sequence[str], order: str) -> list[str]:
    if order == "torchvision":
        return sorted(names)
    from timm.utils.misc import natural_key

    return sorted(sorted(names), key=natural_key)


def _ordered(data: DataSettings, names: Sequence[str]) -> list[str]:
    order = data.class_order or "torchvision"
    if order in CLASS_ORDERS:
        return _sorted_by(names, order)
    try:
        lines = read_text(Path(order).expanduser()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.class_order = {order}: cannot be read ({error}); it should be torchvision, timm, or a text file "
            "with one class name per line"
        ) from None
    listed = [line.strip() for line in lines if line.strip()]
    twice = [name for name, count in collections.Counter(listed).items() if count > 1]
    if twice:
        raise UserError(f"data.class_order = {order}: {some(twice)} duplicated; give each class one line")
    fault = _difference(set(listed), set(names))
    if fault:
        raise UserError(f"data.class_order = {order}: {fault}; name each class folder of the training images once")
    return listed


def read_folders(data: DataSettings) -> Sources:
    """The images below `data.dir`: `train/CLASS/...`, and `val` and `test` likewise, or `CLASS/...` alone.

    Splits may have any name of SPLIT_NAMES, in any case. With both `val` and `test` these are validation and test; one
    of them alone is the test, and validation is held out of train; without them both are. ImageNet is `train` and
    `val`. Raises UserError if there are no images, if the classes of the splits differ, and for images that
    `data.check_images` finds damaged.
    """
    if data.labels is not None:
        return _read_labelled(data)
    folders, remarks = _split_folders(data)
    classes = class_folders(data)
    expected = data.num_classes or (IMAGENET_CLASSES if data.name == "imagenet" else len(classes))
    if len(classes) != expected:
        raise UserError(
            f"{folders['train']} holds {len(classes)} class folders and should hold {expected}; complete it, or set "
            f"data.num_classes={len(classes)}"
        )
    sources = {}
    for split, folder in folders.items():
        sources[split], found = _read_folder(existing_dir(data, ""), folder, classes)
        remarks += found
    check = checked_part(data)
    if check != "none":
        remarks += inspect_images(list(sources.values()), pixels=check == "pixels")
    return Sources(
        sources["train"],
        test=sources.get("test"),
        validation=sources.get("validation"),
        class_names=tuple(classes),
        remarks=tuple(remarks),
    )


def _read_labelled(data: DataSettings) -> Sources:
    assert data.labels is not None
    root, labels, classes = existing_dir(data, ""), _labels(data), class_folders(data)
    check_labelled_files(data.labels, root, labels)
    label_of = {name: label for label, name in enumerate(classes)}
    if are_numbers(labels) and data.class_order is None:  # 07 is 7
        label_of = {name: int(name) for split in labels.values() for name in split.values()}
    sources = {
        split: FileSource(root, root, list(files), [label_of[label] for label in files.values()])
        for split, files in labels.items()
    }
    check = checked_part(data)
    remarks = inspect_images(list(sources.values()), pixels=check == "pixels") if check != "none" else []
    return Sources(
        sources["train"], sources.get("test"), sources.get("validation"), tuple(classes), remarks=tuple(remarks)
    )


def checked_part(data: DataSettings) -> str:
    """What `data.check_images` asks to read of every image: none, headers or pixels."""
    return data.check_images or ("none" if data.name == "imagenet" else "headers")


def _split_folders(data: DataSettings) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split, and remarks on the folders next to them that are not used."""
    is_imagenet = data.name == "imagenet"
    root = existing_dir(
        data,
        "the folder with ImageNet's train/CLASS/*.JPEG and val/CLASS/*.JPEG"
        if is_imagenet
        else "a folder with train/CLASS/IMAGE, or with CLASS/IMAGE",
    )
    found: dict[str, str] = {}
    unused = []
    for name in visible_folders(root):
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            unused.append(name)
        elif split in found:
            raise UserError(
                f"data.dir = {root}: {found[split]} and {name} both name the {split} split; keep one of them there"
            )
        else:
            found[split] = name
    if is_imagenet:
        missing = [name for name, split in (("train", "train"), ("val", "validation")) if split not in found]
        if missing:
            raise UserError(
                f"imagenet was looked for in {root}: {' and '.join(missing)} missing; its owners give out ILSVRC2012, "
                "to be unpacked to train/CLASS/*.JPEG and val/CLASS/*.JPEG there"
            )
        unused += [found[split] for split in found if split == "test"]
        folders = {"train": root / found["train"], "test": root / found["validation"]}
    elif "train" not in found:
        if found:
            raise UserError(f"data.dir = {root}: there is {next(iter(found.values()))} but no train folder next to it")
        return {"train": root}, []
    else:
        others = [root / found[split] for split in ("validation", "test") if split in found]
        names = ("validation", "test")[-len(others) :]
        folders = {"train": root / found["train"], **dict(zip(names, others, strict=False))}
    remarks = [f"{root}: not used: {some(unused)}; used are {', '.join(path.name for path in folders.values())}"]
    return folders, remarks * bool(unused)


def _class_names(folder: Path) -> list[str]:
    names = visible_folders(folder)
    if not names:
        raise UserError(f"{folder} holds no class folders; sort its images into one folder per class")
    splits = [name for name in names if name.lower() in SPLIT_NAMES]
    if splits:
        raise UserError(
            f"{folder} holds {some(splits)} among its class folders, and the name of a split is never a class; move "
            "train, val and test directly into data.dir, or rename the class"
        )
    return names


def _difference(found: set[str], expected: set[str]) -> str:
    faults = [f"lacks {some(sorted(expected - found))}"] * bool(expected - found)
    faults += [f"also has {some(sorted(found - expected))}"] * bool(found - expected)
    return " and ".join(faults)


def _read_folder(root: Path, folder: Path, classes: Sequence[str]) -> tuple[FileSource, list[str]]:
    """The images of one split, and remarks on what was skipped."""
    found = _class_names(folder)
    fault = _difference(set(found), set(classes))
    if fault:
        raise UserError(
            f"{folder} holds {len(found)} class folders and the training images {len(classes)}: it {fault}; all splits "
            "must have the same classes"
        )
    tree = read_tree(folder, classes)
    label_of = {name: label for label, name in enumerate(classes)}
    empty = sorted(label_of.keys() - set(tree.class_names), key=label_of.__getitem__)
    if empty:
        raise UserError(
            f"{len(empty)} of {len(classes)} class folders in {folder} hold no images ({some(empty)}); known are "
            f"files ending in {' '.join(EXTENSIONS)}"
        )
    source = FileSource(root, folder, tree.names, [label_of[name] for name in tree.class_names])
    return source, list(remarks_of(folder, tree))
