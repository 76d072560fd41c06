"""Frozen image classifiers turned into families of early-exit networks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynexit.core.tradeoff import Configuration as Configuration
    from dynexit.deploy.model import load as load
    from dynexit.errors import Failure as Failure
    from dynexit.errors import UserError as UserError

_MODULES = {
    "Configuration": "dynexit.core.tradeoff",
    "Failure": "dynexit.errors",
    "UserError": "dynexit.errors",
    "load": "dynexit.deploy.model",
}
"""By public name the module that defines it; imported when it is first used."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
