"""The driver of all searches: the sweep's answers judged on every record, additive heads without gaps."""

import numpy as np
import pytest

from dynexit.core.tradeoff import Configuration
from dynexit.errors import UserError
from dynexit.search.budgets import Budget, Unattainable
from dynexit.search.driver import SearchDriver, SearchEntry, SearchRequest, without_gaps
from dynexit.search.exact import sweep
from dynexit.search.problem import objective_of
from tests.reference.exit_problems import random_problem

WEIGHTS = [0.3, 0.6, 0.8, 0.95, 1.0]


def test_gaps_are_filled_up_to_the_last_exit_that_is_used() -> None:
    gaps = Configuration(((-1, 0.5), (0, 0.25), (-1, 1.0), (0, 0.75), (-1, 0.5)))
    assert without_gaps(gaps).exits == ((0, 1.0), (0, 0.25), (0, 1.0), (0, 0.75), (-1, 0.5))
    nothing = Configuration(((-1, 1.0),) * 3)
    assert without_gaps(nothing) == nothing


def test_entries_are_the_sweeps_judged_on_all_records() -> None:
    generator = np.random.default_rng(0)
    problems = {name: random_problem(generator, 57, 4, 3) for name in ("validation", "test", "other")}
    found = sweep(problems["validation"], WEIGHTS, starts=2)
    entries = SearchDriver(problems, SearchRequest(WEIGHTS, starts=2)).weights()
    assert [entry.configuration for entry in entries] == [result.configuration for result in found]
    for entry, result in zip(entries, found, strict=True):
        assert entry.objective == result.objective
        assert entry.points == {name: problem.evaluate(result.configuration) for name, problem in problems.items()}


def test_additive_heads_pay_for_every_exit_before_the_last() -> None:
    generator = np.random.default_rng(3)
    filled = 0
    for _ in range(6):
        problems = {name: random_problem(generator, 41, 5, 1) for name in ("validation", "test")}
        plain, additive = (
            SearchDriver(problems, SearchRequest(WEIGHTS, starts=2, additive=additive)).weights()
            for additive in (False, True)
        )
        for before, after in zip(plain, additive, strict=True):
            used = [head >= 0 for head, _ in after.configuration.exits]
            assert used == sorted(used, reverse=True)
            was, point = before.points["validation"], after.points["validation"]
            assert point.accuracy == was.accuracy
            assert point.exit_fractions == was.exit_fractions
            objective = objective_of(problems["validation"], after.accuracy_weight)
            assert after.objective == pytest.approx(objective(point.accuracy * 41, point.macs * 41))
            if after.configuration != before.configuration:
                filled += 1
                assert point.macs > was.macs
    assert filled


def test_what_was_asked_for_is_checked() -> None:
    problems = {"one": random_problem(np.random.default_rng(0), 57, 3, 2)}
    with pytest.raises(UserError, match="starts is -1, allowed is 0 or more"):
        SearchRequest(starts=-1)
    with pytest.raises(UserError, match=r"accuracy weight is 1\.5, allowed is 0 to 1"):
        SearchDriver(problems, SearchRequest([0.5, 1.5]))
    with pytest.raises(UserError, match=r"relative_latency is 0\.5, but time is known only"):
        SearchDriver(problems, SearchRequest(budgets=[Budget("relative_latency", 0.5)]))


def test_an_unattainable_budget_is_an_entry_too() -> None:
    problems = {"one": random_problem(np.random.default_rng(0), 57, 3, 2)}
    budgets = [Budget("relative_macs", 0.0001), Budget("relative_macs", 0.9)]
    missed, met = SearchDriver(problems, SearchRequest(budgets=budgets)).budgets()
    assert isinstance(missed, Unattainable)
    assert missed.nearest > 0.0001
    assert isinstance(met, SearchEntry)
    assert met.asked == {"relative_macs": 0.9}
    assert met.points["one"].relative_macs <= 0.9
