"""Arguments that a program gave: a check returns the value, or raises UserError with the name and the value."""

import math
import operator
import os
from numbers import Real
from pathlib import Path
from typing import Any

from dynexit.errors import UserError, shorten


def shown(value: Any) -> str:
    """Returns a value as one line of a message."""
    return shorten(" ".join(repr(value).split()))


def whole_number(name: str, value: Any) -> int:
    """Returns a count of at least 1, of any type of integers but bool."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise UserError(f"{name} is {shown(value)}; give a whole number of at least 1")
    return count


def number(name: str, value: Any) -> float:
    """Returns a number of at least 0, infinity included."""
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value) or value < 0:
        raise UserError(f"{name} is {shown(value)}; give a number of at least 0")
    return float(value)


def as_path(name: str, value: Any) -> Path:
    """Returns a path; an empty text is none."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise UserError(f"{name} is {shown(value)}; give a path, as text or pathlib.Path")
    return Path(value)
