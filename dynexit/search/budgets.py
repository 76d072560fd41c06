"""What people ask for instead of a weight: the best accuracy within a cost, the least cost that keeps an accuracy.

A budget is met on the record that is searched. Shapes: N samples, P positions, H head types.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dynexit.core.cost import ExitCosts
from dynexit.errors import UserError
from dynexit.search.exact import Candidate, Exits, Front
from dynexit.search.problem import objective_of
from dynexit.search.tables import EVERYONE, OFF, midpoint

KINDS = ("relative_macs", "relative_latency", "min_accuracy", "max_accuracy_drop")
_PICOSECONDS = 10**12


@dataclass(frozen=True)
class Budget:
    """`relative_macs` or `relative_latency`: at most that mean cost, over the backbone's, at the best accuracy;
    `min_accuracy`: at least that, at the least cost; `max_accuracy_drop`: the same, below the backbone's accuracy."""

    kind: str
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"budget is {self.kind!r}, allowed are {', '.join(KINDS)}; name one of them")
        allowed = "above 0" if self.kind.startswith("relative") else "0 to 1"
        if not (self.value > 0 if self.kind.startswith("relative") else 0 <= self.value <= 1):
            raise UserError(f"{self.kind} is {self.value}, allowed is {allowed}")


@dataclass(frozen=True)
class _Limit:
    """Whether sums over the record keep within a budget, and which of two that do is the better (the larger key)."""

    keeps: Callable[[Any, Any], Any]
    key: Callable[[int, int], tuple[int, int]]


def within(front: Front, budget: Budget) -> tuple[float, Candidate]:
    """(accuracy weight, configuration) of a budget, the best that the front and single changes from it hold.

    The weight is that of the edge of the front on which the budget lies. Raises UserError for a budget that nothing
    attains, naming the nearest that is attained.
    """
    limit = _limit(front, budget)
    ends = front.solve([0.0, 1.0])
    cheapest, most_accurate = ends
    by_cost = budget.kind.startswith("relative")
    if not limit.keeps(*((cheapest.correct, cheapest.macs) if by_cost else (most_accurate.correct, most_accurate.macs))):
        raise UserError(_unattainable(front, budget, cheapest if by_cost else most_accurate))
    weight = _bisect(front, limit, cheapest, most_accurate)
    best = max(
        (candidate for candidate in front.pool.values() if limit.keeps(candidate.correct, candidate.macs)),
        key=lambda candidate: limit.key(candidate.correct, candidate.macs),
    )
    return weight, _climb(front, limit, best)


def _limit(front: Front, budget: Budget) -> _Limit:
    problem = front.problem
    if budget.kind.startswith("relative"):
        total = problem.num_samples * problem.costs.full_macs
        return _Limit(lambda correct, macs: macs / total <= budget.value, lambda correct, macs: (correct, -macs))
    base = problem.base_correct if budget.kind == "max_accuracy_drop" else 0
    wanted = base / problem.num_samples - budget.value if base else budget.value
    # a sample's worth of rounding must not turn 0.75 of 1,000 into 751
    least = wanted * problem.num_samples - 1e-6
    return _Limit(lambda correct, macs: correct >= least, lambda correct, macs: (-macs, correct))


def _unattainable(front: Front, budget: Budget, nearest: Candidate) -> str:
    point = nearest.point(front.problem.costs.full_macs)
    reached = {
        "relative_macs": f"the cheapest configuration has {point.relative_macs:.6g}",
        "relative_latency": f"the fastest configuration has {point.relative_macs:.6g}",
        "min_accuracy": f"the most accurate configuration has {point.accuracy:.6g}",
        "max_accuracy_drop": "the most accurate configuration loses "
        f"{front.problem.base_correct / point.num_samples - point.accuracy:.6g}",
    }[budget.kind]
    return f"{budget.kind} {budget.value} is unattainable on the searched record: {reached}; ask for that or more room"


