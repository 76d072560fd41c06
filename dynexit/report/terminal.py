"""What is shown on the terminal: the short table that `dynexit run` ends with, and the states of `dynexit status`."""

import math
import os
import sys
import time
import webbrowser
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynexit.report.table import at_tenths, percent, summary
from dynexit.search.operating_points import ReportRow, read_csv


def short_table(rows: Iterable[ReportRow]) -> str:
    """About ten lines: the front's points at every tenth of the backbone's MACs, on test, and the gates' span.

    Rows without an operating point on both splits give one sentence.
    """
    rows = list(rows)
    read = summary(rows)
    if not read.front:
        return "no operating points on both validation and test yet"
    sizes = next((row.times for row in rows if row.times), ())
    heading = "time at batch " + "/".join(str(time.batch_size) for time in sizes) if sizes else ""
    width = max(len(heading), 5 * len(sizes))

    def times(row: ReportRow) -> str:
        return "/".join(f"{time.relative_time:.2f}" for time in row.times).rjust(width) + "  " if sizes else ""

    lines = [f"relative MACs  {heading}{'  ' * bool(sizes)}accuracy  vs backbone  source"]
    for point in at_tenths(read.front):
        row = point.test
        gain = "" if math.isnan(point.accuracy_drop) else f"{-100 * point.accuracy_drop:+.2f}"
        lines.append(f"{row.relative_macs:13.3f}  {times(row)}{percent(row.accuracy):>8}  {gain:>11}  {_name(row)}")
    if read.backbone_accuracy is not None and lines[-1].split()[-1] != "backbone":
        whole = next(row for row in rows if row.source == "backbone")
        lines.append(f"{1:13.3f}  {times(whole)}{percent(read.backbone_accuracy):>8}  {'':>11}  backbone")
    if read.gates_span:
        low, high = read.gates_span
        lines.append(f"the gates span {low:.2f} to {high:.2f} relative MACs")
    return "\n".join(lines)


def _name(row: ReportRow) -> str:
    if row.source == "backbone":
        return "backbone"
    named = {"tradeoff": row.ce_ic_tradeoff, "weight": row.accuracy_weight, "seed": row.seed}
    settings = "".join(f", {name} {value:g}" for name, value in named.items() if value is not None)
    return f"{row.source} ({row.method}{settings})"


def result(directory: Path) -> str:
    """Returns the short table of a finished report in `directory`, and where its page is."""
    return f"{short_table(read_csv(directory / 'operating_points.csv'))}\nreport: {directory / 'report.html'}"


_COLOURS = {"done": "green", "failed": "red", "damaged": "red", "cancelled": "yellow"}


def status_table(points: Sequence[Mapping[str, str]], report: str) -> str:
    """Returns the states of a study's points as a table of text, with the report's state and a line of counts."""
    cells = [list(points[0]), *(list(point.values()) for point in points)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([*lines, *_closing(points, report)])


def show_status(points: Sequence[Mapping[str, str]], report: str, notes: Sequence[str], *, redraw: bool) -> None:
    """Prints notes and the states of a study's points: with colour on a terminal, else as plain text.

    With `redraw` the screen of a terminal is cleared first, and the time is printed.
    """
    console, now = Console(highlight=False), [time.strftime("%H:%M:%S")] if redraw else []
    if not console.is_terminal:
        print("\n".join([*now, *(f"dynexit: {note}" for note in notes), status_table(points, report)]), flush=True)
        return
    if redraw:
        console.clear()
    table = Table(box=None, pad_edge=False)
    names = [name for name in points[0] if any(point[name] for point in points)]
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name in ("id", "state", "step"))
    for point in points:
        colour = _COLOURS.get(point["state"], "cyan" if "running" in point["state"] else "")
        table.add_row(*(Text(point[name], style=colour if name == "state" else "") for name in names))
    console.print(*now, *(Text(f"dynexit: {note}") for note in notes), table, *_closing(points, report), sep="\n")


def _closing(points: Sequence[Mapping[str, str]], report: str) -> list[str]:
    counts = Counter(point["state"] for point in points)
    return [f"report: {report}", ", ".join(f"{count} {state}" for state, count in counts.items())]


def open_page(link: str) -> None:
    """Prints a link, and opens it if this machine has a screen: elsewhere a browser would take the terminal."""
    print(link, flush=True)
    if sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")):
        webbrowser.open(link)
