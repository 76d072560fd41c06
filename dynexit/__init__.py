"""Frozen image classifiers turned into families of early-exit networks.

The names of the public Python API are here; each is imported when it is first used (docs/api.md).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynexit.core.cost import ExitCosts as ExitCosts
    from dynexit.core.tradeoff import Configuration as Configuration
    from dynexit.core.tradeoff import OperatingPoint as OperatingPoint
    from dynexit.deploy.engine import Engine as Engine
    from dynexit.deploy.model import EarlyExitModel as EarlyExitModel
    from dynexit.deploy.model import load as load
    from dynexit.errors import Failure as Failure
    from dynexit.errors import UserError as UserError
    from dynexit.export.folder import export_model as export_model
    from dynexit.models.backbones import build_backbone as build_backbone
    from dynexit.models.cut.cutting import cut as cut
    from dynexit.models.multi_exit import MultiExit as MultiExit
    from dynexit.record.shards import Record as Record
    from dynexit.search.budgets import Budget as Budget
    from dynexit.search.driver import search_record as search_record
    from launch.api import load_study as load_study

    __version__: str

_MODULES = {
    "Budget": "dynexit.search.budgets",
    "Configuration": "dynexit.core.tradeoff",
    "EarlyExitModel": "dynexit.deploy.model",
    "Engine": "dynexit.deploy.engine",
    "ExitCosts": "dynexit.core.cost",
    "Failure": "dynexit.errors",
    "MultiExit": "dynexit.models.multi_exit",
    "OperatingPoint": "dynexit.core.tradeoff",
    "Record": "dynexit.record.shards",
    "UserError": "dynexit.errors",
    "build_backbone": "dynexit.models.backbones",
    "cut": "dynexit.models.cut.cutting",
    "export_model": "dynexit.export.folder",
    "load": "dynexit.deploy.model",
    "load_study": "launch.api",
    "search_record": "dynexit.search.driver",
}
"""By public name the module that defines it."""

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from dynexit.version import installed_version

        value: Any = installed_version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
