"""Configurations chosen by measured times, for one batch size: the exact search with another cost.

The search's cost is linear: every stage and exit costs an image what it costs in a full batch. Few samples in a batch
make deep stages dearer, so what the search finds is judged by the table's mean time, which knows that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dynexit.core.confidence import CONFIDENCES
from dynexit.core.latency import LatencyTable
from dynexit.core.tradeoff import OperatingPoint
from dynexit.search.budgets import Budget, Unattainable
from dynexit.search.driver import SearchDriver, SearchEntry, SearchRequest
from dynexit.search.problem import Problem

KINDS = ("latency_ms", "relative_latency")
_MOST_TRIES = 12
_ROUNDING = 1e-9  # of times, which the search counts in picoseconds


@dataclass(frozen=True)
class TimedEntry:
    """What the search found, and by record the mean time over that of the plain backbone, and in ms for a batch."""

    entry: SearchEntry
    relative_latency: Mapping[str, float]
    latency_ms: Mapping[str, float]


class TimedSearch:
    """Searches the first of `problems` by the times of a batch size; all of them judge the answers."""

    def __init__(
        self,
        problems: Mapping[str, Problem],
        settings: SearchRequest,
        table: LatencyTable,
        batch: int,
        confidence: str = "max_probability",
    ) -> None:
        """`confidence` is what thresholds are compared with, as for Problem.from_record.

        Raises ValueError for a table of other positions or head types.
        """
        self.table, self.batch, self._searched = table, batch, next(iter(problems))
        self._gates = CONFIDENCES[confidence].reads == "gates"
        costs = table.costs(batch, problems[self._searched].costs, gates=self._gates)
        request = replace(settings, budgets=[Budget("relative_latency", 1.0)])  # so that it can meet any
        self._driver = SearchDriver(problems, request, costs)

    def weights(self) -> list[TimedEntry]:
        """An entry per accuracy weight whose configuration is no slower than the plain backbone."""
        entries = (self._timed(entry) for entry in self._driver.weights())
        return [one for one in entries if one.relative_latency[self._searched] <= 1]

    def meet(self, kind: str, value: float) -> TimedEntry:
        """The most accurate found within a budget: `latency_ms`, a batch's mean time, or `relative_latency`, its share
        of the plain backbone's.

        Raises Unattainable, with the nearest, where nothing found is within it.
        """
        full_ms = 1000 * self.table.times[self.batch].backbone
        share = value / full_ms if kind == "latency_ms" else value
        asked, nearest = share, float("inf")
        for _ in range(_MOST_TRIES):
            found = self._driver.meet(Budget("relative_latency", asked))
            if isinstance(found, Unattainable):
                # the fastest by the linear cost
                found = self._driver.meet(Budget("relative_latency", found.nearest))
                assert not isinstance(found, Unattainable)
                asked = 0.0
            timed = self._timed(replace(found, asked={kind: value, "batch_size": self.batch}))
            relative = timed.relative_latency[self._searched]
            if relative <= share * (1 + _ROUNDING):
                return timed
            nearest = min(nearest, relative)
            asked *= 0.999 * share / relative
            if not asked:
                break
        reached = nearest * full_ms if kind == "latency_ms" else nearest
        raise Unattainable(
            f"{kind} {value:g} is unattainable at batch size {self.batch}: the fastest configuration found takes "
            f"{reached:.6g}; ask for that or more room",
            reached,
        )

    def _timed(self, entry: SearchEntry) -> TimedEntry:
        heads = [head for head, _ in entry.configuration.exits]

        def relative(point: OperatingPoint) -> float:
            return self.table.relative(heads, point.exit_fractions, self.batch, gates=self._gates)

        shares = {name: relative(point) for name, point in entry.points.items()}
        full_ms = 1000 * self.table.times[self.batch].backbone
        return TimedEntry(entry, shares, {name: share * full_ms for name, share in shares.items()})


def budgets_by_time(asked: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(kind, value) of the budgets of measured time in lists of values by kind; other keys are ignored."""
    return [(kind, value) for kind in KINDS for value in asked.get(kind, ())]
