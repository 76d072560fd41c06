"""What every exit said of every sample: recorded once, read by everything that follows."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`OutputRecorder`, DyCE's recorder; found only when asked for, as importing it brings torch."""
    if name == "OutputRecorder":
        from dynexit.dyce.npz import OutputRecorder

        return OutputRecorder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
