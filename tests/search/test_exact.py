"""The exact search against exhaustive search, DyCE's one-pass, and what it promises of itself."""

import dataclasses

import numpy as np
import pytest

from dynexit.core.tradeoff import Configuration
from dynexit.errors import UserError
from dynexit.search.exact import Front, sweep
from dynexit.search.line_search import LineSearch
from dynexit.search.problem import objective_of, tie_breaking
from tests.reference import exit_search, line_search
from tests.reference.exit_problems import odd_problem, random_problem

WEIGHTS = [0.0, 0.35, 0.5, 0.7, 0.9, 1.0]


def test_each_sweep_equals_the_obvious_line_search():
    for seed in range(12):
        generator = np.random.default_rng(seed)
        problem = random_problem(generator, int(generator.integers(30, 250)), 4, 3, levels=[0, 7][seed % 2])
        search = LineSearch(problem)
        for weight in (0.3, 0.6, 0.85):
            (objective,) = tie_breaking(problem, [weight], normalize=False)
            exits = ((-1, 1.0),) * 4
            path = search.descend(exits, objective)
            assert [candidate.exits for candidate in path] == line_search.descend(problem, exits, objective)


@pytest.mark.parametrize("kind", range(9))
def test_odd_records_reach_what_brute_force_reaches_or_a_fixed_point(kind):
    for seed in range(4):
        problem = odd_problem(np.random.default_rng(seed), kind)
        for result in sweep(problem, WEIGHTS):
            found = exit_search.objective(problem, list(result.configuration.exits), result.accuracy_weight)
            assert result.objective == pytest.approx(found, abs=1e-12)
            nearest = exit_search.best_single_change(problem, list(result.configuration.exits), result.accuracy_weight)
            assert found <= nearest + 1e-9


@pytest.mark.parametrize("normalize", [False, True])
def test_the_answer_is_a_fixed_point_and_its_figures_are_those_of_its_configuration(normalize):
    problem = random_problem(np.random.default_rng(5), 150, 4, 2)
    for result in sweep(problem, WEIGHTS, normalize=normalize):
        exits = list(result.configuration.exits)
        value = exit_search.objective(problem, exits, result.accuracy_weight, normalize)
        assert result.objective == pytest.approx(value, abs=1e-12)
        assert value <= exit_search.best_single_change(problem, exits, result.accuracy_weight, normalize) + 1e-9
        correct, macs = exit_search.evaluate(problem, exits)
        assert result.point == problem.evaluate(result.configuration)
        assert (result.point.accuracy, result.point.macs) == (correct / 150, macs / 150)


def test_tiny_records_reach_the_global_optimum():
    for seed in range(8):
        problem = random_problem(np.random.default_rng(seed), 7, 3, 2, levels=seed % 3 * 2)
        for result in sweep(problem, [0.4, 0.8]):
            assert result.objective == pytest.approx(exit_search.brute_force(problem, result.accuracy_weight), abs=1e-9)


def test_features_of_disabled_exits_are_paid_up_to_the_last_enabled() -> None:
    for seed in range(8):
        generator = np.random.default_rng(seed)
        problem = random_problem(generator, 7, 3, 2, levels=seed % 3 * 2)
        readers = tuple(generator.integers(0, 400, size=3).tolist())
        problem = dataclasses.replace(problem, costs=dataclasses.replace(problem.costs, reader_macs=readers))
        for result in sweep(problem, [0.4, 0.6, 0.8]):
            weight, exits = result.accuracy_weight, list(result.configuration.exits)
            assert (result.point.accuracy * 7, result.point.macs * 7) == exit_search.evaluate(problem, exits)
            assert result.point == problem.evaluate(result.configuration)
            assert result.objective == pytest.approx(exit_search.brute_force(problem, weight), abs=1e-9)


@pytest.mark.slow
def test_at_least_95_percent_of_small_records_reach_the_global_optimum():
    reached = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        problem = random_problem(generator, 200, 3, 2)
        weight = float(generator.uniform(0.4, 0.95))
        (result,) = sweep(problem, [weight])
        reached.append(result.objective <= exit_search.global_optimum(problem, weight) + 1e-9)
    assert np.mean(reached) >= 0.95


