"""The report's table of budgets: for each the best point's configuration, and whether it holds on test.

What was asked for in the study's `search` section comes first; without any, some budgets of relative MACs are read off
the front.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dynexit.report.judged.outcomes import Judgement, Judgements
from dynexit.report.judged.words import at_least, at_most, share_text
from dynexit.report.table import FrontPoint, backbone_accuracy, front_of, percent, within_budgets
from dynexit.search.budgets import KINDS, Budget
from dynexit.search.operating_points import ReportRow

_BUDGETS = (0.25, 0.3, 0.4, 0.45, 0.5, 0.6, 0.75)
_WORDS = {
    "relative_macs": "at most {:g} relative MACs",
    "relative_latency": "at most {:g} of the backbone's time",
    "latency_ms": "at most {:g} ms",
    "min_accuracy": "at least {:g} accuracy",
    "max_accuracy_drop": "at most {:g} of accuracy lost",
}


def budget_cells(
    rows: Sequence[ReportRow],
    entries: Mapping[str, Sequence[Mapping[str, Any]]],
    describe: Callable[[ReportRow], str],
    judged: Judgements | None = None,
) -> list[dict[str, Any]]:
    """The table's rows. `entries` are the budgets.json of every point by its id, `rows` all operating points.

    With the `judged` figures of test a budget holds where the whole interval keeps it.
    """
    judged = judged or {}
    asked = _by_budget(entries)
    if not asked:
        return _off_the_front(rows, describe, judged)
    chosen = budget_answers(rows, entries)
    base = {split: backbone_accuracy(rows, split) or 0.0 for split in ("validation", "test")}
    table: list[dict[str, Any]] = []
    for text, answers in asked.items():
        budget = json.loads(text)
        if text not in chosen:
            table.append({"budget": _words(budget), "configuration": _nearest(budget, answers)})
            continue
        test, entry = chosen[text].test, _best(budget, answers)[1]
        table.append(
            {
                "budget": _words(budget),
                "configuration": describe(test),
                "leave": _shares(test),
                "validation": _figures(budget, entry["validation"], judged.get((test.key, "validation"))),
                "test": _figures(budget, entry["test"], judged.get((test.key, "test"))),
                "holds on test": _holds(budget, entry["test"], base["test"], judged.get((test.key, "test"))),
            }
        )
    return table


def budget_answers(
    rows: Sequence[ReportRow], entries: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, FrontPoint]:
    """By the text of each budget that was asked for and attained the point that is best for it on validation."""
    found = {(row.search_id, row.budget, row.split): row for row in rows if row.budget}
    chosen = {}
    for text, answers in _by_budget(entries).items():
        if any("exits" in entry for _, entry in answers):
            point, _ = _best(json.loads(text), answers)
            chosen[text] = FrontPoint(found[point, text, "validation"], found[point, text, "test"], math.nan)
    return chosen


def _nearest(budget: Mapping[str, Any], answers: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The message of the point that comes nearest to a budget that none attains."""
    best = max if "min_accuracy" in budget else min
    return str(best((entry for _, entry in answers), key=lambda entry: entry["nearest"])["unattainable"])


def _best(budget: Mapping[str, Any], answers: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, Mapping[str, Any]]:
    attained = [answer for answer in answers if "exits" in answer[1]]
    return min(attained, key=lambda answer: _rank(budget, answer[1]["validation"]))


def budget_text(budget: Mapping[str, Any]) -> str:
    """The budget as the table of operating points holds it: what was asked for, as JSON."""
    names = [name for name in (*KINDS, "latency_ms", "risk", "confidence", "batch_size") if name in budget]
    return json.dumps({name: budget[name] for name in names})


def _by_budget(
    entries: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    answers: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for point, of_point in entries.items():
        for entry in of_point:
            answers.setdefault(budget_text(entry["budget"]), []).append((point, entry))
    return answers


def _budget(budget: Mapping[str, Any]) -> Budget:
    ((kind, value), *_) = budget.items()
    return Budget("relative_latency" if kind == "latency_ms" else kind, value)  # in ms, as what it is compared with


def _cost(budget: Mapping[str, Any], figures: Mapping[str, Any]) -> float:
    kind = next((kind for kind in ("latency_ms", "relative_latency") if kind in budget), "relative_macs")
    return float(figures[kind])


def _rank(budget: Mapping[str, Any], figures: Mapping[str, Any]) -> tuple[float, float]:
    if "risk" in budget:
        return (figures["relative_macs"], -figures["accuracy"])
    return _budget(budget).rank(figures["accuracy"], _cost(budget, figures))


def _holds(
    budget: Mapping[str, Any], figures: Mapping[str, Any], base_accuracy: float, judgement: Judgement | None
) -> bool | str:
    if "risk" in budget:
        return bool(figures["risk"] <= budget["risk"])
    if judgement is not None:
        if "relative_macs" in budget and judgement.relative_macs is not None:
            return at_most(judgement.relative_macs, budget["relative_macs"])
        if "min_accuracy" in budget:
            return at_least(judgement.accuracy, budget["min_accuracy"])
        if "max_accuracy_drop" in budget:
            return at_least(judgement.difference, -budget["max_accuracy_drop"])
    asked = _budget(budget)
    return asked.holds(asked.measure(figures["accuracy"], _cost(budget, figures), base_accuracy))


def _words(budget: Mapping[str, Any]) -> str:
    if "risk" in budget:
        return f"risk at most {budget['risk']:g}, certified at {budget['confidence']:g}"
    ((kind, value), *_) = budget.items()
    return _WORDS[kind].format(value) + (f" at batch size {budget['batch_size']}" if "batch_size" in budget else "")


def _figures(budget: Mapping[str, Any], figures: Mapping[str, Any], judgement: Judgement | None = None) -> str:
    text = _at(_cost(budget, figures), figures["accuracy"], judgement)
    return text + (f", risk {figures['risk']:.4f}" if "risk" in budget else "")


def _at(cost: float, accuracy: float, judgement: Judgement | None = None) -> str:
    if judgement is not None:
        return f"{cost:.3f} at\N{NO-BREAK SPACE}{share_text(judgement.accuracy)}"
    return f"{cost:.3f} at {percent(accuracy)}".replace(" ", "\N{NO-BREAK SPACE}")


def _shares(row: ReportRow) -> str:
    return " / ".join(f"{100 * share:.0f}" for share in row.exit_fractions) + " %"


def _off_the_front(
    rows: Sequence[ReportRow], describe: Callable[[ReportRow], str], judged: Judgements
) -> list[dict[str, Any]]:
    table: dict[int, dict[str, Any]] = {}
    front = front_of(rows)
    for value in _BUDGETS:
        for point in within_budgets(front, [value]):
            # a larger budget that buys nothing more needs no line
            table.setdefault(id(point), _front_cells(point, value, describe, judged))
    return list(table.values())


def _front_cells(
    point: FrontPoint, value: float, describe: Callable[[ReportRow], str], judged: Judgements
) -> dict[str, Any]:
    validation, test = point.validation, point.test
    judgement = judged.get((test.key, "test"))
    return {
        "budget": _WORDS["relative_macs"].format(value),
        "configuration": describe(test),
        "leave": _shares(test),
        "validation": _at(validation.relative_macs, validation.accuracy, judged.get((test.key, "validation"))),
        "test": _at(test.relative_macs, test.accuracy, judgement),
        "holds on test": at_most(judgement.relative_macs, value)
        if judgement and judgement.relative_macs
        else test.relative_macs <= value,
    }
