"""Configurations chosen by measured times: within their budgets, never slower than the plain backbone."""

from dataclasses import replace

import numpy as np
import pytest

from dynexit.core.latency import BatchTimes, LatencyTable
from dynexit.search.budgets import Budget, Unattainable
from dynexit.search.driver import SearchDriver, SearchRequest
from dynexit.search.problem import Problem
from dynexit.search.timed import TimedSearch, budgets_by_time
from tests.reference.exit_problems import random_problem

WEIGHTS = [0.2, 0.4, 0.6, 0.8, 0.95]


def table_for(problem: Problem, exit_seconds: float = 0.01) -> LatencyTable:
    """A backbone whose stages cost 1 s at batch 1 and half as much for each of eight images; dear exits first."""
    num_positions, num_types = len(problem.costs.positions), len(problem.costs.head_types)

    def times(batch: int) -> BatchTimes:
        stage = 1.0 if batch == 1 else batch / 2
        heads = tuple((exit_seconds * (num_positions - p),) * num_types for p in range(num_positions))
        return BatchTimes(
            stage * (num_positions + 1), (stage,) * (num_positions + 1), heads, *[(0.0,) * num_positions] * 2
        )

    return LatencyTable(problem.costs.positions, problem.costs.head_types, {1: times(1), 8: times(8)})


@pytest.fixture
def problems() -> dict[str, Problem]:
    generator = np.random.default_rng(5)
    return {name: random_problem(generator, 211, 4, 2) for name in ("validation", "test")}


@pytest.mark.parametrize("batch", [1, 8])
def test_what_is_chosen_by_time_is_never_slower(problems: dict[str, Problem], batch: int) -> None:
    settings = SearchRequest(WEIGHTS, starts=2)
    for exit_seconds, is_cheap in ((0.01, True), (30.0, False)):
        table = table_for(problems["validation"], exit_seconds)
        found = TimedSearch(problems, settings, table, batch).weights()
        assert len(found) <= 5
        used = [head >= 0 for one in found for head, _ in one.entry.configuration.exits]
        assert any(used) == is_cheap
        for one in found:
            assert one.relative_latency["validation"] <= 1
            for name, problem in problems.items():
                point = problem.evaluate(one.entry.configuration)
                heads = [head for head, _ in one.entry.configuration.exits]
                assert one.latency_ms[name] == pytest.approx(1000 * table.seconds(heads, point.exit_fractions, batch))
                assert one.entry.points[name] == point


def test_at_batch_one_it_is_the_exact_search_with_times_as_costs(problems: dict[str, Problem]) -> None:
    settings, table = SearchRequest(WEIGHTS, starts=2), table_for(problems["validation"])
    whole = replace(settings, budgets=[Budget("relative_latency", 1.0)])  # both then search from weight 0 on
    expected = SearchDriver(problems, whole, table.costs(1, problems["validation"].costs)).weights()
    found = {one.entry.accuracy_weight: one for one in TimedSearch(problems, settings, table, 1).weights()}
    assert found
    for entry in expected:
        assert entry.relative_latency is not None
        if entry.relative_latency["validation"] <= 1:
            timed = found.pop(entry.accuracy_weight)
            assert timed.relative_latency["validation"] == pytest.approx(entry.relative_latency["validation"], rel=1e-9)
    assert not found


@pytest.mark.parametrize("batch", [1, 8])
def test_budgets_of_time_are_met(problems: dict[str, Problem], batch: int) -> None:
    search = TimedSearch(problems, SearchRequest(starts=2), table_for(problems["validation"]), batch)
    full_ms = 1000 * search.table.times[batch].backbone
    accuracies = []
    for share in (0.4, 0.6, 0.9):
        by_share, by_ms = search.meet("relative_latency", share), search.meet("latency_ms", share * full_ms)
        assert by_share.entry.configuration == by_ms.entry.configuration
        assert by_share.relative_latency["validation"] <= share
        assert by_ms.entry.asked == {"latency_ms": share * full_ms, "batch_size": batch}
        accuracies.append(by_share.entry.points["validation"].accuracy)
    assert accuracies == sorted(accuracies)
    with pytest.raises(
        Unattainable, match=f"latency_ms 1 is unattainable at batch size {batch}: the fastest"
    ) as caught:
        search.meet("latency_ms", 1.0)
    nearest = search.meet("latency_ms", caught.value.nearest)
    assert nearest.latency_ms["validation"] == pytest.approx(caught.value.nearest)


def test_a_table_of_another_model_is_refused(problems: dict[str, Problem]) -> None:
    other = random_problem(np.random.default_rng(0), 50, 3, 2)
    with pytest.raises(ValueError, match=r"it has positions \[0, 2, 4\] with .*, the record has \[0, 2, 4, 6\]"):
        TimedSearch(problems, SearchRequest(WEIGHTS), table_for(other), 1)


def test_budgets_of_time_are_those_two_kinds() -> None:
    asked = {"latency_ms": [4.0], "relative_latency": [0.5, 0.7], "relative_macs": [0.3]}
    assert budgets_by_time(asked) == [("latency_ms", 4.0), ("relative_latency", 0.5), ("relative_latency", 0.7)]
    with pytest.raises(Exception, match="latency_ms"):
        Budget("latency_ms", 4.0)