@pytest.mark.slow
def test_never_worse_than_dyce_on_a_thousand_records_and_weights():
    gains = []
    for seed in range(250):
        generator = np.random.default_rng(seed)
        num_samples, num_positions, num_heads = generator.integers((20, 1, 1), (300, 6, 4)).tolist()
        problem = random_problem(generator, num_samples, num_positions, num_heads, levels=[0, 0, 9][seed % 3])
        weights = generator.uniform(0, 1, size=4).tolist()
        for result in sweep(problem, weights):
            ours = exit_search.objective(problem, list(result.configuration.exits), result.accuracy_weight)
            theirs = exit_search.dyce_onepass(problem, result.accuracy_weight)
            gains.append(exit_search.objective(problem, theirs, result.accuracy_weight) - ours)
    assert min(gains) >= -1e-12
    assert np.mean(np.array(gains) > 1e-9) > 0.5


def test_weights_at_the_ends_decide_between_equals_by_the_other_term():
    problem = random_problem(np.random.default_rng(3), 60, 2, 2, levels=5)
    cheapest, best = sweep(problem, [0.0, 1.0])
    assert cheapest.point.macs == pytest.approx(problem.costs.full_macs * exit_search.brute_force(problem, 0.0))
    accuracy = problem.base_correct_N.mean() * (1 - exit_search.brute_force(problem, 1.0))
    assert best.point.accuracy == pytest.approx(accuracy)
    assert best.objective == exit_search.objective(problem, list(best.configuration.exits), 1.0)
    assert best.point.macs < problem.costs.full_macs


def test_the_same_arguments_give_the_same_answer_whatever_the_number_of_workers():
    problem = random_problem(np.random.default_rng(1), 400, 5, 2)
    weights = np.linspace(0.4, 1, 37).tolist()
    alone = sweep(problem, weights, workers=1)
    assert alone == sweep(problem, weights, workers=3)
    assert alone == sweep(problem, weights, workers=2)
    assert [result.accuracy_weight for result in sweep(problem, weights[::-1])] == weights[::-1]


def test_a_front_asked_twice_answers_the_same_and_no_worse():
    problem = random_problem(np.random.default_rng(2), 300, 4, 2)
    front = Front(problem)
    first = front.solve([0.7, 0.9])
    assert front.solve([0.7, 0.9]) == first
    again = front.solve([0.9, 0.55, 0.7])
    objective = objective_of(problem, 0.7)
    assert objective(again[2].correct, again[2].macs) <= objective(first[0].correct, first[0].macs)


def test_thresholds_between_bins_alone_fit_the_record_less():
    problem = random_problem(np.random.default_rng(2), 2000, 4, 2)
    exact, coarse = (sweep(problem, [0.6, 0.8], refine=refine) for refine in (True, False))
    for ours, theirs in zip(exact, coarse, strict=True):
        assert ours.objective < theirs.objective < 1.05 * ours.objective


def test_no_weights_and_no_positions():
    problem = random_problem(np.random.default_rng(2), 30, 2, 2)
    assert sweep(problem, []) == []
    bare = random_problem(np.random.default_rng(2), 30, 0, 2)
    (result,) = sweep(bare, [0.5])
    assert result.configuration == Configuration(())
    assert result.point.relative_macs == 1


def test_everyone_leaves_at_minus_one_and_an_exit_nobody_reaches_is_removed():
    problem = random_problem(np.random.default_rng(4), 80, 3, 1)
    (result,) = sweep(problem, [0.0])
    (head, threshold), *later = result.configuration.exits
    assert (head, threshold, result.point.exit_fractions[0]) == (0, -1.0, 1.0)
    assert later == [(-1, 1.0)] * 2


@pytest.mark.parametrize("weight", [-0.1, 1.049, float("nan")])
def test_a_weight_outside_0_to_1_is_refused(weight):
    problem = random_problem(np.random.default_rng(4), 20, 2, 1)
    with pytest.raises(UserError, match=f"accuracy weight is {weight}, allowed is 0 to 1"):
        sweep(problem, [0.5, weight])
