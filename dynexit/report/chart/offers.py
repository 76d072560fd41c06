"""What the page's card of budgets offers: points of a front, each with one budget that buys it, and its commands."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from dynexit.report.chart.groups import has_cost, reachable
from dynexit.report.judged.cards import INFER, budget_text_of, commands, commands_by_time
from dynexit.report.table import FrontPoint, relative_cost
from dynexit.search.operating_points import BASELINES, ReportRow, RowKey


def offers_of(
    front: Sequence[FrontPoint],
    cost: int | None,
    rows: Sequence[ReportRow],
    base: float,
    numbers: Mapping[RowKey, int],
    study_dir: Path,
) -> list[dict[str, Any]]:
    """Returns what the slider can choose of the study's front by a cost, in its order, as numbers and texts for JSON.

    `budget` and the commands name the same limit, within which the point is the front's best on validation; `loss` is
    one of accuracy in points, for which it is the cheapest, or None where a cheaper one is as good as the backbone
    (`base`). `numbers` are the points' by their keys.
    """
    bought = None if cost is None else _ByTime(rows, cost)
    losses = [max(0.0, 100 * (base - one.validation.accuracy)) for one in front]
    shares = [relative_cost(one.validation) for one in front]
    milliseconds = [] if cost is None else [one.validation.time(cost).latency_ms for one in front]
    found: list[dict[str, Any]] = []
    for one in reachable(front, cost, base):
        row = one.validation
        if cost is None:
            limit = budget_text_of(row.relative_macs, shares)
            budget, given = f"at most {_percent(limit)} % of the backbone’s MACs", commands(one, limit, study_dir)
        else:
            limit = budget_text_of(row.time(cost).latency_ms, milliseconds)
            budget, given = f"at most {limit} ms for a batch of {cost}", commands_by_time(one, limit, cost, study_dir)
        if bought is not None and not bought.is_chosen(row, float(limit)):
            del given[INFER]
        is_first = not any(other["loss"] == "0" for other in found)
        loss = max(0.0, 100 * (base - row.accuracy))
        place = {"point": numbers[row.key], "cost": relative_cost(row, cost)}
        text = (budget_text_of(loss, losses) if loss else "0") if base and is_first else None
        found.append(place | {"budget": budget, "loss": text, "commands": given})
    return found


def _percent(share: str) -> str:
    return f"{(100 * Decimal(share)).normalize():f}"


class _ByTime:
    """What `dynexit infer` chooses within a limit in milliseconds.

    Where searches were given different times of the plain backbone, it need not be of the front by relative time.
    """

    def __init__(self, rows: Sequence[ReportRow], batch_size: int) -> None:
        ours = (row for row in rows if row.split == "validation" and row.source not in ("backbone", *BASELINES))
        timed = sorted(has_cost(ours, batch_size), key=lambda row: row.time(batch_size).latency_ms)
        self._limits = [row.time(batch_size).latency_ms for row in timed]
        self._best = list(itertools.accumulate(((-row.accuracy, row.macs) for row in timed), min))

    def is_chosen(self, row: ReportRow, limit: float) -> bool:
        return self._best[bisect.bisect_right(self._limits, limit) - 1] == (-row.accuracy, row.macs)
