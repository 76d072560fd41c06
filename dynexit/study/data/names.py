"""Data sets by name: torchvision's in one table, spellings, and the files that each needs. Imports no torch."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from dynexit.errors import UserError

DATA_SETS = ("digits", "fashion_mnist", "cifar10", "cifar100", "cifar100_lt", "svhn", "imagenet", "image_folder")
TIMM_DATA_SETS = ("torch", "hfds", "hfids", "tfds", "wds")  # before the slash of a name that timm knows
OWN = "own/"
"""Begins the name of a data set that a Python program passes to `dynexit.load_study`."""
PACKAGE = "dataset-fashion-mnist"
PACKAGE_DIR = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files
_FASHION_MNIST_BELOW = (".", "FashionMNIST/raw", "raw")  # of data.dir; the second is torchvision's


@dataclasses.dataclass(frozen=True)
class TorchvisionSet:
    """A class of torchvision.datasets. `splits` map train, validation and test to its arguments, as far as it has them.

    `kind` chooses the default transforms: symbols are never flipped, photos are larger than 96 pixels.
    """

    class_name: str
    num_classes: int
    files: tuple[str, ...]  # expected below data.dir
    splits: Mapping[str, Mapping[str, Any]]
    kind: Literal["symbols", "small", "photos"] = "photos"
    channels: int = 3


def _idx(folder: str, prefix: str = "", test: str = "t10k") -> tuple[str, ...]:
    names = (f"{split}-{kind}" for split in ("train", test) for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    return tuple(f"{folder}/raw/{prefix}{name}" for name in names)


def _splits(train: str = "train", validation: str | None = None, test: str | None = "test") -> dict[str, Any]:
    named = {"train": train, "validation": validation, "test": test}
    return {split: {"split": name} for split, name in named.items() if name is not None}


_IS_TRAIN = {"train": {"train": True}, "test": {"train": False}}
_GREY: dict[str, Any] = {"kind": "symbols", "channels": 1}
_WITH_VAL = _splits(validation="val")


def _emnist(kind: str, num_classes: int) -> TorchvisionSet:
    splits = {split: {"split": kind, **arguments} for split, arguments in _IS_TRAIN.items()}
    return TorchvisionSet("EMNIST", num_classes, _idx("EMNIST", f"emnist-{kind}-", "test"), splits, **_GREY)


TORCHVISION_SETS: Mapping[str, TorchvisionSet] = MappingProxyType(
    {
        "mnist": TorchvisionSet("MNIST", 10, _idx("MNIST"), _IS_TRAIN, **_GREY),
        "kmnist": TorchvisionSet("KMNIST", 10, _idx("KMNIST"), _IS_TRAIN, **_GREY),
        "qmnist": TorchvisionSet(
            "QMNIST",
            10,
            tuple(
                f"QMNIST/raw/qmnist-{split}-{kind}"
                for split in ("train", "test")
                for kind in ("images-idx3-ubyte", "labels-idx2-int")
            ),
            _IS_TRAIN,
            **_GREY,
        ),
        "emnist": _emnist("balanced", 47),
        "emnist_digits": _emnist("digits", 10),
        "emnist_byclass": _emnist("byclass", 62),
        "usps": TorchvisionSet("USPS", 10, ("usps.bz2", "usps.t.bz2"), _IS_TRAIN, **_GREY),
        "semeion": TorchvisionSet("SEMEION", 10, ("semeion.data",), {"train": {}}, **_GREY),
        "gtsrb": TorchvisionSet("GTSRB", 43, ("gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test"), _splits(), "symbols"),
        "stl10": TorchvisionSet(
            "STL10",
            10,
            tuple(f"stl10_binary/{name}.bin" for name in ("train_X", "train_y", "test_X", "test_y")),
            _splits(),
            "small",
        ),
        "eurosat": TorchvisionSet("EuroSAT", 10, ("eurosat/2750",), {"train": {}}, "small"),
        "flowers102": TorchvisionSet(
            "Flowers102",
            102,
            ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
            _WITH_VAL,
        ),
        "food101": TorchvisionSet("Food101", 101, ("food-101/images", "food-101/meta"), _splits()),
        "oxford_iiit_pet": TorchvisionSet(
            "OxfordIIITPet", 37, ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"), _splits("trainval")
        ),
        "dtd": TorchvisionSet("DTD", 47, ("dtd/dtd/images", "dtd/dtd/labels"), _WITH_VAL),
        "fgvc_aircraft": TorchvisionSet("FGVCAircraft", 100, ("fgvc-aircraft-2013b/data",), _WITH_VAL),
        "stanford_cars": TorchvisionSet(
            "StanfordCars",
            196,
            tuple(
                f"stanford_cars/{n}" for n in ("devkit", "cars_train", "cars_test", "cars_test_annos_withlabels.mat")
            ),
            _splits(),
        ),
        "country211": TorchvisionSet("Country211", 211, ("country211/train",), _splits(validation="valid")),
        "imagenette": TorchvisionSet("Imagenette", 10, ("imagenette2",), _splits(test="val")),
    }
)
_OF_TIMM = ("cifar10", "cifar100", "mnist", "kmnist", "qmnist", "fashion_mnist", "places365", "imagenet")
_ALSO_OF_TIMM = ("inaturalist", "inat", "image_folder", "folder")
_FILES_OF_TIMM = {
    **{f"torch/{name}": TORCHVISION_SETS[name].files for name in ("mnist", "kmnist", "qmnist")},
    "torch/fashion_mnist": _idx("FashionMNIST"),
    "torch/cifar10": ("cifar-10-batches-py",),
    "torch/cifar100": ("cifar-100-python",),
}


def data_set_name(name: str) -> str:
    """Returns the name as ids and files have it: `FashionMNIST` and `fashion-mnist` are fashion_mnist.

    Raises ValueError if there is no such data set.
    """
    kind, slash, rest = name.partition("/")
    if not slash:
        return _known(name)
    if f"{kind}/" == OWN and rest:
        return name
    if not rest or kind not in TIMM_DATA_SETS:
        return _known(name)
    if kind == "torch" and rest.lower() not in (*_OF_TIMM, *_ALSO_OF_TIMM):
        of_timm = _spellings(_OF_TIMM).get(_plain(rest))
        return f"torch/{of_timm}" if of_timm else _spellings(TORCHVISION_SETS).get(_plain(rest), name)
    return name


def _known(name: str) -> str:
    known = (*DATA_SETS, *TORCHVISION_SETS)
    found = _spellings(known).get(_plain(name))
    if found is None:
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        of_timm = ", ".join(f"{kind}/NAME" for kind in TIMM_DATA_SETS)
        raise ValueError(f"no data set of this name; {hint}known are {', '.join(known)}, and of timm {of_timm}")
    return found


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _spellings(names: Iterable[str]) -> dict[str, str]:
    return {_plain(name): name for name in names}


def check_files(name: str, directory: str | None, *, download: bool, is_here: bool) -> None:
    """Raises UserError if data.dir is needed and not set, or if this machine needs the files and they are missing."""
    if name == "digits" or name.startswith(OWN):
        return
    if name == "fashion_mnist":
        if is_here:
            find_fashion_mnist(directory)
        return
    known = TORCHVISION_SETS.get(name)
    files = known.files if known else _FILES_OF_TIMM.get(name.lower(), ())
    if not files and name not in DATA_SETS and not name.startswith("torch/"):
        return  # Hugging Face's and TensorFlow's have places of their own
    what = f"the folder with {', '.join(files)}" if files else f"the folder with the files of {name}"
    if directory is None:
        raise UserError(f"data.dir is not set; {name} needs it: {what}")
    root = Path(directory).expanduser()
    if not is_here or download:
        return
    if not root.is_dir():
        raise UserError(f"data.dir = {directory}: there is no such folder; it should be {what}")
    missing = [file for file in files if not (root / file).exists()]
    if missing:
        raise UserError(
            f"{name} was looked for in data.dir = {directory}: {', '.join(missing)} missing; give the folder that "
            "holds them, or set data.download=true if they may be fetched"
        )


def find_fashion_mnist(directory: str | None) -> Path:
    """Returns the folder with the idx files. Raises UserError that says where they were looked for."""
    root = PACKAGE_DIR if directory is None else Path(directory).expanduser()
    for below in _FASHION_MNIST_BELOW:
        if any((root / below).glob("train-images-idx3-ubyte*")):
            return root / below
    raise UserError(
        f"fashion_mnist was looked for in {root}: train-images-idx3-ubyte.gz is missing; install Debian's package "
        f"{PACKAGE}, or set data.dir to the folder with the four idx files"
    )
