"""Time beside MACs: what every operating point takes on the device that was measured, and the fronts by time."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynexit.core.latency import LatencyTable
from dynexit.report.page import Figure, PageSection
from dynexit.report.table import at_tenths, front_of, percent
from dynexit.report.time_figure import time_figure
from dynexit.search.operating_points import ReportRow, RowTime


@dataclass(frozen=True)
class PointTimes:
    """The times that hold for a point's rows, and whether gates decide where thresholds are."""

    table: LatencyTable
    by_gates: bool


def with_times(rows: Sequence[ReportRow], times: Mapping[str, PointTimes]) -> list[ReportRow]:
    """The rows with the times of every measured batch size. `times` are by the id that chose a row; others stay."""
    known: dict[Any, tuple[RowTime, ...]] = {}  # many weights give the same configuration
    found = []
    for row in rows:
        if row.chosen_by in times:
            measured = times[row.chosen_by]
            place = (id(measured), row.source, row.configuration, row.exit_fractions)
            if place not in known:
                known[place] = _times(row, measured)
            row = replace(row, times=known[place])
        found.append(row)
    return found


def _times(row: ReportRow, measured: PointTimes) -> tuple[RowTime, ...]:
    table = measured.table
    gates = row.source == "gates" or measured.by_gates
    heads = [head for head, _ in json.loads(row.configuration)] if row.configuration else [0] * len(table.positions)

    def relative(batch: int) -> float:
        if row.source == "backbone":
            return 1.0
        return table.relative(heads, row.exit_fractions, batch, gates=gates)

    shares = {batch: relative(batch) for batch in table.batch_sizes}
    return tuple(RowTime(batch, 1000 * table.times[batch].backbone * share, share) for batch, share in shares.items())


def measured_batch_sizes(rows: Sequence[ReportRow]) -> list[int]:
    """The batch sizes that any row has a time of, rising."""
    return sorted({time.batch_size for row in rows for time in row.times})


def machine_text(machine: Mapping[str, Any]) -> str:
    """Where and when times were measured, in words."""
    threads = "" if machine.get("device") == "cuda" else f", {machine.get('threads')} threads"
    return (
        f"{machine.get('device_name')} ({machine.get('device')}{threads}), {machine.get('precision')}, torch "
        f"{machine.get('torch')}, {str(machine.get('date'))[:10]}"
    )


def time_sections(
    rows: Sequence[ReportRow], table: LatencyTable, directory: Path, describe: Callable[[ReportRow], str]
) -> list[PageSection]:
    """Writes time.png into `directory`, and gives the page's part on times: the front by time of every batch size."""
    paths = {theme: directory / f"time{suffix}.png" for theme, suffix in (("light", ""), ("dark", "_dark"))}
    sizes = measured_batch_sizes(rows)
    for theme, path in paths.items():
        time_figure(rows, sizes, path, theme=theme)
    remark = (
        f"Measured on {machine_text(table.machine)}. Mean time of a batch over the plain backbone's, by the times of "
        "stages and exits. Fronts are chosen on validation by accuracy and time, and shown with test values: the "
        "fastest point, then the best within every further tenth. Another device or batch size has other times."
    )
    figure = Figure(paths["light"], "Accuracy against relative time", _CAPTION, paths["dark"])
    cells = [
        _cells(batch, point.test, point.accuracy_drop, describe) for batch in sizes for point in _front(rows, batch)
    ]
    return [PageSection("Time", remark, cells, figure)]


_CAPTION = (
    "Test accuracy against mean time relative to the plain backbone, by batch size. Crosses are the points of the "
    "front by MACs at the times that they take. A cross below the line is on no front by time: it takes fewer MACs "
    "than a point on the line, but as much time."
)


def _front(rows: Sequence[ReportRow], batch: int) -> list[Any]:
    return at_tenths(front_of([row for row in rows if row.times], batch), batch)


def _cells(batch: int, row: ReportRow, drop: float, describe: Callable[[ReportRow], str]) -> dict[str, Any]:
    time = row.time(batch)
    return {
        "batch size": batch,
        "relative time": f"{time.relative_time:.3f}",
        "ms a batch": f"{time.latency_ms:.3g}",
        "relative MACs": f"{row.relative_macs:.3f}",
        "accuracy": percent(row.accuracy),
        "vs backbone": f"{-100 * drop:+.2f} pt".replace("-", "−"),
        "chosen by": "MACs" if row.time_batch_size is None else f"time, batch {row.time_batch_size}",
        "configuration": describe(row),
    }
