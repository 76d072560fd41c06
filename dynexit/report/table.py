"""All operating points of a study as one table, and what is to be read from it.

Fronts are chosen on the validation split and judged on the test split, everywhere: an operating point is a pair
of rows with the same `ReportRow.key`, one for each split, and no test value decides which points are shown.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from dynexit.core.tradeoff import hypervolume, pareto_front
from dynexit.search.operating_points import BASELINES, ReportRow, row_order


@dataclass(frozen=True)
class FrontPoint:
    """A point of a front: chosen by its validation row, shown with its test row. `accuracy_drop` is the loss of test
    accuracy against the backbone (negative where it is the better one)."""

    validation: ReportRow
    test: ReportRow
    accuracy_drop: float


@dataclass(frozen=True)
class Hypervolume:
    """Area under the test accuracies of a front, left of relative MACs 1, of all seeds together and of each alone."""

    source: str
    method: str
    all_seeds: float
    per_seed: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """What the report says first. `gates_span` is the least and greatest relative MACs of the gates on test."""

    backbone_accuracy: float | None
    front: tuple[FrontPoint, ...]
    gates_span: tuple[float, float] | None
    hypervolumes: tuple[Hypervolume, ...]


def mark_front(rows: Iterable[ReportRow]) -> list[ReportRow]:
    """The same rows with `on_front` set: the Pareto front of validation over all sources, carried to the test rows.

    Baselines are on no front. Equal points stay both. A test row without its validation row is not on the front.
    """
    rows = list(rows)
    own = [row for row in rows if row.split == "validation" and row.source not in BASELINES]
    chosen = {row.key for row in _pareto(own, None)}
    return [replace(row, on_front=row.key in chosen) for row in rows]


def relative_cost(row: ReportRow, batch_size: int | None = None) -> float:
    """Relative MACs, or the relative time at a batch size. Raises KeyError for a row without it."""
    return row.relative_macs if batch_size is None else row.time(batch_size).relative_time


def _pareto(rows: Sequence[ReportRow], batch_size: int | None) -> list[ReportRow]:
    if not rows:
        return []
    costs = np.array([relative_cost(row, batch_size) for row in rows])
    mask = pareto_front(np.array([row.accuracy for row in rows]), costs)
    return [row for row, chosen in zip(rows, mask, strict=True) if chosen]


def front_of(rows: Iterable[ReportRow], batch_size: int | None = None, *, baselines: bool = False) -> list[FrontPoint]:
    """The front of just these rows, baselines left out unless asked for, chosen on validation, by rising relative MACs
    on validation; with a `batch_size` by the relative time at that size, which all rows then need.

    Where points are equal on validation one stands for all. Points without a test row are left out. The backbone whose
    accuracy is compared with is the mean over the backbone rows among `rows` (nan without one).
    """
    rows = [row for row in rows if baselines or row.source not in BASELINES]
    tests = {row.key: row for row in rows if row.split == "test"}
    base = backbone_accuracy(rows)
    front: dict[tuple[float, float], FrontPoint] = {}
    validation = [row for row in rows if row.split == "validation"]
    for row in sorted(_pareto(validation, batch_size), key=row_order):
        if row.key in tests:
            test = tests[row.key]
            drop = math.nan if base is None else base - test.accuracy
            front.setdefault((relative_cost(row, batch_size), row.accuracy), FrontPoint(row, test, drop))
    return [front[place] for place in sorted(front)]


def within_budgets(
    front: Sequence[FrontPoint], budgets: Iterable[float], batch_size: int | None = None
) -> list[FrontPoint]:
    """For each budget of relative MACs the point that is best on validation within it; each point once.

    Budgets below the first point give nothing. `front` as `front_of` gives it, with the same `batch_size`.
    """
    chosen: list[FrontPoint] = []
    for budget in sorted(budgets):
        affordable = [point for point in front if relative_cost(point.validation, batch_size) <= budget]
        if affordable and affordable[-1] not in chosen:
            chosen.append(affordable[-1])
    return chosen


def at_tenths(front: Sequence[FrontPoint], batch_size: int | None = None) -> list[FrontPoint]:
    """A table's worth of a front: its cheapest point and the best within 0.1, 0.2, ... of the backbone's MACs or time.

    `front` as `front_of` gives it, with the same `batch_size`.
    """
    costs = [relative_cost(point.validation, batch_size) for point in front]
    last = max((math.ceil(10 * cost) for cost in costs), default=0)
    return within_budgets(front, costs[:1] + [tenth / 10 for tenth in range(1, last + 1)], batch_size)


def backbone_accuracy(rows: Iterable[ReportRow], split: str = "test") -> float | None:
    """Accuracy of the bare backbone on a split; the mean where a study has several; None without one."""
    accuracies = [row.accuracy for row in rows if row.source == "backbone" and row.split == split]
    return fmean(accuracies) if accuracies else None


def percent(fraction: float, decimals: int = 2) -> str:
    """A fraction as printed text: 0.9867 is 98.67 %."""
    return f"{100 * fraction:.{decimals}f} %"


def distinct_texts(values: Sequence[float]) -> list[str]:
    """The values with as many decimals as tell those apart that differ: two to six."""
    wanted = len(set(values))
    digits = next((n for n in range(2, 6) if len({f"{value:.{n}f}" for value in values}) == wanted), 6)
    return [f"{value:.{digits}f}" for value in values]


def summary(rows: Iterable[ReportRow]) -> Summary:
    """The front on test, the span of the gates and the hypervolume of every source and method."""
    rows = list(rows)
    gates = [row.relative_macs for row in rows if row.source == "gates" and row.split == "test"]
    return Summary(
        backbone_accuracy=backbone_accuracy(rows),
        front=tuple(front_of(rows)),
        gates_span=(min(gates), max(gates)) if gates else None,
        hypervolumes=tuple(
            Hypervolume(source, method, _area(group), tuple(_area(part) for part in by_seed(group)))
            for (source, method), group in sorted(_by_method(rows).items())
        ),
    )


def _by_method(rows: Iterable[ReportRow]) -> dict[tuple[str, str], list[ReportRow]]:
    groups: dict[tuple[str, str], list[ReportRow]] = defaultdict(list)
    for row in rows:
        if row.source not in ("backbone", *BASELINES):
            groups[row.source, row.method].append(row)
    return groups


def by_seed(rows: Iterable[ReportRow]) -> list[list[ReportRow]]:
    """The rows parted by seed, in order of the seeds."""
    groups: dict[int, list[ReportRow]] = defaultdict(list)
    for row in rows:
        groups[-1 if row.seed is None else row.seed].append(row)
    return [groups[seed] for seed in sorted(groups)]


def _area(rows: Iterable[ReportRow]) -> float:
    tests = [point.test for point in front_of(rows)]
    if not tests:
        return 0.0
    return float(hypervolume(np.array([row.accuracy for row in tests]), np.array([row.relative_macs for row in tests])))


def budget_curves(groups: Sequence[Sequence[ReportRow]]) -> tuple[np.ndarray, np.ndarray]:
    """Budgets of relative MACs (B,) and the test accuracy (S, B) that each of S groups of rows, baselines too, reaches
    within them.

    Within a budget a group takes the point of its front that is best on validation; the budgets begin where every group
    has one and end at 1 or where the dearest point is.
    """
    fronts = [front for group in groups if (front := front_of(group, baselines=True))]
    if not fronts:
        return np.zeros(0), np.zeros((0, 0))
    costs = [np.array([point.validation.relative_macs for point in front]) for front in fronts]
    budgets = np.linspace(max(cost[0] for cost in costs), max(1.0, *(cost[-1] for cost in costs)), 400)
    accuracies = [np.array([point.test.accuracy for point in front]) for front in fronts]
    taken = [np.searchsorted(cost, budgets, side="right") - 1 for cost in costs]
    return budgets, np.stack([accuracy[index] for accuracy, index in zip(accuracies, taken, strict=True)])