def _bisect(front: Front, limit: _Limit, cheap: Candidate, accurate: Candidate) -> float:
    """The weight of the front's edge across the limit; the pool then holds both its ends.

    The next weight asked for is always the one at which both ends cost the same; once the front has nothing below them
    there, they are neighbours on it.
    """
    per_mac = objective_of(front.problem, 0.0, front.normalize).per_mac
    per_correct = objective_of(front.problem, 1.0, front.normalize).per_correct
    weight = 0.0 if limit.keeps(cheap.correct, cheap.macs) else 1.0
    while cheap.correct < accurate.correct and cheap.macs < accurate.macs:
        dearer = per_mac * (accurate.macs - cheap.macs)
        weight = dearer / (dearer + per_correct * (accurate.correct - cheap.correct))
        (middle,) = front.solve([weight])
        if not (cheap.macs < middle.macs < accurate.macs and cheap.correct < middle.correct < accurate.correct):
            break
        if limit.keeps(middle.correct, middle.macs) == limit.keeps(cheap.correct, cheap.macs):
            cheap = middle
        else:
            accurate = middle
    return weight


def _climb(front: Front, limit: _Limit, best: Candidate) -> Candidate:
    """The best within the limit after single changes, as long as one is better: between two points of the front there
    are configurations that no weight asks for."""
    while True:
        better = None
        highest = limit.key(best.correct, best.macs)
        for position in range(len(best.exits)):
            for head, thresholds, correct, macs in _single_changes(front, best.exits, position):
                kept = np.flatnonzero(limit.keeps(correct, macs))
                if len(kept):
                    keys = [limit.key(c, m) for c, m in zip(correct[kept], macs[kept], strict=True)]
                    place = max(range(len(keys)), key=keys.__getitem__)
                    if keys[place] > highest:
                        highest = keys[place]
                        exit_ = (head, float(thresholds(int(kept[place]))))
                        better = (*best.exits[:position], exit_, *best.exits[position + 1 :])
        if better is None:
            return best
        best = front.candidate(better)


def _single_changes(front: Front, exits: Exits, position: int) -> list[tuple[int, Callable[[int], float], Any, Any]]:
    """Per head type at one position: a threshold by its place, and the sums (correct, MACs) at every place."""
    return []


def latency_costs(table: Mapping[str, Any], costs: ExitCosts) -> ExitCosts:
    """Costs in picoseconds instead of MACs, for the positions and head types of `costs`.

    `table`: `stage_seconds`, P + 1 times of the backbone, each from the position before (the first from the input, the
    last to the end); `head_seconds`, P lists of a time per head type; `gate_seconds`, P times, 0 where it is left out.
    Raises UserError for a missing or unknown key, a wrong number of times and a time that is negative or not a number.
    """
    num_positions, num_heads = len(costs.positions), len(costs.head_types)
    unknown = sorted(set(table) - {"stage_seconds", "head_seconds", "gate_seconds"})
    missing = sorted({"stage_seconds", "head_seconds"} - set(table))
    if unknown or missing:
        raise UserError(
            f"a latency table holds stage_seconds, head_seconds and maybe gate_seconds; "
            f"{'unknown' if unknown else 'missing'}: {', '.join(unknown or missing)}"
        )
    stages = _times(table["stage_seconds"], "stage_seconds", num_positions + 1)
    if len(table["head_seconds"]) != num_positions:
        raise UserError(f"head_seconds has {len(table['head_seconds'])} lists, expected {num_positions}, one a position")
    heads = tuple(tuple(_times(row, "head_seconds", num_heads)) for row in table["head_seconds"])
    gates = _times(table.get("gate_seconds", [0.0] * num_positions), "gate_seconds", num_positions)
    path = [int(total) for total in np.cumsum(stages)]
    if not path[-1]:
        raise UserError("stage_seconds are all 0; give measured times")
    return replace(costs, full_macs=path[-1], backbone_macs=tuple(path[:-1]), head_macs=heads, gate_macs=tuple(gates))


def _times(values: Any, name: str, expected: int) -> list[int]:
    if len(values) != expected:
        raise UserError(f"{name} has {len(values)} times, expected {expected}; measure every stage of the model recorded")
    for value in values:
        if not (isinstance(value, int | float) and 0 <= value < float("inf")):
            raise UserError(f"{name} holds {value!r}, allowed are seconds of 0 or more")
    return [round(value * _PICOSECONDS) for value in values]
