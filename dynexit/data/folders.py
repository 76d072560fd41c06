"""ImageNet and other images in one folder per class."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from dynexit.data.images import NOT_AN_IMAGE, FileSource, Sources, decode
from dynexit.errors import UserError
from dynexit.study.schema import DataSettings

IMAGENET_CLASSES = 1000
_NUM_NAMED = 5  # of many faults, as many are named
_NUM_THREADS = 16


def existing_dir(data: DataSettings, what: str) -> Path:
    """`data.dir`. Raises UserError, saying `what` it should be, where it is not set or not there."""
    if data.dir is None:
        raise UserError(f"data.dir is not set; {data.name} needs it: {what}")
    root = Path(data.dir).expanduser()
    if not root.is_dir():
        raise UserError(f"data.dir = {data.dir}: there is no such folder; it should be {what}")
    return root


def class_folders(data: DataSettings) -> list[str]:
    """Names of the class folders of the training images, sorted: their order is the classes'. Reads no image.

    Raises UserError where there is none.
    """
    return _class_names(_split_folders(data)["train"])


def read_folders(data: DataSettings) -> Sources:
    """The images below `data.dir`: `train/CLASS/...`, and `val` and `test` likewise, or `CLASS/...` alone.

    With both `val` and `test` these are validation and test; one of them alone is the test, and validation is held
    out of train; without them both are. ImageNet is `train` and `val`. Raises UserError where there are no images,
    where the classes of the splits differ, and for images that `data.check_images` finds damaged.
    """
    folders = _split_folders(data)
    classes = class_folders(data)
    expected = data.num_classes or (IMAGENET_CLASSES if data.name == "imagenet" else len(classes))
    if len(classes) != expected:
        raise UserError(
            f"{folders['train']} holds {len(classes)} class folders and should hold {expected}; complete it, or set "
            f"data.num_classes={len(classes)}"
        )
    sources = {split: _read_folder(folder, classes) for split, folder in folders.items()}
    check = data.check_images or ("none" if data.name == "imagenet" else "pixels")
    if check != "none":
        damaged = [text for source in sources.values() if (text := _damaged(source, pixels=check == "pixels"))]
        if damaged:
            raise UserError("\n".join(damaged))
    return Sources(sources["train"], test=sources.get("test"), validation=sources.get("validation"))


def _split_folders(data: DataSettings) -> dict[str, Path]:
    if data.name == "imagenet":
        root = existing_dir(data, "the folder with ImageNet's train/CLASS/*.JPEG and val/CLASS/*.JPEG")
        missing = [name for name in ("train", "val") if not (root / name).is_dir()]
        if missing:
            raise UserError(
                f"imagenet was looked for in {root}: {' and '.join(missing)} missing; its owners give out ILSVRC2012, "
                "to be unpacked to train/CLASS/*.JPEG and val/CLASS/*.JPEG there"
            )
        return {"train": root / "train", "test": root / "val"}
    root = existing_dir(data, "a folder with train/CLASS/IMAGE, or with CLASS/IMAGE")
    found = [root / name for name in ("val", "test") if (root / name).is_dir()]
    if not (root / "train").is_dir():
        if found:
            raise UserError(f"data.dir = {root}: there is {found[0].name} but no train beside it")
        return {"train": root}
    names = ("validation", "test") if len(found) == 2 else ("test",)
    return {"train": root / "train", **dict(zip(names, found, strict=False))}


def _class_names(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder} holds no class folders; sort its images into one folder per class")
    return names


def _read_folder(folder: Path, classes: Sequence[str]) -> FileSource:
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    found = _class_names(folder)
    if found != list(classes):
        lacking, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
        faults = [f"lacks {_some(lacking)}"] * bool(lacking) + [f"has {_some(extra)} besides"] * bool(extra)
        raise UserError(
            f"{folder} holds {len(found)} class folders and the training images {len(classes)}: it "
            f"{' and '.join(faults)}; all splits must have the same classes"
        )
    classes_to_label = {name: label for label, name in enumerate(classes)}
    samples = make_dataset(str(folder), classes_to_label, extensions=IMG_EXTENSIONS, allow_empty=True)
    empty = [classes[label] for label in sorted(set(range(len(classes))) - {label for _, label in samples})]
    if empty:
        raise UserError(
            f"{len(empty)} of {len(classes)} class folders in {folder} hold no images ({_some(empty)}); known are "
            f"files ending in {' '.join(IMG_EXTENSIONS)}"
        )
    names = [path[len(str(folder)) + 1 :] for path, _ in samples]
    return FileSource(folder, names, [label for _, label in samples])


def _damaged(source: FileSource, *, pixels: bool) -> str:
    """Names the images whose headers (or `pixels`) cannot be read; '' where all can."""

    def fault(row: int) -> str:
        path = source.path(row)
        try:
            if pixels:
                decode(path, str(path))
            else:
                with Image.open(path):
                    pass
        except (UserError, *NOT_AN_IMAGE):
            return str(path)
        return ""

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        damaged = [path for path in pool.map(fault, range(len(source.labels)), chunksize=256) if path]
    if not damaged:
        return ""
    return (
        f"{len(damaged)} of {len(source.labels)} images in {source.folder} do not decode: {_some(damaged)}; "
        "replace them or remove them"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
