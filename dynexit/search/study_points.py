"""What a study keeps of a trained point's records: configurations chosen on validation and judged on test, as JSON.

Shapes: P positions, N samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dynexit.core.tradeoff import Configuration, OperatingPoint, apply_configuration
from dynexit.search.budgets import Budget, Unattainable, latency_costs, within
from dynexit.search.exact import Front, SearchResult, results
from dynexit.search.methods import METHODS, NEVER, fixed_thresholds, geometric_fractions
from dynexit.search.problem import Problem, objective_of
from dynexit.search.risk import certify

_NUM_STEPS = 39  # MSDNet's sweep of geometric_fractions


@dataclass(frozen=True)
class Search:
    """How a point is searched. With `latency` (see latency_costs) time is the cost instead of MACs.

    With `additive` heads an exit needs the logits of the one before. The search does not know it; so whatever it finds
    gets the missing exits, which cost their heads' MACs and let nobody leave, and is judged with them.
    """

    method: str = "exact"
    normalize: bool = False
    refine: bool = True
    starts: int = 4
    additive: bool = False
    latency: Mapping[str, Any] | None = None


class PointSearch:
    """The searches of one point for accuracy weights (at least one), budgets and a risk.

    `validation` is searched and `test` judged on too; both have MACs as costs.
    """

    def __init__(
        self, validation: Problem, test: Problem, how: Search, weights: Sequence[float], budgets: Sequence[Budget] = ()
    ) -> None:
        self.problems, self.how, self.asked = {"validation": validation, "test": test}, how, budgets
        self.timed = {name: self._costed(problem) for name, problem in self.problems.items()}
        self.searched = self.timed["validation"]
        self.front: Front | None = None
        if budgets or how.method == "exact":
            lowest = 0.0 if budgets else min(weights)  # budgets ask for the cheap end
            options: dict[str, Any] = {"normalize": how.normalize, "starts": how.starts, "refine": how.refine}
            self.front = Front(self.searched, lowest=lowest, **options)
        if self.front is not None and how.method == "exact":
            found = results(self.searched, weights, self.front.solve(weights), how.normalize)
        else:
            found = METHODS[how.method](self.searched, weights, normalize=how.normalize)
        self.found = [_complete(self.searched, result, how.normalize) for result in found] if how.additive else found

    def _costed(self, problem: Problem) -> Problem:
        latency = self.how.latency
        return problem if latency is None else replace(problem, costs=latency_costs(latency, problem.costs))

    def weights(self) -> list[dict[str, Any]]:
        """The best configuration for every accuracy weight, with its operating points on both records."""
        return [
            {
                "accuracy_weight": result.accuracy_weight,
                "objective": result.objective,
                **self._judged(result.configuration),
            }
            for result in self.found
        ]

    def budgets(self) -> list[dict[str, Any]]:
        """An entry per budget; where it is unattainable here, a sentence that says so instead of a configuration.

        With additive heads the budget is met by the best of the completed configurations of the weights.
        """
        entries: list[dict[str, Any]] = []
        for budget in self.asked:
            entry: dict[str, Any] = {"budget": {budget.kind: budget.value}}
            try:
                weight, configuration = self._within(budget)
            except Unattainable as error:
                entries.append({**entry, "unattainable": str(error), "nearest": error.nearest})
            else:
                entries.append({**entry, "accuracy_weight": weight, **self._judged(configuration)})
        return entries

    def _within(self, budget: Budget) -> tuple[float, Configuration]:
        assert self.front is not None
        weight, candidate = within(self.front, budget)
        if not self.how.additive:
            return weight, Configuration(candidate.exits)
        base = self.searched.base_correct / self.searched.num_samples
        measures = [budget.measure(r.point.accuracy, r.point.relative_macs, base) for r in self.found]
        kept = [result for result, measure in zip(self.found, measures, strict=True) if budget.holds(measure)]
        if not kept:
            nearest = budget.nearest(measures)
            text = f"{budget.kind} {budget.value} is unattainable with the accuracy weights searched: {nearest:.6g} is"
            raise Unattainable(text, nearest)
        best = min(kept, key=lambda r: budget.rank(r.point.accuracy, r.point.relative_macs))
        return best.accuracy_weight, best.configuration

    def risk(self, train: Problem, risk: float, confidence: float) -> dict[str, Any]:
        """The entry of the cheapest configuration whose risk `validation` certifies; candidates come from `train`."""
        certificate = certify(self._costed(train), self.searched, risk, confidence)
        facts = {name: value for name, value in asdict(certificate).items() if name != "configuration"}
        found = certificate.configuration
        entry = {"budget": facts, "accuracy_weight": None, **self._judged(_filled(found, self.how.additive))}
        for split, problem in self.problems.items():
            entry[split]["risk"] = _risk(problem, found)
        return entry

    def _judged(self, configuration: Configuration) -> dict[str, Any]:
        entry = _judged(configuration, *(problem.evaluate(configuration) for problem in self.problems.values()))
        if self.how.latency is not None:
            for split, problem in self.timed.items():
                entry[split]["relative_latency"] = problem.evaluate(configuration).relative_macs
        return entry


def _risk(problem: Problem, configuration: Configuration) -> float:
    _, correct_N = apply_configuration(
        configuration, problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N
    )
    return float(np.count_nonzero(problem.base_correct_N & ~correct_N)) / problem.num_samples


def _complete(problem: Problem, result: SearchResult, normalize: bool) -> SearchResult:
    configuration = without_gaps(result.configuration)
    point, objective = problem.evaluate(configuration), objective_of(problem, result.accuracy_weight, normalize)
    count = problem.num_samples
    value = objective(point.accuracy * count, point.macs * count)
    return replace(result, configuration=configuration, point=point, objective=value)


def _filled(configuration: Configuration, additive: bool) -> Configuration:
    return without_gaps(configuration) if additive else configuration


def without_gaps(configuration: Configuration) -> Configuration:
    """The same, with an exit that nobody takes (threshold 1) wherever one is missing before the last that is used."""
    used = [p for p, (head, _) in enumerate(configuration.exits) if head >= 0]
    until = used[-1] if used else -1
    filled = ((0, 1.0) if head < 0 and p < until else (head, t) for p, (head, t) in enumerate(configuration.exits))
    return Configuration(tuple(filled))


def fixed_points(validation: Problem, test: Problem) -> list[dict[str, Any]]:
    """MSDNet's thresholds, set on validation for each of its 39 divisions of the samples among the exits.

    Every position has its exit, and all the same head type; with several types each has its own 39. Divisions that
    give the same thresholds are one entry. Source: MSDNet (arXiv 1703.09844), budgeted batch classification.
    """
    chosen = dict.fromkeys(_fixed_configurations(validation))
    return [_judged(c, validation.evaluate(c), test.evaluate(c)) for c in chosen]


def _fixed_configurations(problem: Problem) -> Iterator[Configuration]:
    for head in range(len(problem.costs.head_types)):
        confidence_PN = problem.confidence_PHN[:, head]
        confidence_MN = np.concatenate((confidence_PN, np.zeros_like(confidence_PN[:1])))
        for step in range(1, _NUM_STEPS + 1):
            thresholds_M = fixed_thresholds(confidence_MN, geometric_fractions(step, len(confidence_MN)))
            # MSDNet leaves at a confidence of at least the threshold, a configuration above it
            below_P = np.nextafter(thresholds_M[:-1], np.float32(-np.inf))
            values_P = np.where(thresholds_M[:-1] == np.float32(NEVER), np.float32(1), below_P)
            yield Configuration(tuple((head, float(value)) for value in values_P))


def _judged(configuration: Configuration, validation: OperatingPoint, test: OperatingPoint) -> dict[str, Any]:
    return {"exits": configuration.to_json(), "validation": _point_json(validation), "test": _point_json(test)}


def _point_json(point: OperatingPoint) -> dict[str, Any]:
    return {
        "accuracy": point.accuracy,
        "macs": point.macs,
        "relative_macs": point.relative_macs,
        "exit_fractions": list(point.exit_fractions),
    }
