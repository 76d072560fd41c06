"""What a way to leave early has seen, against what validation gave: a growing difference is drift.

Shapes: B images, L exits.
"""

import dataclasses
import threading

import numpy as np

from dynexit.deploy.description import SavedPoint


@dataclasses.dataclass(frozen=True)
class ExitStatistics:
    """What an operating point has seen since the model was loaded, and what validation gave.

    `num_near` counts the images that a last bit could have sent to another exit (see Outputs.near).
    `drift` is half the sum of the differences of the exit shares, in [0, 1]. Fields that begin with `validation` and
    `drift` are None for a configuration that is no operating point of the folder; means are None before any image.
    """

    name: str
    num_images: int
    num_near: int
    exit_fractions: tuple[float, ...] | None
    mean_confidence: float | None
    validation_exit_fractions: tuple[float, ...] | None
    validation_mean_confidence: float | None
    drift: float | None


class ExitCounter:
    """Counts the exits taken and sums confidences; threads may add at the same time."""

    def __init__(self, name: str, point: SavedPoint | None, num_exits: int) -> None:
        self.name, self.point = name, point
        self._counts_L, self._confidence, self._num_near = np.zeros(num_exits, np.int64), 0.0, 0
        self._lock = threading.Lock()

    def add(self, exit_index_B: np.ndarray, confidence_B: np.ndarray, near_B: np.ndarray) -> None:
        counts_L, confidence = np.bincount(exit_index_B, minlength=len(self._counts_L)), float(confidence_B.sum())
        with self._lock:
            self._counts_L += counts_L
            self._confidence += confidence
            self._num_near += int(near_B.sum())

    def statistics(self) -> ExitStatistics:
        with self._lock:
            counts_L, confidence, num_near = self._counts_L.copy(), self._confidence, self._num_near
        count, point = int(counts_L.sum()), self.point
        seen_L = counts_L / count if count else None
        drift = None
        if seen_L is not None and point is not None:
            drift = float(np.abs(seen_L - np.array(point.exit_fractions)).sum() / 2)
        return ExitStatistics(
            self.name,
            count,
            num_near,
            None if seen_L is None else tuple(seen_L.tolist()),
            confidence / count if count else None,
            None if point is None else point.exit_fractions,
            None if point is None else point.validation.mean_confidence,
            drift,
        )


class ExitCounters:
    """The counters of a model, one for every name of a way to leave; threads may share them."""

    def __init__(self) -> None:
        self._counters: dict[str, ExitCounter] = {}
        self._lock = threading.Lock()

    def of(self, name: str, point: SavedPoint | None, num_exits: int) -> ExitCounter:
        """Returns the counter of that name, a new one at first."""
        with self._lock:
            return self._counters.setdefault(name, ExitCounter(name, point, num_exits))

    def statistics(self) -> tuple[ExitStatistics, ...]:
        """Returns what those that have seen images have seen, in the order of their first use."""
        with self._lock:
            counters = list(self._counters.values())
        return tuple(seen for seen in (counter.statistics() for counter in counters) if seen.num_images)
