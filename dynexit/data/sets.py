"""The data sets by name: what is known of each without reading it, and its three splits."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from dynexit.data.digits import load_digits, num_train_digits
from dynexit.data.fashion_mnist import check_fashion_mnist, load_fashion_mnist
from dynexit.data.folders import IMAGENET_CLASSES, checked_part, class_folders, read_folders
from dynexit.data.images import FileSource, Source, Sources, TransformedImages
from dynexit.data.inspection import class_remarks, copies_remark
from dynexit.data.sources.named import read_torchvision
from dynexit.data.sources.python import describe_own, load_own
from dynexit.data.splits import DataSets, Split, Workers, stratified_order
from dynexit.data.timm_sets import TORCH_CLASSES, read_timm
from dynexit.data.torchvision_sets import read_cifar, read_svhn
from dynexit.data.transforms import GREY, mean_and_std, num_channels, test_transform, train_transform
from dynexit.errors import UserError
from dynexit.study.data.names import OWN, TORCHVISION_SETS
from dynexit.study.schema import DataSettings


@dataclasses.dataclass(frozen=True)
class _Set:
    read: Callable[[DataSettings], Sources]
    num_classes: int | None  # None: as many as there are class folders, or as data.num_classes says


_FOLDERS_BY_TIMM = ("torch/image_folder", "torch/folder")  # would follow links and read hidden files
_SETS: Mapping[str, _Set] = MappingProxyType(
    {
        "cifar10": _Set(read_cifar, 10),
        "cifar100": _Set(read_cifar, 100),
        "cifar100_lt": _Set(read_cifar, 100),
        "svhn": _Set(read_svhn, 10),
        "imagenet": _Set(read_folders, IMAGENET_CLASSES),
        "image_folder": _Set(read_folders, None),
        **{name: _Set(read_torchvision, known.num_classes) for name, known in TORCHVISION_SETS.items()},
    }
)


def describe_data(data: DataSettings) -> tuple[int, int]:
    """(classes, channels) of the data set, without reading images: of a folder, the class folders are counted.

    Raises UserError where data.num_classes or the sizes of splits do not fit, and for transforms that it does not take.
    """
    if data.name.lower() in _FOLDERS_BY_TIMM:
        raise UserError(
            f"data.name = {data.name}: set data.name=image_folder, which reads the same folders, and checked"
        )
    if data.class_order is not None and data.name not in ("image_folder", "imagenet"):
        raise UserError(f"data.class_order = {data.class_order}: {data.name} has no class folders; remove the key")
    if data.labels is not None and data.name != "image_folder":
        raise UserError(f"data.labels = {data.labels}: {data.name} has its own labels; remove the key")
    if data.name in GREY and data.channels == 3:
        remedy = "set data.name=torch/fashion_mnist" if data.name == "fashion_mnist" else "remove the key"
        raise UserError(f"data.channels = 3: {data.name} is grey; {remedy}")
    mean_and_std(data)
    if data.name == "digits":
        _refuse_transforms(data)
        num_train_digits(data)
        return _num_classes(data, 10), 1
    if data.name == "fashion_mnist":
        check_fashion_mnist(data)
        return _num_classes(data, 10), 1
    if data.name.startswith(OWN):
        return describe_own(data)
    channels = num_channels(data)
    if data.train_transform or data.test_transform:
        train_transform(data)
        test_transform(data)
    if data.name == "image_folder":
        return _num_classes(data, len(class_folders(data))), channels
    if data.name == "imagenet":
        return data.num_classes or IMAGENET_CLASSES, channels  # parts of ImageNet are in use, as its first 100 classes
    known = TORCH_CLASSES.get(data.name.lower()) if "/" in data.name else _SETS[data.name].num_classes
    return _num_classes(data, known), channels


def _num_classes(data: DataSettings, known: int | None) -> int:
    if known is None and data.num_classes is None:
        raise UserError(f"data.num_classes is not set, and nothing else says how many classes {data.name} has; set it")
    if known is not None and data.num_classes not in (None, known):
        raise UserError(f"data.num_classes = {data.num_classes}: {data.name} has {known} classes; remove the key")
    if known is not None and known < 2:
        raise UserError(f"{data.name} in data.dir = {data.dir} has {known} class; a classifier needs two at least")
    return data.num_classes or known or 0


def _refuse_transforms(data: DataSettings) -> None:
    for name in ("transform", "train_transform", "test_transform", "normalisation"):
        if getattr(data, name):
            raise UserError(f"data.{name} = {getattr(data, name)!r}: digits come as fixed views; remove the key")


def load_data(data: DataSettings, workers: Workers | None = None, *, checked: bool = False) -> DataSets:
    """The splits of the data set that the section `data` names; their batches are loaded as `workers` say.

    Images that were `checked` before are not read again for data.check_images.
    Raises UserError, saying where it was looked for and how to get it, where the data set is missing or damaged.
    """
    workers = Workers() if workers is None else workers
    data = data.model_copy(update={"check_images": "none"}) if checked else data
    num_classes, channels = describe_data(data)
    if data.name == "digits":
        return _with_class_counts(load_digits(data, workers))
    if data.name == "fashion_mnist":
        return _with_class_counts(load_fashion_mnist(data, workers))
    if data.name.startswith(OWN):
        return _with_class_counts(load_own(data, workers))
    augment, is_random = train_transform(data)
    plain = test_transform(data)
    sources = (read_timm if "/" in data.name else _SETS[data.name].read)(data)
    rows = _held_out(data, sources)
    splits: dict[str, Split] = {}
    files: dict[str, tuple[FileSource, torch.Tensor]] = {}
    for name in ("train", "plain_train", "validation", "test"):
        source, chosen = getattr(sources, name, None) or sources.train, rows[name.removeprefix("plain_")]
        _check_labels(data, source, num_classes)
        transform, seed = (augment, data.seed) if name == "train" and is_random else (plain, None)
        if name == "plain_train" and not is_random:
            splits[name] = splits["train"]
            continue
        images = TransformedImages(source, chosen, transform, seed, cache=data.cache, image_size=data.image_size)
        splits[name] = Split(images, source.labels[chosen], chosen, workers)
        if isinstance(source, FileSource) and name != "plain_train":
            files[name] = (source, chosen)
    copies = copies_remark(files) if files and checked_part(data) != "none" else ()
    names = sources.class_names or ()
    return _with_class_counts(
        DataSets(
            **splits,
            num_classes=num_classes,
            in_channels=channels,
            image_size=data.image_size,
            class_names=names if len(names) == num_classes else tuple(map(str, range(num_classes))),
            remarks=(
                *_few_left_remark(len(rows["train"]), len(sources.train.labels)),
                *sources.remarks,
                *copies,
            ),
        )
    )


def _with_class_counts(data: DataSets) -> DataSets:
    labels = {name: data.split(name).labels for name in ("train", "validation", "test")}
    return dataclasses.replace(data, remarks=(*class_remarks(labels, data.class_names), *data.remarks))


def _held_out(data: DataSettings, sources: Sources) -> dict[str, torch.Tensor]:
    """Rows of each split in its source, in rising order. What is held out of train is drawn by data.seed, by class."""
    num_images = len(sources.train.labels)
    order = stratified_order(sources.train.labels, data.seed)
    rows, start, held = {}, 0, []
    for name, count in (("validation", data.num_validation), ("test", data.num_test)):
        source = getattr(sources, name)
        if source is not None:
            rows[name] = torch.arange(len(source.labels))
            continue
        rows[name] = order[start : start + count].sort().values
        start += count
        held.append(f"data.num_{name} = {count}")
    if start >= num_images:
        verb = "leaves" if len(held) == 1 else "leave"
        raise UserError(f"{' and '.join(held)} {verb} none of {num_images} images for training; make them smaller")
    rows["train"] = order[start:].sort().values
    return rows


def _few_left_remark(num_left: int, num_images: int) -> tuple[str, ...]:
    if 2 * num_left >= num_images:
        return ()
    return (
        f"only {num_left} of {num_images} images are left for training; make data.num_validation or data.num_test "
        "smaller",
    )


def _check_labels(data: DataSettings, source: Source, num_classes: int) -> None:
    if not len(source.labels):
        raise UserError(f"{data.name}, looked for in data.dir = {data.dir}, holds no images")
    lowest, highest = (int(label) for label in source.labels.aminmax())
    if lowest < 0 or highest >= num_classes:
        raise UserError(
            f"{data.name} has labels from {lowest} to {highest}, and its {num_classes} classes need labels from 0 to "
            f"{num_classes - 1}; correct data.num_classes or the labels"
        )
