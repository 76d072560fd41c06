"""All operating points of a study as one table, and what is to be read from it.

Fronts are chosen on the validation split and judged on the test split, everywhere: an operating point is a pair
of rows with the same `Row.key`, one for each split, and no test value decides which points are shown.
"""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from dynexit.core.tradeoff import hypervolume, pareto_front
from dynexit.errors import Failure
from dynexit.run_dir import atomic_write, move_aside

SOURCES = ("backbone", "gates", "search", "fixed")
SPLITS = ("validation", "test")

RowKey = tuple[str, str, str, float | None, str, str]


@dataclass(frozen=True)
class Row:
    """One operating point on one split; the fields are the CSV's columns, in order.

    `seed`, `ce_ic_tradeoff` and `accuracy_weight` are None where they mean nothing. `accuracy` is in [0, 1], `macs` the
    mean per sample, `relative_macs` the same over the bare backbone's (above 1 is possible). `exit_fractions` (L,) end
    with the backbone's own classifier; they are the columns exit_0, exit_1, ... (where points have fewer exits than
    others, their last columns stay empty). `point_id` is the id of the training, of what
    was searched that of the search. `configuration` and `budget` (asked for instead of a weight) are JSON or empty.
    """

    source: str
    method: str
    seed: int | None
    ce_ic_tradeoff: float | None
    accuracy_weight: float | None
    split: str
    accuracy: float
    macs: float
    relative_macs: float
    exit_fractions: tuple[float, ...]
    on_front: bool = False
    point_id: str = ""
    configuration: str = ""
    budget: str = ""

    @property
    def key(self) -> RowKey:
        """What the validation and the test row of one operating point share."""
        return (self.source, self.method, self.point_id, self.accuracy_weight, self.configuration, self.budget)


@dataclass(frozen=True)
class FrontPoint:
    """A point of a front: chosen by its validation row, shown with its test row. `accuracy_drop` is the loss of test
    accuracy against the backbone (negative where it is the better one)."""

    validation: Row
    test: Row
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


def mark_front(rows: Iterable[Row]) -> list[Row]:
    """The same rows with `on_front` set: the Pareto front of validation over all sources, carried to the test rows.

    Equal points stay both. A test row without its validation row is not on the front.
    """
    rows = list(rows)
    chosen = {row.key for row in _pareto(row for row in rows if row.split == "validation")}
    return [replace(row, on_front=row.key in chosen) for row in rows]


def _pareto(rows: Iterable[Row]) -> list[Row]:
    rows = list(rows)
    if not rows:
        return []
    mask = pareto_front(np.array([row.accuracy for row in rows]), np.array([row.relative_macs for row in rows]))
    return [row for row, chosen in zip(rows, mask, strict=True) if chosen]


def front_of(rows: Iterable[Row]) -> list[FrontPoint]:
    """The front of just these rows, chosen on validation, by rising relative MACs on validation.

    Where points are equal on validation one stands for all. Points without a test row are left out. The backbone whose
    accuracy is compared with is the mean over the backbone rows among `rows` (nan without one).
    """
    rows = list(rows)
    tests = {row.key: row for row in rows if row.split == "test"}
    base = backbone_accuracy(rows)
    front: dict[tuple[float, float], FrontPoint] = {}
    for row in sorted(_pareto(row for row in rows if row.split == "validation"), key=_order):
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


def backbone_accuracy(rows: Iterable[Row], split: str = "test") -> float | None:
    """Accuracy of the bare backbone on a split; the mean where a study has several; None without one."""
    accuracies = [row.accuracy for row in rows if row.source == "backbone" and row.split == split]
    return fmean(accuracies) if accuracies else None


def percent(fraction: float, decimals: int = 2) -> str:
    """A fraction as printed text: 0.9867 is 98.67 %."""
    return f"{100 * fraction:.{decimals}f} %"


def summary(rows: Iterable[Row]) -> Summary:
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


def _by_method(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.source != "backbone":
            groups[row.source, row.method].append(row)
    return groups


def by_seed(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows parted by seed, in order of the seeds."""
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[-1 if row.seed is None else row.seed].append(row)
    return [groups[seed] for seed in sorted(groups)]


def _area(rows: Iterable[Row]) -> float:
    tests = [point.test for point in front_of(rows)]
    if not tests:
        return 0.0
    return float(hypervolume(np.array([row.accuracy for row in tests]), np.array([row.relative_macs for row in tests])))


def _order(row: Row) -> tuple[Any, ...]:
    def first_if_absent(value: float | None) -> float:
        return -math.inf if value is None else value

    return (
        row.source,
        row.method,
        first_if_absent(row.seed),
        first_if_absent(row.ce_ic_tradeoff),
        row.point_id,
        first_if_absent(row.accuracy_weight),
        row.configuration,
        row.budget,
        row.split != "validation",
        row.relative_macs,
        row.accuracy,
    )


_BEFORE_EXITS = tuple(field.name for field in fields(Row))[:9]
_AFTER_EXITS = ("on_front", "point_id", "configuration", "budget")


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Writes the table, sorted: the same rows in any order give the same bytes, and reading gives the same floats.

    Raises ValueError for a source or split that is unknown and for a number that is not finite.
    """
    rows = sorted(rows, key=_order)
    num_exits = max((len(row.exit_fractions) for row in rows), default=0)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_BEFORE_EXITS, *(f"exit_{exit_}" for exit_ in range(num_exits)), *_AFTER_EXITS])
        for row in rows:
            if row.source not in SOURCES or row.split not in SPLITS:
                raise ValueError(f"source {row.source!r} on split {row.split!r}; known: {SOURCES} on {SPLITS}")
            head = [_text(getattr(row, name)) for name in _BEFORE_EXITS]
            exits = [_text(fraction) for fraction in row.exit_fractions]
            exits += [""] * (num_exits - len(exits))
            writer.writerow([*head, *exits, _text(bool(row.on_front)), row.point_id, row.configuration, row.budget])


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, int | np.integer):
        return str(int(value))
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot stand in a table of operating points")
    return repr(float(value))


def read_csv(path: Path) -> list[Row]:
    """The rows of a table that `write_csv` wrote. A damaged one is a Failure that names the file and the line."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            num_exits = len(header) - len(_BEFORE_EXITS) - len(_AFTER_EXITS)
            exits = tuple(f"exit_{exit_}" for exit_ in range(num_exits))
            if tuple(header) != _BEFORE_EXITS + exits + _AFTER_EXITS:
                raise ValueError("the header is not that of an operating-point table")
            return [_row(dict(zip(header, cells, strict=True)), exits) for cells in reader]
        except (ValueError, KeyError, csv.Error) as error:
            raise Failure(
                f"{path} is damaged in line {reader.line_num} ({error}); {move_aside(path.parent)}"
            ) from error


def _row(cells: dict[str, str], exits: tuple[str, ...]) -> Row:
    def number(name: str) -> float | None:
        return float(cells[name]) if cells[name] else None

    return Row(
        source=cells["source"],
        method=cells["method"],
        seed=int(cells["seed"]) if cells["seed"] else None,
        ce_ic_tradeoff=number("ce_ic_tradeoff"),
        accuracy_weight=number("accuracy_weight"),
        split=cells["split"],
        accuracy=float(cells["accuracy"]),
        macs=float(cells["macs"]),
        relative_macs=float(cells["relative_macs"]),
        exit_fractions=tuple(float(cells[name]) for name in exits if cells[name]),
        on_front={"true": True, "false": False}[cells["on_front"]],
        point_id=cells["point_id"],
        configuration=cells["configuration"],
        budget=cells["budget"],
    )
