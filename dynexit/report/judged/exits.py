"""The page's part on the exits of single points: who leaves where, and how right they are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dynexit.core.cost import place_name
from dynexit.core.statistics import accuracy_interval
from dynexit.report.judged.outcomes import Outcomes
from dynexit.report.judged.words import share_text
from dynexit.report.page import PageSection
from dynexit.report.table import percent
from dynexit.search.operating_points import ReportRow
from dynexit.study.grid import Point

_WHAT = (
    "On the test images: the share that leaves at each exit, how many of those are right and how many of them the "
    "backbone would be right on, and how many of all images would be right if all left there. MACs are those of "
    "leaving there, relative to the bare backbone’s. Here {first}; the points of the usual budgets below."
)


def exits_section(points: Sequence[Point], chosen: Mapping[str, ReportRow]) -> Iterator[PageSection]:
    """The section on the test rows in `chosen`, by what they are called; the first is shown, the others folded."""
    if chosen:
        by_id = {identity: point for point in reversed(points) for identity in point.ids.values()}
        tables = [(title, list(_cells(by_id[row.chosen_by], row))) for title, row in chosen.items()]
        yield PageSection("Exits", _WHAT.format(first=tables[0][0]), tables[0][1], folded=tables[1:])


def _cells(point: Point, row: ReportRow) -> Iterable[dict[str, Any]]:
    outcomes = Outcomes(point, "test")
    route, costs = outcomes.route(row), outcomes.costs
    names = [*map(place_name, costs.positions), "backbone"]
    for exit_, (name, place) in enumerate(zip(names, route.rows_L, strict=True)):
        leaves_N = route.exit_N == exit_
        if place < 0:
            continue
        correct_N = outcomes.correct_RN[place]
        several = exit_ < len(costs.positions) and len(costs.head_types) > 1
        yield {
            "exit": name + (f" ({costs.head_types[place % len(costs.head_types)]})" if several else ""),
            "relative MACs": f"{route.macs_L[exit_] / costs.full_macs:.3f}",
            "share leaving": percent(leaves_N.mean(), 1),
            "accuracy of those": _accuracy(correct_N[leaves_N], outcomes.origin_N[leaves_N]),
            "backbone’s on those": percent(outcomes.correct_RN[-1, leaves_N].mean()) if leaves_N.any() else "",
            "accuracy if all left": _accuracy(correct_N, outcomes.origin_N),
        }


def _accuracy(correct_N: np.ndarray, origin_N: np.ndarray) -> str:
    return share_text(accuracy_interval(correct_N, origin_N)) if len(correct_N) else ""
