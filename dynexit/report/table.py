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
    chosen = {row.key for row in _pareto(row for row in rows if row.split == "validation")}
    return [replace(row, on_front=row.key in chosen) for row in rows]


def _pareto(rows: Iterable[ReportRow]) -> list[ReportRow]:
    rows = [row for row in rows if row.source not in BASELINES]
    if not rows:
        return []
    mask = pareto_front(np.array([row.accuracy for row in rows]), np.array([row.relative_macs for row in rows]))
    return [row for row, chosen in zip(rows, mask, strict=True) if chosen]


def front_of(rows: Iterable[ReportRow]) -> list[FrontPoint]:
    """The front of just these rows, baselines left out, chosen on validation, by rising relative MACs on validation.

    Where points are equal on validation one stands for all. Points without a test row are left out. The backbone whose
    accuracy is compared with is the mean over the backbone rows among `rows` (nan without one).
    """
    rows = list(rows)
    tests = {row.key: row for row in rows if row.split == "test"}
    base = backbone_accuracy(rows)
    front: dict[tuple[float, float], FrontPoint] = {}
    for row in sorted(_pareto(row for row in rows if row.split == "validation"), key=row_order):
        if row.key in tests:
            test = tests[row.key]
            drop = math.nan if base is None else base - test.accuracy
            front.setdefault((row.relative_macs, row.accuracy), FrontPoint(row, test, drop))
    return [front[place] for place in sorted(front)]


def within_budgets(front: Sequence[FrontPoint], budgets: Iterable[float]) -> list[FrontPoint]:
    """For each budget of relative MACs the point that is best on validation within it; each point once.

    Budgets below the first point give nothing. `front` as `front_of` gives it.
    """
    chosen: list[FrontPoint] = []
    for budget in sorted(budgets):
        affordable = [point for point in front if point.validation.relative_macs <= budget]
        if affordable and affordable[-1] not in chosen:
            chosen.append(affordable[-1])
    return chosen


def at_tenths(front: Sequence[FrontPoint]) -> list[FrontPoint]:
    """A table's worth of a front: its cheapest point and the best within 0.1, 0.2, ... of the backbone's MACs."""
    last = max((math.ceil(10 * point.validation.relative_macs) for point in front), default=0)
    cheapest = [front[0].validation.relative_macs] if front else []
    return within_budgets(front, cheapest + [tenth / 10 for tenth in range(1, last + 1)])


def backbone_accuracy(rows: Iterable[ReportRow], split: str = "test") -> float | None:
    """Accuracy of the bare backbone on a split; the mean where a study has several; None without one."""
    accuracies = [row.accuracy for row in rows if row.source == "backbone" and row.split == split]
    return fmean(accuracies) if accuracies else None


def percent(fraction: float, decimals: int = 2) -> str:
    """A fraction as printed text: 0.9867 is 98.67 %."""
    return f"{100 * fraction:.{decimals}f} %"


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
