"""What people ask for instead of a weight: the best accuracy within a cost, the least cost that keeps an accuracy.

A budget is met on the record that is searched. Shapes: N samples, P positions, H head types.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import last_enabled
from dynexit.errors import UserError
from dynexit.search.exact import Front
from dynexit.search.kernels import OFF
from dynexit.search.line_search import Candidate, Exits
from dynexit.search.problem import Problem, objective_of
from dynexit.search.rows import EVERYONE, midpoint

KINDS = ("relative_macs", "relative_latency", "min_accuracy", "max_accuracy_drop")
_PICOSECONDS = 10**12
_CLIMB_UP_TO_SAMPLES = 65_536  # above, corners of the front lie too close for it to matter


class Unattainable(UserError):  # noqa: N818  as Failure
    """A budget that nothing attains; `nearest` is the value of its kind that something does."""

    def __init__(self, text: str, nearest: float) -> None:
        super().__init__(text)
        self.nearest = nearest


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

    def measure(self, accuracy: float, relative_cost: float, base_accuracy: float) -> float:
        """What of an operating point the budget limits; `base_accuracy` is the backbone's on the same samples."""
        return {"min_accuracy": accuracy, "max_accuracy_drop": base_accuracy - accuracy}.get(self.kind, relative_cost)

    def holds(self, measure: float) -> bool:
        """Whether a measure keeps within the budget."""
        if self.kind.startswith("relative"):
            return measure <= self.value
        return self.nearest((measure, self.value)) == measure or abs(measure - self.value) <= 1e-9

    def nearest(self, measures: Iterable[float]) -> float:
        """Of several measures the one that is easiest to keep within."""
        return max(measures) if self.kind == "min_accuracy" else min(measures)

    def rank(self, accuracy: float, relative_cost: float) -> tuple[float, float]:
        """Of two operating points that keep within it the better one has the smaller rank."""
        return (-accuracy, relative_cost) if self.kind.startswith("relative") else (relative_cost, -accuracy)


def budgets_of(asked: Mapping[str, Any]) -> list[Budget]:
    """The budgets in lists of values by kind, in the order of KINDS; other keys are ignored."""
    return [Budget(kind, value) for kind in KINDS for value in asked.get(kind, ())]


@dataclass(frozen=True)
class _Limit:
    """Whether sums over the record keep within a budget, and which of two that do is the better (the larger key)."""

    keeps: Callable[[Any, Any], Any]
    key: Callable[[Any, Any], tuple[Any, Any]]

    def of(self, candidate: Candidate) -> tuple[int, int]:
        key: tuple[int, int] = self.key(candidate.correct, candidate.macs)
        return key


def within(front: Front, budget: Budget) -> tuple[float, Candidate]:
    """(accuracy weight, configuration) of a budget, the best that the front and single changes from it hold.

    The weight is that of the edge of the front on which the budget lies. Raises UserError for a budget that nothing
    attains, naming the nearest that is attained (Unattainable).
    """
    limit = _limit(front, budget)
    ends = front.solve([0.0, 1.0])
    cheapest, most_accurate = ends
    by_cost = budget.kind.startswith("relative")
    if not limit.keeps(
        *((cheapest.correct, cheapest.macs) if by_cost else (most_accurate.correct, most_accurate.macs))
    ):
        raise _unattainable(front, budget, cheapest if by_cost else most_accurate)
    weight, *edge = _bisect(front, limit, cheapest, most_accurate)
    kept = [candidate for candidate in front.pool.values() if limit.keeps(candidate.correct, candidate.macs)]
    if front.refine and front.problem.num_samples <= _CLIMB_UP_TO_SAMPLES:
        for start in (max(kept, key=limit.of), *edge):
            kept += _climb(front, limit, start)
    return weight, max(kept, key=limit.of)


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


def _unattainable(front: Front, budget: Budget, nearest: Candidate) -> Unattainable:
    point = nearest.point(front.problem.costs.full_macs)
    reached, what = {
        "relative_macs": (point.relative_macs, "the cheapest configuration has"),
        "relative_latency": (point.relative_macs, "the fastest configuration has"),
        "min_accuracy": (point.accuracy, "the most accurate configuration has"),
        "max_accuracy_drop": (
            front.problem.base_correct / point.num_samples - point.accuracy,
            "the most accurate configuration loses",
        ),
    }[budget.kind]
    return Unattainable(
        f"{budget.kind} {budget.value} is unattainable on the searched record: {what} {reached:.6g}; ask for that or "
        "more room",
        reached,
    )


