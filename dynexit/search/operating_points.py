"""The table of operating points: its rows, its columns and its CSV file, for studies and for `search-records`."""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynexit.core.tradeoff import OperatingPoint
from dynexit.errors import Failure
from dynexit.run_dir import atomic_write, move_aside

ONE_THRESHOLD = "one_threshold"
BASELINES = ("static", "cascade", ONE_THRESHOLD)
"""Sources of what a study is compared with, which is never chosen: on no front, in no budget, not saved."""
SOURCES = ("backbone", "gates", "search", "fixed", *BASELINES)
SPLITS = (("validation", "test"), ("train", "val"))
"""(searched, judged): the splits of a study, and the records given to `search-records`."""

COLUMNS = {
    "source": "backbone: the bare backbone; gates: leaving by gates; search, fixed: by thresholds; static: a static "
    "network; cascade: several whole networks in turn; one_threshold: the same threshold at every exit, not searched",
    "method": "how the exits were trained; in a table of search-records the method of the search; of static networks "
    "and cascades their classifier",
    "seed": "initialisation of exit heads and gates, of static networks and cascades that of the points compared with "
    "them; empty if there is none",
    "ce_ic_tradeoff": "JEI-DNN's weight of inference cost against cross-entropy; empty for other methods",
    "accuracy_weight": "weight of accuracy against cost that the search was given; empty if there is none",
    "split": "samples that the figures are of",
    "accuracy": "fraction of the samples classified correctly, in [0, 1]",
    "macs": "mean multiply-accumulates per sample",
    "relative_macs": "macs over those of the bare backbone; above 1 is possible",
    "exit_fractions": "columns exit_0, exit_1, ...: share of the samples leaving at each exit, the backbone's own "
    "classifier last; the last columns are empty for points with fewer exits",
    "on_front": "whether no other point of the table is better in accuracy and MACs on the split that was searched; "
    "false for baselines, which are not compared",
    "point_id": "id of the training, of the prepared backbone for a network with its own classifier; empty without a "
    "study",
    "search_id": "id of the search for what it chose; empty for what it did not, and without a study",
    "configuration": "JSON, [head type or -1, threshold] per position; empty for backbone and gates of a study; of "
    "static and cascade [network, threshold or null] per network",
    "budget": "JSON of the budget or risk that was asked for; empty for an accuracy weight",
    "time_batch_size": "batch size by whose time it was chosen, empty if by MACs; only in tables with times",
    "times": "columns latency_ms_1, relative_time_1, ...: mean time of a batch of that size on the device measured, "
    "and the same over the plain backbone's; only in tables with times",
}
"""The columns of an operating-point table, in order, with their meanings."""

_BEFORE_EXITS, _AFTER_EXITS, _WITH_TIMES = tuple(COLUMNS)[:9], tuple(COLUMNS)[10:15], "time_batch_size"

RowKey = tuple[str, str, str, str, float | None, str, str]


class RowTime(NamedTuple):
    """The mean time of a batch, in ms and over that of the plain backbone, by stage bench's times."""

    batch_size: int
    latency_ms: float
    relative_time: float


@dataclass(frozen=True)
class ReportRow:
    """One operating point on one split; COLUMNS has the meaning of the fields."""

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
    search_id: str = ""
    configuration: str = ""
    budget: str = ""
    time_batch_size: int | None = None
    times: tuple[RowTime, ...] = ()

    @classmethod
    def of(cls, measured: OperatingPoint, **fields: Any) -> "ReportRow":
        """Returns the row of a measured operating point; `fields` are all others."""
        names = ("accuracy", "macs", "relative_macs", "exit_fractions")
        return cls(**{name: getattr(measured, name) for name in names}, **fields)

    def time(self, batch_size: int) -> RowTime:
        """Returns the time at a batch size. Raises KeyError if there is none."""
        for one in self.times:
            if one.batch_size == batch_size:
                return one
        raise KeyError(batch_size)

    @property
    def certified_risk(self) -> float | None:
        """The risk that the search certified it for; None if it did not."""
        risk: float | None = json.loads(self.budget).get("risk") if self.budget else None
        return risk

    @property
    def chosen_by(self) -> str:
        """The id of what chose the point: its search, or for others its training or backbone."""
        return self.search_id or self.point_id

    @property
    def key(self) -> RowKey:
        """What the rows of one operating point on both splits share."""
        settings = (self.accuracy_weight, self.configuration, self.budget)
        return (self.source, self.method, self.point_id, self.search_id, *settings)


