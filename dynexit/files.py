"""Opening files that a user or an earlier run left: regular ones of a bounded size, so that no read waits."""

import errno
import stat
from pathlib import Path
from typing import Any

from dynexit.errors import UserError

MOST_TEXT_BYTES = 256 << 20
"""The largest file that is read as text or JSON."""


def regular(path: Path, most_bytes: int | None = None) -> Path:
    """Returns `path` if it is a regular file, or a link to one, of at most `most_bytes`.

    Raises OSError, naming it, for a folder, a pipe, a device or a larger file; FileNotFoundError for a missing one.
    Opening a pipe would wait for ever.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a regular file", str(path))
    if most_bytes is not None and found.st_size > most_bytes:
        raise OSError(errno.EFBIG, f"has {found.st_size} bytes; at most {most_bytes} are read", str(path))
    return path


def read_text(path: Path) -> str:
    """Returns the text of a regular file of UTF-8. Raises OSError as `regular`, UnicodeDecodeError for other bytes."""
    return regular(path, MOST_TEXT_BYTES).read_text(encoding="utf-8")


def spreadsheet_text(value: Any) -> Any:
    """Returns the value of a CSV cell; text that a spreadsheet would run as a formula gets an apostrophe in front.

    Numbers, and text that reads as one, stay as they are.
    """
    if not isinstance(value, str) or value[:1] not in ("=", "+", "-", "@", "\t", "\r"):
        return value
    try:
        float(value)
    except ValueError:
        return "'" + value
    return value


def check_weights_file(path: Path) -> None:
    """Raises UserError if the weights file is missing."""
    if not path.is_file():
        fault = "is no file" if path.exists() else "does not exist"
        raise UserError(
            f"weights file {str(path)!r} {fault}: give the path of a .safetensors or .pth file, or 'pretrained'"
        )
