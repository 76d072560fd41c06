"""Functions compiled to machine code by numba."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any], *, fastmath: set[str] | bool = False) -> Callable[..., Any]:
    """The function compiled at its first call, and kept on disk for the next process where there is a place for it.

    `fastmath` are LLVM's permissions to compute other than written, as numba takes them.
    """
    try:
        return numba.njit(nogil=True, cache=True, fastmath=fastmath)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True, fastmath=fastmath)(function)
