"""Measured times of a backbone's stages and exits by batch size, and the mean time of leaving early by them.

Shapes: P positions, H head types, S = P + 1 stages (the last one ends with the backbone's own classifier), L = P + 1
exits, B batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import last_enabled

FORMAT = 1
_PICOSECONDS = 10**12
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class BatchTimes:
    """Seconds that a whole batch takes, nobody leaving."""

    backbone: float
    """The plain backbone, in the tiles in which the engine runs it."""
    stages: tuple[float, ...]
    """(S,) each from the position before; they sum up to the engine without exits."""
    heads: tuple[tuple[float, ...], ...]
    """(P, H) an enabled exit: reading features, the head, the decision, and taking half of a batch out."""
    gates: tuple[float, ...]
    """(P,) what a gate adds to it."""
    readers: tuple[float, ...]
    """(P,) reading features that later exits read too; 0 unless features are concatenated."""
    shrunk: float = 1.0
    """What fewer samples take once a batch of this size has shrunk, over what a batch of their number takes."""
    streamed: float = 1.0
    """What a stream of such batches takes, which joins what is left of several, over what its stages take."""


@dataclass(frozen=True)
class LatencyTable:
    """Times of one backbone with exits on one device. Raises ValueError for times that do not fit the positions."""

    positions: tuple[int, ...]
    head_types: tuple[str, ...]
    times: Mapping[int, BatchTimes]
    """By batch size, rising."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """Where and when it was measured: device, device_name, threads, torch, precision, date."""
    wanted: tuple[int, ...] = ()
    """The batch sizes that are of interest, rising; the others are there for what lies between. () for all."""

    def __post_init__(self) -> None:
        if not set(self.wanted) <= set(self.times):
            raise ValueError(f"batch sizes {list(self.wanted)} are wanted and {list(self.times)} measured")
        if not self.times or list(self.times) != sorted(set(self.times)) or min(self.times) < 1:
            raise ValueError(f"batch sizes must rise from 1 or more, got {list(self.times)}")
        num_positions, num_types = len(self.positions), len(self.head_types)
        for batch, times in self.times.items():
            lengths = (len(times.stages), len(times.heads), len(times.gates), len(times.readers))
            if lengths != (num_positions + 1, *[num_positions] * 3) or any(
                len(row) != num_types for row in times.heads
            ):
                raise ValueError(
                    f"the times of batch size {batch} do not fit {num_positions} positions and {num_types} head types"
                )
            heads = [seconds for row in times.heads for seconds in row]
            for seconds in (
                times.backbone,
                *times.stages,
                *heads,
                *times.gates,
                *times.readers,
                times.shrunk,
                times.streamed,
            ):
                if not 0 <= seconds < math.inf:
                    raise ValueError(f"a time of batch size {batch} is {seconds}; times are seconds of 0 or more")
            if not (times.backbone > 0 and sum(times.stages) > 0):
                raise ValueError(f"the backbone takes no time at batch size {batch}")

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The batch sizes of interest, rising."""
        return self.wanted or tuple(self.times)

    def costs(self, batch: int, costs: ExitCosts, *, gates: bool = False) -> ExitCosts:
        """`costs` with an image's picoseconds, in full batches, in place of MACs; `gates`: each head with its gate.

        Raises KeyError for a batch size that was not measured, ValueError for costs of other positions or head types.
        """
        if (self.positions, self.head_types) != (costs.positions, costs.head_types):
            raise ValueError(
                f"it has positions {list(self.positions)} with {', '.join(self.head_types)}, the record has "
                f"{list(costs.positions)} with {', '.join(costs.head_types)}"
            )
        times = self.times[batch]

        def each(seconds: float) -> int:
            return round(seconds / batch * _PICOSECONDS)

        path = [each(seconds) for seconds in np.cumsum(times.stages)]
        added = times.gates if gates else (0.0,) * len(times.gates)
        return replace(
            costs,
            full_macs=path[-1],
            backbone_macs=tuple(path[:-1]),
            head_macs=tuple(
                tuple(each(head + gate) for head in row) for row, gate in zip(times.heads, added, strict=True)
            ),
            gate_macs=tuple(each(gate) for gate in times.gates),
            reader_macs=tuple(each(seconds) for seconds in times.readers) if any(times.readers) else (),
        )

    def seconds(
        self, heads: Sequence[int], exit_fractions: Sequence[float], batch: int, *, gates: bool = False
    ) -> float:
        """Mean seconds of a batch of which the share exit_fractions[l] (L,) leaves at each exit.

        `heads` (P,) are head type indices, -1 for no exit; with `gates` the gates decide. The number of samples that
        arrive at a stage is taken for binomial, and times between measured batch sizes lie on a line; fewer samples
        than the batch had take `shrunk` times as long. Raises KeyError for a batch size that was not measured.
        """
        return self._sum(heads, _binomial(batch, _reach(exit_fractions)), batch, gates)

    def _sum(self, heads: Sequence[int], runs_SB: FloatArray, batch: int, gates: bool) -> float:
        """Seconds of stages and exits, by how often each stage runs 0..batch samples (S, batch + 1)."""
        stages_SB, heads_PHB, gates_PB, readers_PB = self._curves[batch]
        runs_SB = runs_SB * np.append(np.full(batch, self.times[batch].shrunk), 1.0)
        total = float((runs_SB * stages_SB).sum())
        last = last_enabled(heads)
        for p, head in enumerate(heads[: last + 1]):
            curve_B = readers_PB[p] + (heads_PHB[p, head] + gates * gates_PB[p] if head >= 0 else 0)
            total += float(runs_SB[p] @ curve_B)
        return total

    def relative(
        self, heads: Sequence[int], exit_fractions: Sequence[float], batch: int, *, gates: bool = False
    ) -> float:
        """`seconds` over those of the plain backbone at this batch size."""
        return self.seconds(heads, exit_fractions, batch, gates=gates) / self.times[batch].backbone

    def relative_as_stream(
        self, heads: Sequence[int], exit_fractions: Sequence[float], batch: int, num_images: int, *, gates: bool = False
    ) -> float:
        """The time of a stream of batches over that of the plain backbone on them; arguments as in `seconds`.

        Every stage runs full batches and at the end what is left, which takes `streamed` times as long as alone.
        """
        count_S = np.rint(num_images * _reach(exit_fractions)).astype(int)
        runs_SB = np.eye(batch + 1)[count_S % batch]
        runs_SB[:, batch] = count_S // batch
        times = self.times[batch]
        seconds = times.streamed * self._sum(heads, runs_SB, batch, gates)
        return seconds / (times.backbone * num_images / batch)

    @cached_property
    def _curves(self) -> dict[int, tuple[FloatArray, FloatArray, FloatArray, FloatArray]]:
        """By batch size the seconds of 0..B samples: stages (S, B+1), heads (P, H, B+1), gates and readers (P, B+1)."""
        sizes, times = [0, *self.times], list(self.times.values())
        parts = [np.array([getattr(one, name) for one in times]) for name in ("stages", "heads", "gates", "readers")]

        def curve(values_T: FloatArray, batch: int) -> FloatArray:
            return np.interp(np.arange(batch + 1), sizes, np.concatenate(([0.0], values_T)))

        return {
            batch: tuple(
                np.apply_along_axis(curve, 0, part, batch).transpose(*range(1, part.ndim), 0) for part in parts
            )  # type: ignore[misc]
            for batch in self.times
        }

    def to_json(self) -> dict[str, Any]:
        """What latency.json holds; from_json inverts it."""
        times = {str(batch): asdict(one) for batch, one in self.times.items()}
        return {
            "format": FORMAT,
            **self.machine,
            "positions": list(self.positions),
            "head_types": list(self.head_types),
            "batch_sizes": list(self.batch_sizes),
            "seconds_by_batch_size": times,
        }

    @classmethod
    def from_json(cls, data: Any) -> "LatencyTable":
        """The table that to_json wrote. Raises ValueError, saying what is wrong, for anything else."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError(f"it has no format version {FORMAT}")
        rest = dict(data)
        try:
            positions, head_types, wanted, by_size = (rest.pop(name) for name in _TABLE_KEYS)
            times = {
                int(batch): BatchTimes(**{k: _tuples(v) for k, v in one.items()}) for batch, one in by_size.items()
            }
            del rest["format"]
            return cls(tuple(positions), tuple(head_types), times, rest, tuple(wanted))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it holds no table of times ({error!r})") from None


_TABLE_KEYS = ("positions", "head_types", "batch_sizes", "seconds_by_batch_size")


def sizes_to_measure(batch_sizes: Sequence[int]) -> list[int]:
    """Returns batch sizes to measure for those wanted, rising: 1, 2 and some between, since times are no line.

    Many a CPU kernel takes another path from 1 to 2 images, and then hardly more time up to a dozen.
    """
    sizes = sorted({*batch_sizes, 1, *([2] if max(batch_sizes) > 1 else [])})
    between = {round(math.sqrt(low * high)) for low, high in pairwise(sizes) if high >= 4 * low}
    return sorted({*sizes, *between})


def _reach(exit_fractions: Sequence[float]) -> FloatArray:
    """(S,) the share of samples that arrive at each stage."""
    return np.asarray(np.clip(1 - np.concatenate(([0.0], np.cumsum(exit_fractions[:-1]))), 0, 1))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _binomial(count: int, shares_S: FloatArray) -> FloatArray:
    """(S, count + 1) the probability of each number of successes out of `count`."""
    log_factorial = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, count + 1)))))
    k = np.arange(count + 1)
    log_choices = log_factorial[count] - log_factorial - log_factorial[::-1]
    shares_S1 = shares_S[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 times -inf, where a share is 0 or 1
        successes = np.where(k == 0, 0.0, k * np.log(shares_S1))
        failures = np.where(k == count, 0.0, (count - k) * np.log1p(-shares_S1))
    return np.asarray(np.exp(log_choices + successes + failures))
