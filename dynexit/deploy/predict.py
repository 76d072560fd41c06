"""Image files through a saved model: the study's preprocessing, class names, and files that cannot be read."""

import csv
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from dynexit.arguments import as_path, whole_number
from dynexit.data.fashion_mnist import SIDE, margins
from dynexit.data.images import Transform
from dynexit.data.pixels import EXTENSIONS, decode
from dynexit.data.transforms import GREY, test_transform
from dynexit.errors import UserError
from dynexit.files import regular, spreadsheet_text
from dynexit.study.data.names import OWN
from dynexit.study.schema import DataSettings

if TYPE_CHECKING:
    from dynexit.deploy.model import View


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for one file. `confidence` is the probability of the class, `macs` what the image cost."""

    file: str
    class_name: str
    class_index: int
    confidence: float
    exit_index: int
    macs: int


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The answers, in the order of the files, and why files could not be read."""

    rows: tuple[Prediction, ...]
    unreadable: dict[str, str]

    def write_csv(self, file: IO[str]) -> None:
        """Writes a row per answer: file, class, confidence, exit, macs."""
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "class", "confidence", "exit", "macs"])
        for row in self.rows:
            name = spreadsheet_text(row.class_name)
            writer.writerow([row.file, name, f"{row.confidence:.6f}", row.exit_index, row.macs])


def image_transform(data: DataSettings, num_channels: int) -> Transform:
    """Returns the transform of test images of a data set, from an image of Pillow in RGB to (C, H, W)."""
    if data.name.startswith(OWN) and data.normalisation is None:
        raise UserError(
            f"the model was trained on tensors that a program made ({data.name}); call it with such tensors; there "
            "is no transform for image files"
        )
    if data.name not in GREY:
        return test_transform(data)
    from torchvision import transforms

    # these images come from no files of their own; an image of one is white on black, as they are
    mean, std = GREY[data.name]
    inner = SIDE if data.name == "fashion_mnist" else data.image_size
    before, after = margins(data.image_size - inner)
    steps = [
        transforms.Grayscale(num_channels),
        transforms.Resize((inner, inner)),
        transforms.Pad([before, before, after, after]),
        transforms.ToTensor(),
        transforms.Normalize([mean] * num_channels, [std] * num_channels),
    ]
    transform: Transform = transforms.Compose(steps)
    return transform


def find_images(sources: Sequence[Path], unreadable: dict[str, str]) -> list[Path]:
    """Returns the files, and of folders all entries below them with an image's suffix, by name.

    Notes folders that cannot be read in `unreadable`. Raises UserError if there is nothing.
    """
    found: list[Path] = []

    def note(error: OSError) -> None:
        unreadable[error.filename] = f"the folder {error.filename} cannot be read: {error.strerror}"

    for source in sources:
        if os.path.isdir(source):  # Path.is_dir raises an error for some names
            inside = (Path(folder, name) for folder, _, names in os.walk(source, onerror=note) for name in names)
            found += sorted(path for path in inside if path.suffix.lower() in EXTENSIONS)
        else:
            found.append(source)
    if not found and not unreadable:
        named = ", ".join(map(str, sources)) or "no file at all"
        raise UserError(f"no image was found in {named}; give files, or folders with {' '.join(EXTENSIONS)}")
    return found


def predict_files(view: "View", sources: Iterable[str | Path] | str | Path, batch_size: int) -> Predictions:
    """See View.predict."""
    batch_size = whole_number("batch_size", batch_size)
    given = sources if isinstance(sources, Iterable) and not isinstance(sources, str) else [sources]
    paths = [as_path("an image's file", source) for source in given]
    rows: list[Prediction] = []
    unreadable: dict[str, str] = {}
    transform = view.transform
    for names, images in _batches(find_images(paths, unreadable), transform, batch_size, unreadable):
        out = view(images)
        confidence = out.probabilities.gather(1, out.prediction[:, None])[:, 0]
        columns: list[Any] = [values.tolist() for values in (out.prediction, confidence, out.exit_index, out.macs)]
        for name, index, sure, exit_index, macs in zip(names, *columns, strict=True):
            rows.append(Prediction(name, view.class_names[index], index, sure, exit_index, macs))
    return Predictions(tuple(rows), unreadable)


def _batches(
    paths: Sequence[Path], transform: Transform, batch_size: int, unreadable: dict[str, str]
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and images of readable files, up to `batch_size` at a time; notes the others in `unreadable`."""
    names: list[str] = []
    images: list[Tensor] = []
    for path in paths:
        try:
            images.append(read_image(path, transform))
            names.append(str(path))
        except UserError as mistake:
            unreadable[str(path)] = str(mistake)
        if len(images) == batch_size:
            yield names, torch.stack(images)
            names, images = [], []
    if images:
        yield names, torch.stack(images)


def read_image(file: str | Path | BinaryIO, transform: Transform) -> Tensor:
    """See View.read."""
    if not isinstance(file, str | Path) and hasattr(file, "read"):
        return transform(decode(file, getattr(file, "name", "in memory")))
    try:
        found = regular(as_path("an image's file", file))
    except (FileNotFoundError, ValueError):  # a null byte
        raise UserError(f"the image {file} does not exist") from None
    except OSError as error:
        raise UserError(f"the image {file} cannot be read: {error.strerror}") from None
    return transform(decode(found, str(file)))


def check_images(images: Tensor, input_size: tuple[int, int, int]) -> None:
    """Raises UserError unless images are a batch (B, C, H, W) of float32 and of that size, all of them finite."""
    expected = "x".join(map(str, input_size))
    if not isinstance(images, Tensor):
        raise UserError(f"images are a {type(images).__name__}; give a tensor (B, {expected.replace('x', ', ')})")
    if images.dim() != 4 or tuple(images.shape[1:]) != input_size:
        shape = "x".join(map(str, images.shape))
        raise UserError(
            f"images have the shape {shape}; this model takes Bx{expected} (batch, channels, height, width)"
        )
    if not len(images):
        raise UserError(f"the batch is empty; give at least one image of {expected}")
    if images.dtype != torch.float32:
        raise UserError(f"images are {images.dtype}; give torch.float32, normalised as the view's `transform` does")
    if not torch.isfinite(images.sum()):  # one pass; what follows is for the message
        bad = ~torch.isfinite(images).flatten(1).all(1)
        if bad.any():
            where = int(bad.nonzero()[0])
            raise UserError(f"image {where} of the batch has values that are not finite (NaN or inf); leave it out")
