"""What a study keeps of a record: additive heads get no gaps, MSDNet's thresholds take what they should."""

import numpy as np
import pytest

from dynexit.core.tradeoff import Configuration
from dynexit.search.exact import sweep
from dynexit.search.methods import fixed_thresholds, geometric_fractions
from dynexit.search.problem import objective_of
from dynexit.search.study_points import PointSearch, Search, fixed_points, without_gaps
from tests.reference.exit_problems import random_problem

WEIGHTS = [0.3, 0.6, 0.8, 0.95, 1.0]


def test_gaps_are_filled_up_to_the_last_exit_that_is_used() -> None:
    gaps = Configuration(((-1, 0.5), (0, 0.25), (-1, 1.0), (0, 0.75), (-1, 0.5)))
    assert without_gaps(gaps).exits == ((0, 1.0), (0, 0.25), (0, 1.0), (0, 0.75), (-1, 0.5))
    nothing = Configuration(((-1, 1.0),) * 3)
    assert without_gaps(nothing) == nothing


def test_searched_points_are_the_sweeps_and_judged_on_both_records() -> None:
    generator = np.random.default_rng(0)
    validation, test = (random_problem(generator, 57, 4, 3) for _ in range(2))
    found = sweep(validation, WEIGHTS, starts=2)
    entries = PointSearch(validation, test, Search(starts=2, additive=False), WEIGHTS).weights()
    assert [entry["exits"] for entry in entries] == [result.configuration.to_json() for result in found]
    for entry, result in zip(entries, found, strict=True):
        assert entry["objective"] == result.objective
        assert entry["validation"]["macs"] == validation.evaluate(result.configuration).macs
        assert entry["test"]["accuracy"] == test.evaluate(result.configuration).accuracy


def test_additive_heads_pay_for_every_exit_before_the_last() -> None:
    generator = np.random.default_rng(3)
    filled = 0
    for _ in range(6):
        validation, test = (random_problem(generator, 41, 5, 1) for _ in range(2))
        plain = PointSearch(validation, test, Search(starts=2, additive=False), WEIGHTS).weights()
        for before, after in zip(
            plain, PointSearch(validation, test, Search(starts=2, additive=True), WEIGHTS).weights(), strict=True
        ):
            used = [head >= 0 for head, _ in after["exits"]]
            assert used == sorted(used, reverse=True)
            assert after["validation"]["accuracy"] == before["validation"]["accuracy"]
            assert after["validation"]["exit_fractions"] == before["validation"]["exit_fractions"]
            objective = objective_of(validation, after["accuracy_weight"])
            sums = (after["validation"][name] * validation.num_samples for name in ("accuracy", "macs"))
            assert after["objective"] == pytest.approx(objective(*sums))
            if after["exits"] != before["exits"]:
                filled += 1
                assert after["validation"]["macs"] > before["validation"]["macs"]
    assert filled


def test_fixed_points_take_whom_msdnets_thresholds_take() -> None:
    generator = np.random.default_rng(1)
    validation, test = (random_problem(generator, 83, 3, 2) for _ in range(2))
    entries = fixed_points(validation, test)
    exits = [tuple(map(tuple, entry["exits"])) for entry in entries]
    assert len(set(exits)) == len(exits)
    expected = set()
    for head in range(2):
        confidence = np.concatenate((validation.confidence_PHN[:, head], np.zeros((1, 83), np.float32)))
        for step in range(1, 40):
            thresholds = fixed_thresholds(confidence, geometric_fractions(step, 4))
            leaving = [-1] * 83
            for sample in range(83):
                leaving[sample] = next(k for k in range(4) if confidence[k, sample] >= thresholds[k])
            expected.add((head, tuple(np.bincount(leaving, minlength=4) / 83)))
    found = set()
    for entry in entries:
        heads = {head for head, _ in entry["exits"]}
        assert len(heads) == 1  # one head type at every position, and none left out
        assert heads != {-1}
        found.add((heads.pop(), tuple(entry["validation"]["exit_fractions"])))
        configuration = Configuration.from_json(entry["exits"])
        assert entry["test"]["macs"] == test.evaluate(configuration).macs
        assert entry["validation"]["accuracy"] == validation.evaluate(configuration).accuracy
    assert found == expected
