"""What `dynexit run` ends with on the terminal."""

import math
from collections.abc import Iterable

from dynexit.report.table import at_tenths, percent, summary
from dynexit.search.operating_points import ReportRow


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