def _bisect(front: Front, limit: _Limit, cheap: Candidate, accurate: Candidate) -> tuple[float, Candidate, Candidate]:
    """The weight of the front's edge across the limit, and its two ends.

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
    return weight, cheap, accurate


def _climb(front: Front, limit: _Limit, start: Candidate) -> list[Candidate]:
    """The best within the limit that single changes lead to, each better than the one before; none where `start`
    exceeds it and no change avoids that. Between two corners of the front lie configurations that no weight asks for.
    """
    climbed = [start] if limit.keeps(start.correct, start.macs) else []
    while True:
        exits = climbed[-1].exits if climbed else start.exits
        found = [change for p in range(len(exits)) for change in _best_changes(front, limit, exits, p)]
        top = max(found, default=None, key=lambda change: change[0])
        if top is None or (climbed and top[0] <= limit.of(climbed[-1])):
            return climbed
        climbed.append(front.candidate(top[1]))


def _best_changes(front: Front, limit: _Limit, exits: Exits, position: int) -> list[tuple[tuple[int, int], Exits]]:
    """(key, configuration) of the best threshold within the limit for each head type at one position, and of none."""
    without = front.candidate((*exits[:position], (OFF, 1.0), *exits[position + 1 :]))
    arrives_N, rest_macs_N, rest_correct_N = _after(front.problem, exits, position)
    read = _read_macs(front.problem.costs, exits, position)
    changes = (
        [(limit.key(without.correct, without.macs), without.exits)]
        if limit.keeps(without.correct, without.macs)
        else []
    )
    for head, head_macs in enumerate(front.problem.costs.head_macs[position]):
        order_N = front.rows.order(position, head)
        order_A = order_N[arrives_N[order_N]]
        confidence_A = front.problem.confidence_PHN[position, head][order_A]
        ends = np.flatnonzero(np.append(confidence_A[1:] < confidence_A[:-1], True))[: len(order_A)]
        gained_A = front.problem.correct_PHN[position, head][order_A].astype(np.int64) - rest_correct_N[order_A]
        correct = without.correct + gained_A.cumsum()[ends]
        macs = without.macs + (head_macs + read) * len(order_A) - rest_macs_N[order_A].cumsum()[ends]
        kept = np.flatnonzero(limit.keeps(correct, macs))
        if len(kept):
            first, second = limit.key(correct[kept], macs[kept])
            place = np.lexsort((second, first))[-1]
            last = ends[kept[place]]
            following = last + 1 < len(order_A)
            threshold = midpoint(confidence_A[last], confidence_A[last + 1]) if following else EVERYONE
            key = (int(first[place]), int(second[place]))
            changes.append((key, (*exits[:position], (head, threshold), *exits[position + 1 :])))
    return changes


def _after(problem: Problem, exits: Exits, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who arrives at a position, and per sample what it still pays behind it and whether it is right, if it goes on."""
    costs = problem.costs
    arrives_N = np.ones(problem.num_samples, dtype=bool)
    for earlier, (head, threshold) in enumerate(exits[:position]):
        if head != OFF:
            arrives_N &= problem.confidence_PHN[earlier, head] <= np.float32(threshold)
    last = last_enabled([head for head, _ in exits])
    path = costs.path_macs(np.zeros(len(exits), np.int64), max(last, position))
    rest_macs_N = np.full(problem.num_samples, path[-1] - path[-2] if len(exits) else 0, dtype=np.int64)
    rest_correct_N = problem.base_correct_N.astype(np.int64)
    for later in reversed(range(position + 1, len(exits))):
        head, threshold = exits[later]
        if head != OFF:
            leaves_N = problem.confidence_PHN[later, head] > np.float32(threshold)
            rest_macs_N = np.where(leaves_N, 0, rest_macs_N) + costs.head_macs[later][head]
            rest_correct_N = np.where(leaves_N, problem.correct_PHN[later, head], rest_correct_N)
        rest_macs_N = rest_macs_N + (path[later] - path[later - 1])
    return arrives_N, rest_macs_N, rest_correct_N


def _read_macs(costs: ExitCosts, exits: Exits, position: int) -> int:
    """What enabling the exit at a position has every sample that arrives pay for features that it did not pay yet."""
    read_P = costs.read_macs()
    if last_enabled([head for head, _ in exits[position + 1 :]]) >= 0:
        return 0
    before = last_enabled([head for head, _ in exits[:position]])
    return int(read_P[position] - (read_P[before] if before >= 0 else 0))


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
    rows = table["head_seconds"]
    if not isinstance(rows, list) or len(rows) != num_positions:
        raise UserError(f"head_seconds is not a list of {num_positions} lists, one a position; measure every head type")
    heads = tuple(tuple(_times(row, "head_seconds", num_heads)) for row in rows)
    gates = _times(table.get("gate_seconds", [0.0] * num_positions), "gate_seconds", num_positions)
    path = [int(total) for total in np.cumsum(stages)]
    if not path[-1]:
        raise UserError("stage_seconds are all 0; give measured times")
    return replace(
        costs,
        full_macs=path[-1],
        backbone_macs=tuple(path[:-1]),
        head_macs=heads,
        gate_macs=tuple(gates),
        reader_macs=(),
    )


def _times(values: Any, name: str, expected: int) -> list[int]:
    if not isinstance(values, list):
        raise UserError(f"{name} holds {values!r} where a list of {expected} times belongs")
    if len(values) != expected:
        raise UserError(
            f"{name} has {len(values)} times, expected {expected}; measure every stage of the model recorded"
        )
    for value in values:
        if not (isinstance(value, int | float) and 0 <= value < float("inf")):
            raise UserError(f"{name} holds {value!r}, allowed are seconds of 0 or more")
    return [round(value * _PICOSECONDS) for value in values]
