"""The best exit configuration for every preference, budget and risk, from records alone."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`search_and_eval`, DyCE's entry; found only when asked for, as importing it brings numba."""
    if name == "search_and_eval":
        from dynexit.dyce.search import search_and_eval

        return search_and_eval
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
