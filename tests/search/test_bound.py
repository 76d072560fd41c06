"""The lower bound is below the global optimum, and near it where there are few positions."""

import numpy as np
import pytest

from dynexit.search.exact import sweep
from dynexit.search.problem import objective_of
from tests.reference import exit_search
from tests.reference.exit_problems import odd_problem, random_problem
from tests.reference.search_bound import Bound


@pytest.mark.parametrize("kind", range(10))
def test_never_above_the_global_optimum_of_odd_records(kind):
    for seed in range(2):
        problem = odd_problem(np.random.default_rng(seed), kind)
        bound = Bound(problem)
        for result in sweep(problem, [0.4, 0.8]):
            objective = objective_of(problem, result.accuracy_weight)
            lower = bound.lower(objective, result.objective)
            assert lower <= result.objective + 1e-9
            if problem.num_samples < 9:
                assert lower <= exit_search.brute_force(problem, result.accuracy_weight) + 1e-9


def test_near_the_global_optimum_of_small_records():
    gaps = []
    for seed in range(6):
        problem = random_problem(np.random.default_rng(seed), 200, 3, 2)
        weight = 0.45 + 0.09 * seed
        (result,) = sweep(problem, [weight])
        optimum = exit_search.global_optimum(problem, weight)
        lower = Bound(problem).lower(objective_of(problem, weight), result.objective)
        assert lower <= optimum + 1e-9
        gaps.append((optimum - lower) / optimum)
    assert max(gaps) < 0.06
