"""What a study keeps of a trained point's records: configurations chosen on validation and judged on test, as JSON.

Shapes: P positions, N samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dynexit.core.tradeoff import Configuration, OperatingPoint
from dynexit.search.exact import SearchResult, sweep
from dynexit.search.methods import NEVER, fixed_thresholds, geometric_fractions
from dynexit.search.problem import Problem, objective_of

_NUM_STEPS = 39  # MSDNet's sweep of geometric_fractions


def searched_points(
    validation: Problem, test: Problem, weights: Sequence[float], *, starts: int, additive: bool
) -> list[dict[str, Any]]:
    """The best configuration for every accuracy weight, with its operating points on both records.

    With `additive` heads an exit needs the logits of the one before. The search does not know it; so whatever it finds
    gets the missing exits, which cost their heads' MACs and let nobody leave, and is judged with them.
    """
    found = sweep(validation, weights, starts=starts)
    if additive:
        found = [_complete(validation, result) for result in found]
    return [
        {
            "accuracy_weight": result.accuracy_weight,
            "objective": result.objective,
            **_judged(result.configuration, result.point, test.evaluate(result.configuration)),
        }
        for result in found
    ]


def _complete(problem: Problem, result: SearchResult) -> SearchResult:
    configuration = without_gaps(result.configuration)
    point, objective = problem.evaluate(configuration), objective_of(problem, result.accuracy_weight)
    count = problem.num_samples
    value = objective(point.accuracy * count, point.macs * count)
    return replace(result, configuration=configuration, point=point, objective=value)


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
