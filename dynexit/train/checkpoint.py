"""Checkpoints of a running job: written whole, the two newest kept, a damaged one passed over.

A checkpoint is a safetensors file and, written after it, a JSON file with its SHA-256 and the facts that are no
tensors. Without its JSON file a checkpoint does not exist.
"""

import hashlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from dynexit.contents import CheckpointFacts
from dynexit.errors import Failure
from dynexit.files import regular
from dynexit.run_dir import BEGUN, read_json, save_tensors, write_json, write_text

_KEPT = 2
_MOST_SHARE = 0.01  # of the time goes into saving, also where checkpoints are large,
_MOST_WAIT = 1800.0  # unless that would leave half an hour's work unsaved


class Checkpoints:
    """The checkpoints in `directory`, one due every `seconds`, or later if they take long; with 0 after each step."""

    def __init__(self, directory: Path, seconds: float = 60.0) -> None:
        self.directory, self.seconds = directory, seconds
        self._last_saved = time.monotonic()
        self._took: deque[float] = deque(maxlen=3)  # one long save: a file system that was slow for once

    def due(self) -> bool:
        """Whether `interval` has passed since the last save, or since the start."""
        return time.monotonic() - self._last_saved >= self.interval

    @property
    def interval(self) -> float:
        """Seconds between two saves: `seconds`, and a hundred times what a save takes, up to half an hour."""
        usual = statistics.median_low(self._took) if self._took and self.seconds else 0.0
        return max(self.seconds, min(usual / _MOST_SHARE, _MOST_WAIT))

    def begin(self) -> None:
        """Marks the folder, so that the job knows it again."""
        write_text(self.directory / BEGUN, "")

    def check(self) -> None:
        """Raises Failure if the folder is missing or another one. A new one could lie below a lost mount."""
        if not (self.directory / BEGUN).exists():
            raise Failure(
                f"{self.directory} is no longer the folder that the job began in: it was moved, or its file system is "
                "gone; bring it back and run again to resume at the last checkpoint"
            )

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Writes the state after `step` steps and removes all but the two newest.

        Raises Failure on a full disk and if the folder is missing.
        """
        began = time.perf_counter()
        self.check()
        path = self.directory / f"checkpoint-{step:010d}.safetensors"
        digest = save_tensors(path, tensors)
        write_json(path.with_suffix(".json"), {"sha256": digest, "step": step, "facts": facts})
        for old in self._complete()[_KEPT:]:
            old.unlink(missing_ok=True)
            old.with_suffix(".safetensors").unlink(missing_ok=True)
        self._last_saved = time.monotonic()
        self._took.append(time.perf_counter() - began)

    def _complete(self) -> list[Path]:
        """The JSON files, newest first."""
        return sorted(self.directory.glob("checkpoint-*.json"), reverse=True)

    def whole(self, say: Callable[[str], None]) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Yields (tensors, facts) of the whole checkpoints, newest first; says which damaged ones it passed over."""
        for path in self._complete():
            weights = path.with_suffix(".safetensors")
            try:
                described = read_json(path, CheckpointFacts)
                data = regular(weights).read_bytes()
                if hashlib.sha256(data).hexdigest() != described["sha256"]:
                    raise Failure("its SHA-256 is not the one that was written")
                found = load(data), described["facts"]
            except (Failure, OSError, SafetensorError) as error:
                say(f"checkpoint {weights} is damaged ({error}); falling back to the one before")
                continue
            yield found

    def clear(self) -> None:
        """Removes every checkpoint; the job is complete."""
        litter = self.directory.glob(".checkpoint-*.tmp")  # of a killed writer
        for path in (*self.directory.glob("checkpoint-*"), *litter, self.directory / BEGUN):
            path.unlink(missing_ok=True)
