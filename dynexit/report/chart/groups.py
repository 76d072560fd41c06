"""What the page's figure draws: operating points in groups, one per entry of its legend, and what each budget buys."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dynexit.report.figures import HUNDREDTHS
from dynexit.report.table import FrontPoint, by_seed, front_of, relative_cost, within_budgets
from dynexit.search.operating_points import BASELINES, ReportRow, RowKey

_ALONE = ("gates", "static")  # points that no budget chooses among
_MOST_POINTS = 600  # of the searches, and as many of the gates
_MOST_BUDGETS = 80  # of a curve
_MOST_OFFERED = 100
STEPS = (0.005, 0.001)
"""Of the budgets whose best points a long front offers: shares of MACs or time, and accuracy lost."""

Costs = Sequence[int | None]
"""What the figure's cost axis can show: None for relative MACs, a batch size for the relative time of such a batch."""


Fronts = Mapping[int | None, Sequence[FrontPoint]]
"""The study's front by each cost that the figure can show."""


class Step(NamedTuple):
    """From this budget on: the mean over seeds of the accuracy that it buys, and the least and greatest."""

    budget: float
    mean: float
    least: float
    greatest: float


@dataclass(frozen=True)
class LegendGroup:
    """An entry of the legend. `curves` are by cost and split; those that leave by thresholds or networks have them."""

    source: str
    method: str
    points: Sequence[FrontPoint]
    curves: Mapping[tuple[int | None, str], Sequence[Step]]


def groups_of(rows: Sequence[ReportRow], fronts: Fronts, more: Sequence[FrontPoint] = ()) -> list[LegendGroup]:
    """Returns the groups: searches, gates and fixed thresholds by method, then static networks and cascades.

    The points are those that are best on validation within hundredths of a cost, seed by seed; of gates and static
    networks all, of more than 600 evenly many; and of all what the page's sliders choose from `fronts`, and `more`.
    """
    costs, wanted = list(fronts), [*more]
    for cost, front in fronts.items():
        wanted += reachable(front, cost, base_accuracy(rows))
    by_group: dict[tuple[str, str], list[ReportRow]] = {}
    for row in rows:
        if row.source != "backbone":
            by_group.setdefault((row.source, row.method), []).append(row)
    most = max(12, _MOST_POINTS // max(1, sum(len(by_seed(own)) for own in by_group.values())))
    order = ("search", "gates", "fixed", *BASELINES)
    found = []
    for (source, method), own in sorted(by_group.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        if source in _ALONE:
            points = spread(_pairs(own), _MOST_POINTS)
        else:
            points = [point for seed in by_seed(own) for point in spread(_best(seed, costs), most)]
        points = _unique([*points, *(one for one in wanted if (one.test.source, one.test.method) == (source, method))])
        curves = {} if source in (*_ALONE, "fixed") else _curves(own, costs)
        found.append(LegendGroup(source, method, points, curves))
    return found


def fronts_of(rows: Sequence[ReportRow], costs: Costs) -> Fronts:
    """The study's front by each of the costs, without the backbone alone."""
    return {
        cost: [one for one in front_of(has_cost(rows, cost), cost) if one.validation.source != "backbone"]
        for cost in costs
    }


def base_accuracy(rows: Iterable[ReportRow]) -> float:
    """The validation accuracy of the study's backbone, the best of several; 0 without one."""
    return max((row.accuracy for row in rows if row.source == "backbone" and row.split == "validation"), default=0.0)


def reachable(front: Sequence[FrontPoint], cost: int | None, base: float) -> list[FrontPoint]:
    """Those of a front that the page's sliders can choose: the best within steps of 0.005 of the cost, the cheapest
    that lose at most steps of 0.001 of the accuracy up to 0.05. Of a short front all.
    """
    if len(front) <= _MOST_OFFERED:
        return list(front)
    chosen = {one.validation.key for one in within_budgets(front, np.arange(0, 2, STEPS[0]) + 1e-9, cost)}
    for drop in np.arange(0, 0.0501, STEPS[1]):
        kept = (one for one in front if one.validation.accuracy >= base - drop - 1e-9)
        chosen |= {one.validation.key for one in itertools.islice(kept, 1)}
    return [one for one in front if one.validation.key in chosen]


def spread(points: Sequence[FrontPoint], most: int) -> list[FrontPoint]:
    """At most `most` of the points, evenly by their number."""
    if len(points) <= most:
        return list(points)
    return [points[index] for index in np.linspace(0, len(points) - 1, most).round().astype(int)]


def has_cost(rows: Iterable[ReportRow], cost: int | None) -> list[ReportRow]:
    """The rows whose cost is known."""
    return [row for row in rows if cost is None or any(time.batch_size == cost for time in row.times)]


def _pairs(rows: Iterable[ReportRow]) -> list[FrontPoint]:
    rows = list(rows)
    tests = {row.key: row for row in rows if row.split == "test"}
    found = [FrontPoint(row, tests[row.key], 0.0) for row in rows if row.split != "test" and row.key in tests]
    return sorted(found, key=lambda point: point.validation.relative_macs)


def _best(rows: Sequence[ReportRow], costs: Costs) -> list[FrontPoint]:
    found = [
        point
        for cost in costs
        for point in within_budgets(front_of(has_cost(rows, cost), cost, baselines=True), HUNDREDTHS, cost)
    ]
    return sorted(_unique(found), key=lambda point: point.validation.relative_macs)


def _unique(points: Iterable[FrontPoint]) -> list[FrontPoint]:
    found: dict[RowKey, FrontPoint] = {}
    for point in points:
        found.setdefault(point.validation.key, point)
    return list(found.values())


def _curves(rows: Sequence[ReportRow], costs: Costs) -> dict[tuple[int | None, str], Sequence[Step]]:
    found: dict[tuple[int | None, str], Sequence[Step]] = {}
    for cost in costs:
        seeds = (front_of(has_cost(seed, cost), cost, baselines=True) for seed in by_seed(rows))
        fronts = [front for front in seeds if front]
        for split in ("validation", "test"):
            found[cost, split] = steps(fronts, cost, split) if fronts else []
    return found


def steps(fronts: Sequence[Sequence[FrontPoint]], cost: int | None, split: str) -> list[Step]:
    """What a rising budget of a cost buys on a split, of one front per seed.

    Within a budget a seed takes the point of its front that is best on validation. The steps begin where every seed has
    one, and end at the backbone's cost or at the dearest point.
    """
    costs = [np.array([relative_cost(point.validation, cost) for point in front]) for front in fronts]
    values = [np.array([getattr(point, split).accuracy for point in front]) for front in fronts]
    start, end = max(own[0] for own in costs), max(1.0, *(own[-1] for own in costs))
    budgets = np.unique(np.concatenate([[start, end], *costs]))
    budgets = budgets[budgets >= start]
    if len(budgets) > _MOST_BUDGETS:
        budgets = np.linspace(start, end, _MOST_BUDGETS)
    value_SB = np.stack(
        [value[np.searchsorted(own, budgets, side="right") - 1] for own, value in zip(costs, values, strict=True)]
    )
    return [
        Step(float(budget), float(value_S.mean()), float(value_S.min()), float(value_S.max()))
        for index, (budget, value_S) in enumerate(zip(budgets, value_SB.T, strict=True))
        if index in (0, len(budgets) - 1) or (value_S != value_SB[:, index - 1]).any()
    ]
