"""Any other data set that timm's `create_dataset` takes: torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME, wds/NAME."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dynexit.data.images import Sources
from dynexit.data.pixels import NOT_AN_IMAGE, accepted_formats_only, decode, decode_path, to_rgb
from dynexit.errors import UserError
from dynexit.study.data.names import check_files
from dynexit.study.schema import DataSettings

TORCH_CLASSES = dict.fromkeys(
    ("torch/cifar10", "torch/mnist", "torch/qmnist", "torch/kmnist", "torch/fashion_mnist"), 10
)
TORCH_CLASSES |= {"torch/cifar100": 100, "torch/places365": 365, "torch/imagenet": 1000, "torch/inaturalist": 10000}


def read_timm(data: DataSettings) -> Sources:
    """The data set's splits `data.train_split` and `data.test_split`, where null is held out of the first.

    hfids, tfds and wds stream, and a sample needs an index: they are read once, into memory, and by a single rank only.
    """
    train = _read_split(data, data.train_split)
    test = None if data.test_split is None else _read_split(data, data.test_split)
    return Sources(train, test, class_names=train.class_names)


def _read_split(data: DataSettings, split: str) -> "Indexed | _Streamed":
    from timm.data.dataset import IterableImageDataset
    from timm.data.dataset_factory import create_dataset

    # timm would clip 16-bit images; `to_rgb` converts them. Tensorflow's images have 8 bits, and timm needs their mode.
    mode = "RGB" if data.name.startswith("tfds/") else ""
    check_files(data.name, data.dir, download=data.download, is_here=True)
    root = None if data.dir is None else str(Path(data.dir).expanduser())
    try:
        with _offline(data.download):
            dataset = create_dataset(data.name, root=root, split=split, download=data.download, input_img_mode=mode)
    except Exception as error:  # what the libraries behind timm raise is of no one class
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{data.name}, split {split}, was looked for in data.dir = {data.dir} and could not be opened ({text}); "
            "fix that, or set data.download=true if it may be fetched"
        ) from None
    if isinstance(dataset, IterableImageDataset):
        return _Streamed(dataset, f"{data.name}, split {split}")
    return Indexed(dataset, f"{data.name}, split {split}")


class Indexed:
    """A data set of timm's, or of torchvision's, that is asked by index."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name, self.class_names = dataset, name, _class_names(dataset)
        if hasattr(dataset, "loader"):  # torchvision's own would clip 16-bit images
            dataset.loader = decode_path
        labels = torch.as_tensor(_labels(dataset), dtype=torch.int64)
        self.labels = labels[:, 0] if labels.dim() == 2 else labels  # QMNIST's first column is the class

    def image(self, row: int) -> Image.Image:
        name = f"{row} of {self.name}"
        if hasattr(self.dataset, "reader"):  # timm's own __getitem__ would take the next image for one that is damaged
            return decode(self.dataset.reader[row][0], name)
        try:
            with accepted_formats_only():
                return to_rgb(self.dataset[row][0], name)
        except NOT_AN_IMAGE as error:
            raise UserError(f"the image {name} does not decode ({error}); replace it or remove it") from None

    def file_name(self, row: int) -> str | None:
        files = getattr(self.dataset, "imgs", None)  # of torchvision's sets in folders: (path, label)
        return None if files is None else str(files[row][0])


def _labels(dataset: Any) -> Any:
    reader = getattr(dataset, "reader", dataset)
    if hasattr(reader, "iter_targets"):
        return list(reader.iter_targets())
    for name in ("targets", "_labels", "labels", "y"):  # torchvision's data sets store them under one of these
        if reader is dataset and hasattr(dataset, name):
            return getattr(dataset, name)
    if hasattr(dataset, "_samples"):
        return [label for _, label in dataset._samples]
    with accepted_formats_only():
        return [dataset[row][1] for row in range(len(dataset))]  # decodes every image once: nothing else is offered


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    """The names of the classes by label, None if the data set has none."""
    reader = getattr(dataset, "reader", dataset)
    names = getattr(reader, "classes", None)
    if names is None:
        label_of = getattr(reader, "class_to_idx", None) or {}
        names = sorted(label_of, key=label_of.__getitem__)
        if [label_of[name] for name in names] != list(range(len(names))):
            return None
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names) or None


class _Streamed:
    """A data set that can only be read from its beginning to its end."""

    def __init__(self, dataset: Any, name: str) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UserError(
                f"{name} streams, and every rank would see another part of it; run it in one process, or make a folder "
                "of images of it (data.name=image_folder)"
            )
        self.class_names = _class_names(dataset)
        self._pixels: list[np.ndarray] = []
        labels: list[int] = []
        try:
            with accepted_formats_only():
                for image, label in dataset:
                    self._pixels.append(np.asarray(to_rgb(image, f"{len(labels)} of {name}")))
                    labels.append(int(label))
        except NOT_AN_IMAGE as error:
            raise UserError(f"the image {len(labels)} of {name} does not decode ({error}); replace it") from None
        expected = getattr(dataset.reader, "num_samples", 0) or len(labels)
        if len(labels) != expected:
            raise UserError(
                f"{name} gave {len(labels)} images of {expected}: timm drops what does not decode; replace those images"
            )
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def image(self, row: int) -> Image.Image:
        return Image.fromarray(self._pixels[row])

    def file_name(self, row: int) -> None:
        return None


@contextlib.contextmanager
def _offline(download: bool) -> Iterator[None]:
    """Keeps Hugging Face's libraries, which fetch what is missing, off the network unless `download`."""
    settings = []
    for name in () if download else ("huggingface_hub.constants", "datasets.config"):
        with contextlib.suppress(ImportError):
            settings.append(importlib.import_module(name))
    before = [module.HF_HUB_OFFLINE for module in settings]
    for module in settings:
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
