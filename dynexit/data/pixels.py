"""Opens images and converts them to RGB: the only place that does.

Conversion to RGB, 8 bits a channel:

- Alpha is dropped: a pixel keeps the colour that the file stores for it, whatever its transparency. Palettes are
  expanded likewise. CMYK is converted by Pillow's formula without a colour profile. This is what torchvision does.
- Integers of 16 bits are scaled by 65535. TIFF files of 32-bit integers do not state their range: the smallest of 8, 16
  and 31 bits that holds all values of the image is its depth. Negative integers are refused.
- Floats are scaled by 1 and must lie in [0, 1].
- EXIF rotation is ignored, as in torchvision. Of several frames the first is read.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from dynexit.errors import UserError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", *(["AVIF"] if features.check("avif") else []))
"""The formats that Pillow may read. No other is tried: PostScript, for one, would start Ghostscript."""
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
    *([".avif"] if "AVIF" in FORMATS else []),
)
"""Endings of the files that are read as images, in any case."""

# what Pillow raises for files that it cannot read
NOT_AN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_BITS_PER_SAMPLE = 258  # TIFF tag
_pillow_open = Image.open


class PixelRangeError(UserError):
    """An image whose numbers cannot be taken for intensities."""


def open_image(file: Any, mode: Any = "r", formats: Any = None) -> Image.Image:
    """Pillow's `Image.open` for FORMATS alone."""
    return _pillow_open(file, mode, [one for one in formats or FORMATS if one.upper() in FORMATS])


@contextlib.contextmanager
def accepted_formats_only() -> Iterator[None]:
    """Within it, libraries that call `Image.open` themselves open FORMATS alone."""
    before = Image.open
    Image.open = open_image  # type: ignore[assignment]
    try:
        yield
    finally:
        Image.open = before


def decode(file: Path | BinaryIO, name: str) -> Image.Image:
    """Returns the image in RGB. Raises UserError with `name` if it does not decode or has no range."""
    try:
        with open_image(file) as image:
            return to_rgb(image, name)
    except UnidentifiedImageError:
        reason = f"not one of the accepted formats {', '.join(sorted(FORMATS))}"
    except NOT_AN_IMAGE as error:
        reason = str(error)
    raise UserError(f"the image {name} does not decode ({reason}); replace it or remove it")


def decode_path(path: str) -> Image.Image:
    """Returns the image in RGB, as torchvision's loaders do. Raises UserError, naming it, if it does not decode."""
    return decode(Path(path), path)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Returns the opened image in RGB (see the top of this file). Raises PixelRangeError with `name`."""
    if image.mode == "F":
        levels = np.asarray(image)
        low, high = float(levels.min()), float(levels.max())
        if not (low >= 0 and high <= 1):  # NaN too
            raise PixelRangeError(
                f"the image {name} has floats from {low:g} to {high:g}; they must lie in [0, 1]: scale them, or save "
                "integers"
            )
        return _grey(levels * np.float32(255))
    if image.mode == "I" or image.mode.startswith("I;"):
        levels = np.asarray(image)
        if levels.min() < 0:
            raise PixelRangeError(
                f"the image {name} has integers from {levels.min()} to {levels.max()}; they must not be negative: "
                "shift them, or save unsigned integers"
            )
        return _grey(levels * (255 / (2 ** _depth(image, int(levels.max())) - 1)))
    image.info.pop("transparency", None)  # dropped in any case, and Pillow warns of some forms of it
    return image.convert("RGB")


def _grey(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(levels).astype(np.uint8)).convert("RGB")


def _depth(image: Image.Image, highest: int) -> int:
    return next(bits for bits in (8, 16, 31) if highest < 2**bits) if has_unstated_depth(image) else 16


def has_unstated_depth(image: Image.Image) -> bool:
    """Whether the opened image holds 32-bit integers, whose range no file states."""
    return image.mode == "I" and getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE) == (32,)


def is_rotated(image: Image.Image) -> bool:
    """Whether the opened image has an EXIF rotation, which is ignored."""
    return "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1
