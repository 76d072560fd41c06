"""The front as tables: front.csv with every distinct point, front.md and front.tex with even steps, for papers."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynexit.core.statistics import Interval
from dynexit.files import spreadsheet_text
from dynexit.report.judged.outcomes import Judgement, Judgements
from dynexit.report.judged.words import difference_text, share_text
from dynexit.report.table import FrontPoint, percent, within_budgets
from dynexit.run_dir import atomic_write, write_text
from dynexit.search.operating_points import ReportRow

FRONT_CSV, FRONT_MD, FRONT_TEX = "front.csv", "front.md", "front.tex"
_MOST_ROWS = 16
_TEX = {"\\": r"\textbackslash{}", **{sign: f"\\{sign}" for sign in "&%$#_{}"}, "~": r"\textasciitilde{}", "−": "$-$"}


@dataclass(frozen=True)
class FrontEntry:
    """A point of the front, or the backbone, with its judgements (None without a record) and its way to exit."""

    validation: ReportRow
    test: ReportRow
    on_validation: Judgement | None
    on_test: Judgement | None
    words: str

    @property
    def accuracy(self) -> str:
        """Its test accuracy in words."""
        return percent(self.test.accuracy) if self.on_test is None else share_text(self.on_test.accuracy)

    @property
    def difference(self) -> str:
        """By how much it is more accurate than the backbone on test; empty for the backbone."""
        compared = self.test.source != "backbone" and self.on_test is not None
        return difference_text(self.on_test.difference) if compared and self.on_test else ""

    @property
    def verdict(self) -> str:
        """What the difference shows; empty for the backbone."""
        return self.on_test.verdict if self.difference and self.on_test else ""


def entries_of(
    front: Sequence[FrontPoint], rows: Sequence[ReportRow], judged: Judgements, describe: Callable[[ReportRow], str]
) -> list[FrontEntry]:
    """The front's points by rising cost, then the study's backbones if they are not on it."""
    pairs = [(point.validation, point.test) for point in front]
    there = {validation.key for validation, _ in pairs}
    whole = {(row.key, row.split): row for row in rows if row.source == "backbone" and row.key not in there}
    keys = [key for key, split in whole if split != "test" and (key, "test") in whole]
    pairs += [(whole[key, "validation"], whole[key, "test"]) for key in keys]
    return [
        FrontEntry(
            validation,
            test,
            judged.get((validation.key, validation.split)),
            judged.get((test.key, test.split)),
            describe(test),
        )
        for validation, test in pairs
    ]


def even_steps(entries: Sequence[FrontEntry], most: int = _MOST_ROWS) -> list[FrontEntry]:
    """A table's worth: all of few points; else the best within `most` evenly spaced costs, and every backbone."""
    ways = [one for one in entries if one.validation.on_front and one.validation.source != "backbone"]
    front = [FrontPoint(one.validation, one.test, 0.0) for one in ways]
    kept = {point.test.key for point in front}
    if len(front) > most:
        costs = [point.validation.relative_macs for point in front]
        kept = {point.test.key for point in within_budgets(front, np.linspace(costs[0], costs[-1], most).tolist())}
    return [one for one in entries if one.test.key in kept or one.test.source == "backbone"]


def write_front(directory: Path, entries: Sequence[FrontEntry]) -> None:
    """Writes front.csv, front.md and front.tex. Fractions, MACs and differences are as in operating_points.csv."""
    num_exits = max((len(one.test.exit_fractions) for one in entries), default=0)
    table = [_csv_cells(one, num_exits) for one in entries]
    with (
        atomic_write(directory / FRONT_CSV) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, list(table[0]) if table else ["source"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: spreadsheet_text(value) for name, value in row.items()} for row in table)
    shown = [_paper_cells(one) for one in even_steps(entries)]
    write_text(directory / FRONT_MD, _markdown(shown))
    write_text(directory / FRONT_TEX, _tex(shown))


def _csv_cells(one: FrontEntry, num_exits: int) -> dict[str, Any]:
    row = one.test
    cells: dict[str, Any] = {"source": row.source, "method": row.method, "seed": row.seed}
    cells |= {"ce_ic_tradeoff": row.ce_ic_tradeoff, "accuracy_weight": row.accuracy_weight, "budget": row.budget}
    cells |= {"on_front": "true" if one.validation.on_front else "false", "macs": row.macs}
    for side, judgement in ((one.validation, one.on_validation), (one.test, one.on_test)):
        split, judged = side.split, judgement is not None and row.source != "backbone"
        cells[f"{split}_relative_macs"] = side.relative_macs
        cells |= _named(f"{split}_accuracy", judgement.accuracy if judgement else None, side.accuracy)
        cells |= _named(f"{split}_difference", judgement.difference if judged and judgement else None, None)
    cells |= {"verdict": one.verdict, "point_id": row.point_id, "search_id": row.search_id}
    cells |= {"configuration": row.configuration, "words": one.words}
    return cells | {
        f"exit_{exit_}": row.exit_fractions[exit_] if exit_ < len(row.exit_fractions) else None
        for exit_ in range(num_exits)
    }


def _named(name: str, interval: Interval | None, value: float | None) -> dict[str, float | None]:
    if interval is None:
        return {name: value, f"{name}_low": None, f"{name}_high": None}
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _paper_cells(one: FrontEntry) -> dict[str, str]:
    return {
        "relative MACs": f"{one.test.relative_macs:.3f}",
        "accuracy (95 % interval)": one.accuracy,
        "vs backbone, points": one.difference,
        "verdict": one.verdict or "the backbone",
        "point": one.test.point_id,
        "configuration": one.words,
    }


def _markdown(table: Sequence[dict[str, str]]) -> str:
    if not table:
        return ""
    lines = [list(table[0]), [":--"] * len(table[0]), *(list(row.values()) for row in table)]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def _tex(table: Sequence[dict[str, str]]) -> str:
    """A booktabs table without the configurations, which no column holds."""
    if not table:
        return ""
    rows = [{name: text for name, text in row.items() if name != "configuration"} for row in table]
    lines = [" & ".join(map(_escape, line)) + r" \\" for line in (rows[0], *(row.values() for row in rows))]
    head = [f"\\begin{{tabular}}{{{'l' * len(rows[0])}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*head, *lines[1:], r"\bottomrule", r"\end{tabular}", ""])


def _escape(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text).replace("\N{NO-BREAK SPACE}", "~")
