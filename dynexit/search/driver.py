"""The searches that studies and files ask for: configurations for accuracy weights, budgets and a risk.

A driver searches one record and judges what it finds on the others. `search_record` is its public face.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import Configuration, OperatingPoint, apply_configuration
from dynexit.errors import UserError
from dynexit.search.budgets import KINDS, Budget, Unattainable, within
from dynexit.search.exact import Front, SearchResult, results
from dynexit.search.methods import METHODS
from dynexit.search.problem import Problem, objective_of
from dynexit.search.risk import certify

if TYPE_CHECKING:
    from dynexit.record.shards import Record


@dataclass(frozen=True)
class SearchRequest:
    """What is searched, and how. Raises UserError for an unknown method and for counts that are too small.

    `method` is for the accuracy weights; budgets are met by the exact search. `normalize` maps accuracy and cost to
    [0, 1] first, as DyCE does; without `refine` thresholds lie between bins of confidences only; `starts` random
    starts are drawn from `seed`; `workers` threads search one record, and change no result.

    With `additive` heads an exit needs the logits of the one before. The search does not know it, so its answers get
    the missing exits, which cost their heads' MACs and let nobody leave, and are judged with them.
    """

    accuracy_weights: Sequence[float] = ()
    budgets: Sequence[Budget] = ()
    risk: float | None = None
    risk_confidence: float = 0.95
    method: str = "exact"
    normalize: bool = False
    refine: bool = True
    starts: int = 4
    seed: int = 0
    workers: int = 1
    additive: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method is {self.method!r}, allowed are {', '.join(METHODS)}; name one of them")
        for name, least in (("workers", 1), ("starts", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, allowed is {least} or more")


@dataclass(frozen=True)
class SearchEntry:
    """A configuration, what asked for it, and its operating points on every record, by the record's name.

    `objective` is the searched record's, of the cost that was searched; None for budgets and risks. `accuracy_weight`
    is that of the front's edge for a budget, None for a risk. `relative_latency` is there only if time was searched,
    `risk` (share of the samples that the backbone gets right and the configuration wrong) only for a risk.
    """

    configuration: Configuration
    accuracy_weight: float | None
    points: Mapping[str, OperatingPoint]
    relative_latency: Mapping[str, float] | None = None
    objective: float | None = None
    asked: Mapping[str, Any] | None = None
    """The budget or the certificate as JSON; None for an accuracy weight."""
    risk: Mapping[str, float] | None = None


class SearchDriver:
    """The searches of `settings` on the first of `problems`; all of them judge the answers. Their costs are MACs.

    `times`: times as costs (see latency_costs), which are searched instead of MACs.
    Raises UserError for an accuracy weight that has no objective on the record, and for budgets of the other cost.
    """

    def __init__(
        self, problems: Mapping[str, Problem], settings: SearchRequest, times: ExitCosts | None = None
    ) -> None:
        self.problems, self.settings, self.times = problems, settings, times
        self._costed = {name: self._with_cost(problem) for name, problem in problems.items()}
        self.searched = next(iter(self._costed.values()))
        weights, budgets = settings.accuracy_weights, settings.budgets
        _check_costs(budgets, times is not None)
        for weight in weights:
            objective_of(self.searched, weight, settings.normalize)
        self._front: Front | None = None
        if budgets or (weights and settings.method == "exact"):
            self._front = Front(
                self.searched,
                lowest=0.0 if budgets else min(weights),  # budgets ask for the cheap end
                normalize=settings.normalize,
                starts=settings.starts,
                seed=settings.seed,
                workers=settings.workers,
                refine=settings.refine,
            )
        found = self._search(weights) if weights else []
        self._found = [self._complete(result) for result in found] if settings.additive else found

    def weights(self) -> list[SearchEntry]:
        """An entry per accuracy weight, in their order."""
        return [self.entry(result.configuration, result.accuracy_weight, result.objective) for result in self._found]

    def budgets(self) -> list[SearchEntry | Unattainable]:
        """An entry per budget, or the error that says what is attainable.

        With additive heads the budget is met by the best of the completed configurations of the weights.
        """
        return [self.meet(budget) for budget in self.settings.budgets]

    def risk(self, candidates: Problem, certificate: Problem) -> SearchEntry:
        """The entry of the cheapest configuration whose risk is proven to be at most `settings.risk`.

        Candidates come from the front of `candidates`, the proof from `certificate`, which shares no samples with it.
        Raises UserError for a record too small to prove it.
        """
        settings = self.settings
        assert settings.risk is not None
        costed = self._with_cost(candidates), self._with_cost(certificate)
        proven = certify(*costed, settings.risk, settings.risk_confidence, settings.workers)
        found = proven.configuration
        asked = {name: value for name, value in asdict(proven).items() if name != "configuration"}
        risks = {name: _risk(problem, found) for name, problem in self.problems.items()}
        completed = without_gaps(found) if settings.additive else found
        return replace(self.entry(completed), asked=asked, risk=risks)

    def entry(
        self, configuration: Configuration, accuracy_weight: float | None = None, objective: float | None = None
    ) -> SearchEntry:
        """A configuration judged on every record."""
        points = {name: problem.evaluate(configuration) for name, problem in self.problems.items()}
        latency = None
        if self.times is not None:
            latency = {name: problem.evaluate(configuration).relative_macs for name, problem in self._costed.items()}
        return SearchEntry(configuration, accuracy_weight, points, latency, objective)

    def objective(self, name: str, configuration: Configuration, accuracy_weight: float) -> float:
        """The objective of a configuration on the record `name`. Raises UserError where it is undefined there."""
        problem = self._costed[name]
        return objective_at(problem, problem.evaluate(configuration), accuracy_weight, self.settings.normalize)

    def _with_cost(self, problem: Problem) -> Problem:
        return problem if self.times is None else replace(problem, costs=self.times)

    def _search(self, weights: Sequence[float]) -> list[SearchResult]:
        settings = self.settings
        if settings.method != "exact":
            return METHODS[settings.method](self.searched, weights, normalize=settings.normalize)
        assert self._front is not None
        return results(self.searched, weights, self._front.solve(weights), settings.normalize)

    def _complete(self, result: SearchResult) -> SearchResult:
        configuration = without_gaps(result.configuration)
        point = self.searched.evaluate(configuration)
        objective = objective_at(self.searched, point, result.accuracy_weight, self.settings.normalize)
        return replace(result, configuration=configuration, point=point, objective=objective)

    def meet(self, budget: Budget) -> SearchEntry | Unattainable:
        """The entry of one budget, as in `budgets`; the driver must have been made with some budget."""
        assert self._front is not None
        try:
            weight, candidate = within(self._front, budget)
            configuration = Configuration(candidate.exits)
            if self.settings.additive:
                weight, configuration = self._within_found(budget)
        except Unattainable as error:
            return error
        return replace(self.entry(configuration, weight), asked={budget.kind: budget.value})

    def _within_found(self, budget: Budget) -> tuple[float, Configuration]:
        base = self.searched.base_correct / self.searched.num_samples
        measures = [budget.measure(r.point.accuracy, r.point.relative_macs, base) for r in self._found]
        kept = [result for result, measure in zip(self._found, measures, strict=True) if budget.holds(measure)]
        if not kept:
            nearest = budget.nearest(measures)
            text = f"{budget.kind} {budget.value} is unattainable with the accuracy weights searched: {nearest:.6g} is"
            raise Unattainable(text, nearest)
        best = min(kept, key=lambda r: budget.rank(r.point.accuracy, r.point.relative_macs))
        return best.accuracy_weight, best.configuration


def _check_costs(budgets: Sequence[Budget], timed: bool) -> None:
    for budget in budgets:
        if timed and budget.kind == "relative_macs":
            instead = "the cost is time where a latency table is given; ask for a relative latency"
        elif not timed and budget.kind == "relative_latency":
            instead = "time is known only from a latency table; give one"
        else:
            continue
        raise UserError(f"{budget.kind} is {budget.value}, but {instead}")


def objective_at(problem: Problem, point: OperatingPoint, accuracy_weight: float, normalize: bool) -> float:
    """The objective of an operating point of `problem`. Raises UserError as objective_of does."""
    count = problem.num_samples
    return objective_of(problem, accuracy_weight, normalize)(point.accuracy * count, point.macs * count)


def _risk(problem: Problem, configuration: Configuration) -> float:
    _, correct_N = apply_configuration(
        configuration, problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N
    )
    return float(np.count_nonzero(problem.base_correct_N & ~correct_N)) / problem.num_samples


def without_gaps(configuration: Configuration) -> Configuration:
    """The same, with an exit that nobody takes (threshold 1) wherever one is missing before the last that is used."""
    used = [p for p, (head, _) in enumerate(configuration.exits) if head >= 0]
    until = used[-1] if used else -1
    filled = ((0, 1.0) if head < 0 and p < until else (head, t) for p, (head, t) in enumerate(configuration.exits))
    return Configuration(tuple(filled))


@dataclass(frozen=True)
class BestConfiguration:
    """A configuration and its operating point on the record that was searched."""

    configuration: Configuration
    point: OperatingPoint


def search_record(
    record: "Record",
    costs: ExitCosts,
    *,
    accuracy_weight: float | None = None,
    relative_macs: float | None = None,
    relative_latency: float | None = None,
    min_accuracy: float | None = None,
    max_accuracy_drop: float | None = None,
    confidence: str = "max_probability",
) -> BestConfiguration:
    """Returns the best configuration on a record for exactly one target, found by the exact search.

    Targets: `accuracy_weight`, in [0, 1], of accuracy against cost; `relative_macs` or `relative_latency`, at most that
    share of the backbone's cost, at the best accuracy; `min_accuracy`, a fraction, or `max_accuracy_drop`, below the
    backbone's, at the least cost. `costs` are those of the model that made the record; for `relative_latency` they are
    times (see latency_costs), and the point's MACs are times too. `confidence` is what thresholds are compared with.
    Raises UserError for none or several targets, a value out of range, costs of another model, and a budget that
    nothing attains, naming the nearest that is attained (Unattainable).
    """
    targets = {
        "accuracy_weight": accuracy_weight,
        "relative_macs": relative_macs,
        "relative_latency": relative_latency,
        "min_accuracy": min_accuracy,
        "max_accuracy_drop": max_accuracy_drop,
    }
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise UserError(f"targets given: {', '.join(given) or 'none'}; give exactly one of {', '.join(targets)}")
    problem = Problem.from_record(record, costs, confidence)
    budgets = [Budget(name, value) for name, value in given.items() if name in KINDS]
    settings = SearchRequest([] if accuracy_weight is None else [accuracy_weight], budgets)
    driver = SearchDriver({"record": problem}, settings, None if relative_latency is None else problem.costs)
    entry = driver.budgets()[0] if budgets else driver.weights()[0]
    if isinstance(entry, Unattainable):
        raise entry
    return BestConfiguration(entry.configuration, entry.points["record"])
