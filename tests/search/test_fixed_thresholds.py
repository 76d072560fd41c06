"""MSDNet's fixed thresholds against one loop over samples, and the shares they aim at."""

import numpy as np
import pytest

from dynexit.search.methods import NEVER, fixed_configurations, fixed_thresholds, geometric_fractions
from tests.reference import jei_dnn_loops as loops
from tests.reference.exit_problems import random_problem


@pytest.mark.parametrize("step", [1, 5, 20, 39])
@pytest.mark.parametrize("levels", [4, 10**6])  # many ties, and hardly any
def test_thresholds_equal_loops(step: int, levels: int) -> None:
    rng = np.random.default_rng(step)
    confidence = rng.integers(0, levels, (6, 97)) / levels
    fractions = geometric_fractions(step, 6)
    expected = loops.fixed_thresholds(confidence.tolist(), fractions.tolist())
    assert fixed_thresholds(confidence, fractions).tolist() == expected


def test_without_ties_every_exit_takes_its_share() -> None:
    confidence = np.random.default_rng(0).random((4, 1000)).astype(np.float32)
    fractions = geometric_fractions(15, 4)
    thresholds = fixed_thresholds(confidence, fractions)
    assert thresholds.dtype == np.float32
    first_N = (confidence >= thresholds[:, None]).argmax(0)
    wanted = np.floor(1000 * fractions).astype(int)
    assert np.bincount(first_N)[:3].tolist() == wanted[:3].tolist()


def test_exits_that_take_nobody_or_too_many_never_take() -> None:
    confidence = np.array([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4], [0.1, 0.1, 0.1]])
    thresholds = fixed_thresholds(confidence, np.array([0.1, 0.9, 0.0]))
    assert thresholds.tolist() == [NEVER, 0.5, -NEVER]
    assert fixed_thresholds(confidence, np.array([0.7, 0.7, 0.0])).tolist() == [0.8, NEVER, -NEVER]


def test_fractions_are_geometric_and_sum_to_one() -> None:
    fractions = geometric_fractions(10, 5)
    assert fractions.sum() == pytest.approx(1, abs=1e-15)
    assert (fractions[1:] / fractions[:-1]).tolist() == pytest.approx([0.5] * 4)
    assert geometric_fractions(20, 4).tolist() == [0.25] * 4


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError) as error:
        geometric_fractions(0, 3)
    assert str(error.value) == "step and num_exits must be 1 or more, got 0 and 3"
    with pytest.raises(ValueError) as error:
        fixed_thresholds(np.zeros((3, 5)), np.ones(2))
    assert str(error.value) == "fractions_M has shape (2,), but the confidences have 3 exits"


def test_configurations_take_whom_the_thresholds_take() -> None:
    problem = random_problem(np.random.default_rng(1), 83, 3, 2)
    configurations = fixed_configurations(problem)
    assert len(set(configurations)) == len(configurations)
    expected = set()
    for head in range(2):
        confidence = np.concatenate((problem.confidence_PHN[:, head], np.zeros((1, 83), np.float32)))
        for step in range(1, 40):
            thresholds = fixed_thresholds(confidence, geometric_fractions(step, 4))
            leaving = [-1] * 83
            for sample in range(83):
                leaving[sample] = next(k for k in range(4) if confidence[k, sample] >= thresholds[k])
            expected.add((head, tuple(np.bincount(leaving, minlength=4) / 83)))
    found = set()
    for configuration in configurations:
        heads = {head for head, _ in configuration.exits}
        assert len(heads) == 1  # one head type at every position, and none left out
        assert heads != {-1}
        found.add((heads.pop(), problem.evaluate(configuration).exit_fractions))
    assert found == expected
