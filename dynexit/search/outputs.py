"""What a stand-alone search writes: `configurations.json` and `operating_points.csv`."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynexit.core.tradeoff import Configuration, OperatingPoint, pareto_front
from dynexit.errors import UserError
from dynexit.run_dir import atomic_write
from dynexit.search.problem import Problem, objective_of

SEARCHED, JUDGED = "train", "val"


@dataclass(frozen=True)
class Answer:
    """A configuration and what asked for it: a weight, a budget (with the weight it lies at), or a risk (no weight)."""

    configuration: Configuration
    accuracy_weight: float | None
    budget: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Judge:
    """Both records with their MACs, and with the cost that is searched: MACs too, or time."""

    problems: Mapping[str, Problem]
    costed: Mapping[str, Problem]
    normalize: bool

    def entry(self, answer: Answer) -> dict[str, Any]:
        """The answer as `configurations.json` holds it, with its figures on both records.

        `objective` is about the cost searched, null without a weight and where it is undefined on the record judged;
        `relative_latency` is there only where time was searched.
        """
        entry: dict[str, Any] = {"accuracy_weight": answer.accuracy_weight, "exits": answer.configuration.to_json()}
        for split in (SEARCHED, JUDGED):
            point = self.problems[split].evaluate(answer.configuration)
            entry[split] = {"relative_macs": point.relative_macs, "accuracy": point.accuracy}
            if self.costed is not self.problems:
                timed = self.costed[split].evaluate(answer.configuration)
                entry[split]["relative_latency"] = timed.relative_macs
            entry[split]["objective"] = self._objective(split, answer)
        return entry if answer.budget is None else {**entry, "budget": dict(answer.budget)}

    def _objective(self, split: str, answer: Answer) -> float | None:
        if answer.accuracy_weight is None:
            return None
        problem = self.costed[split]
        try:
            objective = objective_of(problem, answer.accuracy_weight, self.normalize)
        except UserError:
            return None
        point, count = problem.evaluate(answer.configuration), problem.num_samples
        return objective(point.accuracy * count, point.macs * count)

    def cost(self, entry: Mapping[str, Any], split: str) -> float:
        """The relative cost that was searched."""
        figures = entry[split]
        return float(figures["relative_macs" if self.costed is self.problems else "relative_latency"])


def write_points(path: Path, problems: Mapping[str, Problem], answers: Sequence[Answer], method: str) -> None:
    """Writes one row per answer and record, the backbone first, with the columns of a study's table and `budget`.

    `on_front`: on the Pareto front of accuracy and MACs of the record that was searched. Columns that a study has and a
    stand-alone search has not are empty.
    """
    positions = len(problems[SEARCHED].costs.positions)
    backbone = Answer(Configuration(((-1, 1.0),) * positions), None)
    rows = [("backbone", backbone), *(("search", answer) for answer in answers)]
    points = {
        split: [problem.evaluate(answer.configuration) for _, answer in rows] for split, problem in problems.items()
    }
    searched = points[SEARCHED]
    front = pareto_front([point.accuracy for point in searched], [point.macs for point in searched])
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [
                "source",
                "method",
                "seed",
                "ce_ic_tradeoff",
                "accuracy_weight",
                "split",
                "accuracy",
                "macs",
                "relative_macs",
            ]
            + [f"exit_{exit_}" for exit_ in range(positions + 1)]
            + ["on_front", "point_id", "configuration", "budget"]
        )
        for place, (source, answer) in enumerate(rows):
            for split in (SEARCHED, JUDGED):
                on_front = "true" if front[place] else "false"
                row = [source, method if source == "search" else "", "", "", _text(answer.accuracy_weight), split]
                row += _figures(points[split][place])
                row += [on_front, "", json.dumps(answer.configuration.to_json())]
                writer.writerow([*row, json.dumps(dict(answer.budget)) if answer.budget else ""])


def _figures(point: OperatingPoint) -> list[str]:
    return [_text(figure) for figure in (point.accuracy, point.macs, point.relative_macs, *point.exit_fractions)]


def _text(value: float | None) -> str:
    return "" if value is None else repr(float(value))


def table(judge: Judge, entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """The entries as lines of text, costs and accuracies in percent."""
    name = "MACs" if judge.costed is judge.problems else "time"
    lines = [
        f"{'':34}{'train':>9}{'':>9}{'val':>9}",
        f"{'asked for':34}{name:>9}{'accuracy':>9}{name:>9}{'accuracy':>9}",
    ]
    for entry in entries:
        asked = f"accuracy weight {entry['accuracy_weight']:g}" if "budget" not in entry else _asked(entry["budget"])
        figures = [
            f"{100 * figure:8.2f}%"
            for split in (SEARCHED, JUDGED)
            for figure in (judge.cost(entry, split), entry[split]["accuracy"])
        ]
        lines.append(f"{asked:34}{''.join(figures)}")
    return lines


def _asked(budget: Mapping[str, Any]) -> str:
    if "risk" in budget:
        return f"risk {budget['risk']:g} at confidence {budget['confidence']:g}"
    ((kind, value),) = budget.items()
    return f"{kind.replace('_', ' ')} {value:g}"
