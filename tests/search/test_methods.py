"""DyCE's named methods on the exact line search."""

import numpy as np
import pytest

from dynexit.core.search_methods import SEARCH_METHODS
from dynexit.search.methods import METHODS, circular, onepass, samethres
from dynexit.search.problem import tie_breaking
from tests.reference import exit_search
from tests.reference.exit_problems import odd_problem, random_problem
from tests.reference.line_search import best_exit

WEIGHTS = [0.0, 0.45, 0.7, 0.9, 1.0]


@pytest.mark.parametrize("normalize", [False, True])
def test_every_method_reports_what_its_configuration_gives(normalize):
    problem = random_problem(np.random.default_rng(0), 120, 4, 2)
    for method in METHODS.values():
        found = method(problem, WEIGHTS, normalize=normalize)
        assert [result.accuracy_weight for result in found] == WEIGHTS
        for result in found:
            exits = list(result.configuration.exits)
            value = exit_search.objective(problem, exits, result.accuracy_weight, normalize)
            assert result.objective == pytest.approx(value, abs=1e-12)
            assert result.point == problem.evaluate(result.configuration)


def test_onepass_sets_each_position_once_in_order():
    problem = random_problem(np.random.default_rng(1), 120, 4, 2)
    for result, objective in zip(onepass(problem, WEIGHTS), tie_breaking(problem, WEIGHTS, False), strict=True):
        exits = ((-1, 1.0),) * 4
        for position in range(4):
            chosen = best_exit(problem, exits, position, objective)
            exits = (*exits[:position], chosen, *exits[position + 1 :])
        assert result.configuration.exits == exits


def test_circular_ends_where_no_single_change_gains():
    problem = random_problem(np.random.default_rng(2), 120, 4, 2)
    for result in circular(problem, WEIGHTS):
        lowest = exit_search.best_single_change(problem, list(result.configuration.exits), result.accuracy_weight)
        assert result.objective <= lowest + 1e-9


def test_samethres_finds_the_best_of_all_shared_thresholds():
    problems = [random_problem(np.random.default_rng(seed), 60, 3, 2, levels=seed * 4) for seed in range(3)]
    for problem in [*problems, *(odd_problem(np.random.default_rng(9), kind) for kind in range(9))]:
        for result in samethres(problem, WEIGHTS):
            values = [
                exit_search.objective(problem, [(head, threshold)] * 3, result.accuracy_weight)
                for head in range(2)
                for threshold in [1.0, *exit_search.thresholds_of(problem.confidence_PHN[:, head].ravel())]
            ]
            assert result.objective == pytest.approx(min(values), abs=1e-8)


def test_exact_is_at_least_as_good_as_every_named_method():
    for seed in range(10):
        problem = random_problem(np.random.default_rng(seed), 150, 4, 2)
        best = METHODS["exact"](problem, WEIGHTS)
        for method in (onepass, circular, samethres):
            for ours, theirs in zip(best, method(problem, WEIGHTS), strict=True):
                assert ours.objective <= theirs.objective + 1e-9


def test_the_functions_are_those_of_the_table_of_names():
    assert list(METHODS) == list(SEARCH_METHODS)
