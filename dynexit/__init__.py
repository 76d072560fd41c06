"""Frozen image classifiers turned into families of early-exit networks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynexit.deploy.model import load as load


def __getattr__(name: str) -> Any:
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dynexit.deploy.model import load

    return load
