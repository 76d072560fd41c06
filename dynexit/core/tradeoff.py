"""Accuracy against compute: exit configurations on recorded outputs, operating points, Pareto fronts.

Shapes: P positions, H head types, L exits, N samples. numpy throughout: this is arithmetic on records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dynexit.core.cost import ExitCosts

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.floating]
IntArray = NDArray[np.int64]

_MAX_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class OperatingPoint:
    """What one way of leaving early gives on one set of samples."""

    accuracy: float
    """Fraction correct, in [0, 1]."""
    macs: float
    """Mean multiply-accumulates per sample."""
    relative_macs: float
    """macs over those of the bare backbone; above 1 where exits cost more than they save."""
    exit_fractions: tuple[float, ...]
    """(L,) share of the samples leaving at each exit, sum 1."""
    num_samples: int


def operating_point(exit_index_N: IntArray, correct_LN: BoolArray, macs_L: IntArray, full_macs: int) -> OperatingPoint:
    """The operating point of samples leaving at exit_index_N, each in 0..L-1.

    correct_LN: whether each exit is right on each sample; macs_L: integer MACs of leaving at each exit; full_macs: the
    bare backbone's. Sums are exact integers, divided once. Raises ValueError on no samples or an exit out of range.
    """
    num_exits, num_samples = correct_LN.shape
    if exit_index_N.shape != (num_samples,) or len(macs_L) != num_exits:
        raise ValueError(
            f"exit_index_N {exit_index_N.shape} and macs_L ({len(macs_L)},) do not fit correct_LN {correct_LN.shape}"
        )
    if num_samples == 0:
        raise ValueError("an operating point needs at least one sample")
    if exit_index_N.min() < 0 or exit_index_N.max() >= num_exits:
        raise ValueError(f"exit_index_N must lie in 0..{num_exits - 1}, got {exit_index_N.min()}..{exit_index_N.max()}")
    counts = [int(count) for count in np.bincount(exit_index_N, minlength=num_exits)]
    num_correct = int(correct_LN[exit_index_N, np.arange(num_samples)].sum())
    # Python integers: the sum over a large set may pass 2^63
    total_macs = sum(count * int(macs) for count, macs in zip(counts, macs_L, strict=True))
    return OperatingPoint(
        accuracy=num_correct / num_samples,
        macs=total_macs / num_samples,
        relative_macs=total_macs / (num_samples * full_macs),
        exit_fractions=tuple(count / num_samples for count in counts),
        num_samples=num_samples,
    )


@dataclass(frozen=True)
class Configuration:
    """Which exits are enabled, with which head and threshold: per position (head type index or -1, threshold).

    -1 is no exit. Thresholds are compared in float32 and are rounded to it. Raises ValueError for one that is not
    finite in float32, for another head type and for entries that are not such pairs.
    """

    exits: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        try:
            pairs = [(head_type, threshold) for head_type, threshold in self.exits]
        except (TypeError, ValueError):
            raise ValueError("a configuration is a list of [head type, threshold] pairs") from None
        for head_type, threshold in pairs:
            if type(head_type) is not int or head_type < -1:
                raise ValueError(f"a head type is an index, or -1 for no exit, got {head_type!r}")
            if not (isinstance(threshold, Real) and abs(threshold) <= _MAX_FLOAT32):
                raise ValueError(f"a threshold is a finite number in float32, got {threshold!r}")
        rounded = tuple((head_type, float(np.float32(threshold))) for head_type, threshold in pairs)
        object.__setattr__(self, "exits", rounded)

    def to_json(self) -> list[list[int | float]]:
        """[[head type, threshold], ...]; from_json inverts it exactly, also through text."""
        return [[head_type, threshold] for head_type, threshold in self.exits]

    @classmethod
    def from_json(cls, data: Any) -> "Configuration":
        """The configuration that to_json wrote. Raises ValueError as the class does."""
        return cls(data)


def configuration_macs_L(configuration: Configuration, costs: ExitCosts) -> IntArray:  # noqa: N802
    """MACs (P+1,) of leaving at each position: the backbone up to there plus every enabled head passed, its own too,
    and the features that they read.

    Nobody leaves where there is no exit; the entry is what reaching it costs. The last is going to the end. No gates.
    Raises ValueError where the configuration does not fit the positions or the head types.
    """
    if len(configuration.exits) != len(costs.positions):
        raise ValueError(
            f"the configuration has {len(configuration.exits)} positions, the costs have {len(costs.positions)}"
        )
    for head_type, _ in configuration.exits:
        if head_type >= len(costs.head_types):
            raise ValueError(f"head type {head_type} is out of range; there are {len(costs.head_types)}")
    paid = [row[t] if t >= 0 else 0 for row, (t, _) in zip(costs.head_macs, configuration.exits, strict=True)]
    return costs.path_macs(np.array(paid, dtype=np.int64), last_enabled([t for t, _ in configuration.exits]))


def last_enabled(heads: Sequence[int]) -> int:
    """The number of the last position whose head type (index, or -1 for no exit) is one; -1 if there is none."""
    return max((p for p, head in enumerate(heads) if head >= 0), default=-1)


def apply_configuration(
    configuration: Configuration, confidence_PHN: FloatArray, correct_PHN: BoolArray, base_correct_N: BoolArray
) -> tuple[IntArray, BoolArray]:
    """Where every sample leaves (N,) int64 in 0..P, and whether it is right there (N,) bool.

    A sample leaves at the first enabled exit whose confidence > threshold, compared in float32 (equality stays), else
    at P, the backbone. Raises ValueError where shapes disagree or the confidences are not float32.
    """
    num_positions = len(configuration.exits)
    if confidence_PHN.dtype != np.float32:
        raise ValueError(f"confidences are compared in float32, got {confidence_PHN.dtype}")
    if len(confidence_PHN) != num_positions or correct_PHN.shape != confidence_PHN.shape:
        raise ValueError(
            f"confidences {confidence_PHN.shape} and correct {correct_PHN.shape} do not fit {num_positions} positions"
        )
    exit_index_N = np.full(base_correct_N.shape, num_positions, dtype=np.int64)
    correct_N = base_correct_N.copy()
    for position in reversed(range(num_positions)):
        head_type, threshold = configuration.exits[position]
        if head_type >= 0:
            leaves_N = confidence_PHN[position, head_type] > np.float32(threshold)
            exit_index_N[leaves_N] = position
            correct_N = np.where(leaves_N, correct_PHN[position, head_type], correct_N)
    return exit_index_N, correct_N


def pareto_front(accuracy: ArrayLike, macs: ArrayLike) -> BoolArray:
    """Mask (N,) of the points that no other beats: accuracy >= and macs <=, one of them strictly.

    Equal points all stay. Raises ValueError on NaN or on different lengths.
    """
    accuracy_N, macs_N = _points(accuracy, macs)
    levels, level_N = np.unique(macs_N, return_inverse=True)
    best = np.full(len(levels), -np.inf)
    np.maximum.at(best, level_N, accuracy_N)
    cheaper = np.concatenate(([-np.inf], np.maximum.accumulate(best)[:-1])) if len(levels) else best
    return np.asarray((accuracy_N == best[level_N]) & (accuracy_N > cheaper[level_N]))


def hypervolume(accuracy: ArrayLike, relative_macs: ArrayLike, reference: tuple[float, float] = (0.0, 1.0)) -> float:
    """Area that the points dominate above reference accuracy and below reference relative MACs; 0 for no points.

    Points on the far side of the reference add nothing. Compare only fronts made from equal grids: a staircase's area
    grows with the number of its steps. Raises ValueError on NaN or on different lengths.
    """
    accuracy_N, macs_N = _points(accuracy, relative_macs)
    order = np.argsort(macs_N, kind="stable")
    macs_N = np.minimum(macs_N[order], reference[1])
    heights = np.maximum.accumulate(np.maximum(accuracy_N[order] - reference[0], 0))
    return float((heights * np.diff(macs_N, append=reference[1])).sum())


def _points(accuracy: ArrayLike, macs: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    accuracy_N, macs_N = np.asarray(accuracy, dtype=np.float64), np.asarray(macs, dtype=np.float64)
    if accuracy_N.ndim != 1 or accuracy_N.shape != macs_N.shape:
        raise ValueError(f"accuracies {accuracy_N.shape} and MACs {macs_N.shape} must be lists of the same length")
    if np.isnan(accuracy_N).any() or np.isnan(macs_N).any():
        raise ValueError("accuracies and MACs must not be NaN")
    return accuracy_N, macs_N
