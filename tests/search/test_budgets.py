"""Budgets against exhaustive search, and what is said of one that nothing attains."""

import dataclasses
import itertools

import numpy as np
import pytest

from dynexit.core.cost import ExitCosts
from dynexit.errors import UserError
from dynexit.search.budgets import Budget, latency_costs, within
from dynexit.search.exact import Front
from tests.reference import exit_search
from tests.reference.exit_problems import random_problem


def every_point(problem) -> np.ndarray:
    """(correct, MACs) of every configuration, one row each."""
    choices = []
    for confidence_HN in problem.confidence_PHN:
        choices.append([(-1, 1.0)])
        for head, confidence_N in enumerate(confidence_HN):
            choices[-1] += [(head, threshold) for threshold in exit_search.thresholds_of(confidence_N)]
    return np.array([exit_search.evaluate(problem, list(exits)) for exits in itertools.product(*choices)])


def test_small_records_nearly_always_reach_the_best_within_a_budget():
    reached = []
    for seed in range(6):
        problem = random_problem(np.random.default_rng(seed), 7, 2, 2)
        points, full = every_point(problem), 7 * problem.costs.full_macs
        front = Front(problem)
        for share in (0.35, 0.5, 0.8):
            kept = points[points[:, 1] / full <= share]
            if not len(kept):
                with pytest.raises(UserError, match="is unattainable on the searched record"):
                    within(front, Budget("relative_macs", share))
                continue
            _, candidate = within(front, Budget("relative_macs", share))
            assert candidate.macs / full <= share
            reached.append((candidate.correct, -candidate.macs) == max((c, -m) for c, m in kept))
        for accuracy in (0.4, 0.6):
            kept = points[points[:, 0] / 7 >= accuracy]
            _, candidate = within(front, Budget("min_accuracy", accuracy))
            assert candidate.correct / 7 >= accuracy
            reached.append((-candidate.macs, candidate.correct) == max((-m, c) for c, m in kept))
    assert np.mean(reached) >= 0.9


@pytest.mark.parametrize("readers", [(), (70, 0, 200, 90, 150)])
def test_budgets_are_kept_and_no_corner_of_the_front_is_better(readers):
    problem = random_problem(np.random.default_rng(0), 1000, 5, 2)
    problem = dataclasses.replace(problem, costs=dataclasses.replace(problem.costs, reader_macs=readers))
    front, full = Front(problem), 1000 * problem.costs.full_macs
    corners = front.solve(np.linspace(0, 1, 201).tolist())
    for share in np.linspace(0.3, 0.95, 14):
        weight, candidate = within(front, Budget("relative_macs", float(share)))
        assert 0 <= weight <= 1
        assert candidate.macs / full <= share
        assert candidate.correct >= max(corner.correct for corner in corners if corner.macs / full <= share)
        assert (candidate.correct, candidate.macs) == exit_search.evaluate(problem, list(candidate.exits))
    for drop in (0.0, 0.01, 0.05):
        _, candidate = within(front, Budget("max_accuracy_drop", drop))
        assert candidate.correct >= problem.base_correct - drop * 1000 - 1e-9
        kept = [corner.macs for corner in corners if corner.correct >= problem.base_correct - drop * 1000 - 1e-9]
        assert candidate.macs <= min(kept)


def test_an_accuracy_is_met_to_the_sample():
    problem = random_problem(np.random.default_rng(0), 1000, 3, 1)
    front = Front(problem)
    for wanted in range(600, 800, 7):
        _, candidate = within(front, Budget("min_accuracy", wanted / 1000))
        assert candidate.correct >= wanted
    exact = next(c for c in front.pool.values() if c.correct < 800)
    _, again = within(front, Budget("min_accuracy", exact.correct / 1000))
    assert again.macs <= exact.macs


def test_an_unattainable_budget_names_the_nearest():
    problem = random_problem(np.random.default_rng(0), 200, 3, 2)
    front = Front(problem)
    cheapest, best = front.solve([0.0, 1.0])
    relative = cheapest.macs / (200 * problem.costs.full_macs)
    with pytest.raises(UserError, match=f"relative_macs 0.001 is unattainable .* has {relative:.6g};"):
        within(front, Budget("relative_macs", 0.001))
    with pytest.raises(UserError, match=f"min_accuracy 1.0 is unattainable .* has {best.correct / 200:.6g};"):
        within(front, Budget("min_accuracy", 1.0))


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("macs", 0.5, "budget is 'macs', allowed are relative_macs, "),
        ("relative_macs", 0.0, "relative_macs is 0.0, allowed is above 0"),
        ("relative_macs", float("nan"), "relative_macs is nan, allowed is above 0"),
        ("min_accuracy", 75.0, "min_accuracy is 75.0, allowed is 0 to 1"),
        ("max_accuracy_drop", -0.1, "max_accuracy_drop is -0.1, allowed is 0 to 1"),
    ],
)
def test_a_budget_out_of_range_is_refused(kind, value, message):
    with pytest.raises(UserError, match=message):
        Budget(kind, value)


COSTS = ExitCosts(100, (1, 4), (20, 60), ("linear", "mlp1x10"), ((1, 2), (3, 4)), (4, 4))


def test_a_latency_table_becomes_costs_in_picoseconds():
    table = {"stage_seconds": [1e-3, 2e-3, 0.5e-3], "head_seconds": [[1e-5, 2e-5], [1e-5, 3e-5]]}
    costs = latency_costs(table, COSTS)
    assert (costs.backbone_macs, costs.full_macs) == ((10**9, 3 * 10**9), 3_500_000_000)
    assert costs.head_macs == ((10**7, 2 * 10**7), (10**7, 3 * 10**7))
    assert (costs.positions, costs.head_types, costs.gate_macs) == ((1, 4), ("linear", "mlp1x10"), (0, 0))
    assert latency_costs({**table, "gate_seconds": [1e-6, 2e-6]}, COSTS).gate_macs == (10**6, 2 * 10**6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage_seconds": [1e-3, 2e-3]}, "stage_seconds has 2 times, expected 3"),
        ({"stage_seconds": [0, 0, 0]}, "stage_seconds are all 0"),
        ({"stage_seconds": [1e-3, -2e-3, 1e-3]}, "stage_seconds holds -0.002, allowed are seconds of 0 or more"),
        ({"head_seconds": [[1e-5, 2e-5]]}, "head_seconds is not a list of 2 lists"),
        ({"head_seconds": [[1e-5, "2"], [1, 1]]}, "head_seconds holds '2'"),
        ({"gate_seconds": 3}, "gate_seconds holds 3 where a list of 2 times belongs"),
        ({"stages": []}, "unknown: stages"),
    ],
)
def test_a_latency_table_that_does_not_fit_is_refused(change, message):
    table = {"stage_seconds": [1e-3, 2e-3, 0.5e-3], "head_seconds": [[1e-5, 2e-5], [1e-5, 3e-5]]}
    with pytest.raises(UserError, match=message):
        latency_costs({**table, **change}, COSTS)