def row_order(row: ReportRow) -> tuple[Any, ...]:
    """The sort key of a study's table."""

    def first_if_absent(value: float | None) -> float:
        return -math.inf if value is None else value

    return (
        row.source,
        row.method,
        first_if_absent(row.seed),
        first_if_absent(row.ce_ic_tradeoff),
        row.point_id,
        row.search_id,
        first_if_absent(row.accuracy_weight),
        row.configuration,
        row.budget,
        row.split != "validation",
        row.relative_macs,
        row.accuracy,
    )


def write_csv(path: Path, rows: Iterable[ReportRow], *, sort: bool = True) -> None:
    """Writes the table; reading it gives the same floats. Sorted, the same rows in any order give the same bytes.

    Raises ValueError for an unknown source, for splits that are not of one pair of SPLITS, and for a number that is
    not finite.
    """
    table = cells(sorted(rows, key=row_order) if sort else list(rows))
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)


def cells(rows: Sequence[ReportRow]) -> Iterator[list[str]]:
    """Yields the table's names and then the cells of each row. Raises ValueError as `write_csv` does."""
    num_exits = max((len(row.exit_fractions) for row in rows), default=0)
    batch_sizes = sorted({time.batch_size for row in rows for time in row.times})
    sources, splits = ({getattr(row, name) for row in rows} for name in ("source", "split"))
    if not sources <= set(SOURCES) or not any(splits <= set(pair) for pair in SPLITS):
        raise ValueError(f"sources {sources} on splits {splits}; known: {SOURCES} on one pair of {SPLITS}")
    exit_names = (f"exit_{exit_}" for exit_ in range(num_exits))
    yield [*_BEFORE_EXITS, *exit_names, *_AFTER_EXITS, *_time_columns(batch_sizes)]
    for row in rows:
        exits = [_text(fraction) for fraction in row.exit_fractions]
        exits += [""] * (num_exits - len(exits))
        before, after = ([_text(getattr(row, name)) for name in names] for names in (_BEFORE_EXITS, _AFTER_EXITS))
        yield [*before, *exits, *after, *_time_cells(row, batch_sizes)]


def _time_columns(batch_sizes: Sequence[int]) -> list[str]:
    """The columns of times; none without any."""
    names = [f"{name}_{batch}" for batch in batch_sizes for name in RowTime._fields[1:]]
    return [_WITH_TIMES, *names] if names else []


def _time_cells(row: ReportRow, batch_sizes: Sequence[int]) -> list[str]:
    if not batch_sizes:
        return []
    by_size = {time.batch_size: time for time in row.times}
    figures = [by_size[batch][1:] if batch in by_size else (None, None) for batch in batch_sizes]
    return [_text(row.time_batch_size), *(_text(figure) for pair in figures for figure in pair)]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, int | np.integer):
        return str(int(value))
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot stand in a table of operating points")
    return repr(float(value))


def read_csv(path: Path) -> list[ReportRow]:
    """The rows of a table that `write_csv` wrote. A damaged one is a Failure that names the file and the line."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            at = header.index(_WITH_TIMES) if _WITH_TIMES in header else len(header)
            num_exits = at - len(_BEFORE_EXITS) - len(_AFTER_EXITS)
            exits = tuple(f"exit_{exit_}" for exit_ in range(num_exits))
            sizes = [int(name.rpartition("_")[2]) for name in header[at + 1 :: 2]]
            if tuple(header) != (*_BEFORE_EXITS, *exits, *_AFTER_EXITS, *_time_columns(sizes)):
                raise ValueError("the header is not that of an operating-point table")
            return [_row(dict(zip(header, cells, strict=True)), exits) for cells in reader]
        except (ValueError, KeyError, csv.Error) as error:
            raise Failure(
                f"{path} is damaged in line {reader.line_num} ({error}); {move_aside(path.parent)}"
            ) from error


def _row(cells: dict[str, str], exits: tuple[str, ...]) -> ReportRow:
    def number(name: str) -> float | None:
        return float(cells[name]) if cells[name] else None

    return ReportRow(
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
        search_id=cells["search_id"],
        configuration=cells["configuration"],
        budget=cells["budget"],
        time_batch_size=int(cells[_WITH_TIMES]) if cells.get(_WITH_TIMES) else None,
        times=tuple(
            RowTime(int(name.removeprefix("latency_ms_")), float(value), float(cells[f"relative_time_{name[11:]}"]))
            for name, value in cells.items()
            if name.startswith("latency_ms_") and value
        ),
    )
