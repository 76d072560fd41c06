"""Functions that a study names: imported only from modules that whoever started the process allows."""

import contextlib
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dynexit.errors import UserError

FUNCTION = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
"""`package.module:function`."""

_allowed: set[str] = set()


def allowed_code() -> tuple[str, ...]:
    """Returns the names of the modules that may be imported now."""
    return tuple(sorted(_allowed))


@contextlib.contextmanager
def allowing_code(modules: Iterable[str]) -> Iterator[None]:
    """Allows these modules (`package.module`) to be imported, until the block is left."""
    before = set(_allowed)
    _allowed.update(modules)
    try:
        yield
    finally:
        _allowed.clear()
        _allowed.update(before)


def check_allowed(text: str, what: str = "backbone.module") -> None:
    """Raises UserError if the module of `package.module:function` is not allowed, or the text is of another form."""
    if not re.match(FUNCTION, text):
        raise UserError(f"{what} = {text!r}: should be package.module:function")
    module = text.partition(":")[0]
    if module not in _allowed:
        raise UserError(
            f"{what} = {text}: runs the code of {module}, which is not allowed; read it, then add --allow-code "
            f"{module} to the command (in Python: allow_code=[{module!r}])"
        )


def call_function(text: str, arguments: dict[str, Any], what: str = "backbone.module") -> Any:
    """Returns what the function `package.module:function` returns for the keyword arguments.

    The module is searched in the working directory and among the installed packages. Raises UserError if it is not
    allowed (see `allowing_code`), cannot be imported, has no such function, or the call fails.
    """
    check_allowed(text, what)
    module, _, name = text.partition(":")
    function = _function(module, name, what)
    try:
        return function(**arguments)
    except Exception as error:  # of whatever kind in code of somebody else
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(f"{what}: {text.partition(':')[2]}({given}) of {module} failed: {_reason(error)}") from error


def _function(module: str, name: str, what: str) -> Callable[..., Any]:
    here = os.getcwd()
    if here not in sys.path:  # as `python -m` has it
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise UserError(
                f"{what}: there is no module {module}, in {here} or among the installed packages; run the command "
                "where it is, or set PYTHONPATH"
            ) from None
        raise UserError(f"{what}: importing {module} failed: {_reason(error)}") from error
    except Exception as error:  # of whatever kind in code of somebody else
        raise UserError(f"{what}: importing {module} failed: {_reason(error)}") from error
    function = getattr(found, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [key for key, value in vars(found).items() if callable(value)], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{what}: {module} has no function {name}{hint}")
    called: Callable[..., Any] = function
    return called


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
