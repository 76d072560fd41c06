"""Operating points, configurations and fronts against brute force."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import (
    Configuration,
    apply_configuration,
    configuration_macs_L,
    hypervolume,
    operating_point,
    pareto_front,
)

P, H, N = 4, 2, 200
COSTS = ExitCosts(
    full_macs=1000,
    positions=(0, 1, 4, 5),
    backbone_macs=(100, 300, 500, 900),
    head_types=("linear", "mlp1x8"),
    head_macs=((1, 10), (2, 20), (3, 30), (4, 40)),
    gate_macs=(9, 9, 9, 9),
)


def test_operating_point_equals_loops() -> None:
    rng = np.random.default_rng(0)
    correct, macs = rng.random((P, N)) < 0.6, np.array([3, 50, 700, 901])
    exit_index = rng.integers(0, P - 1, N)  # nobody at the last exit
    point = operating_point(exit_index, correct, macs, full_macs=900)
    hits = [bool(correct[e, n]) for n, e in enumerate(exit_index)]
    spent = [int(macs[e]) for e in exit_index]
    assert point.accuracy == sum(hits) / N
    assert point.macs == sum(spent) / N
    assert point.relative_macs == sum(spent) / N / 900
    assert point.exit_fractions == tuple(list(exit_index).count(e) / N for e in range(P))
    assert sum(point.exit_fractions) == pytest.approx(1, abs=1e-15)
    assert point.num_samples == N


def test_operating_point_of_sums_beyond_64_bits_is_exact() -> None:
    macs = np.array([2**60, 2**61 + 1])
    point = operating_point(np.array([1, 1, 1, 1, 0]), np.ones((2, 5), dtype=bool), macs, full_macs=2**61 + 1)
    assert point.macs == (4 * (2**61 + 1) + 2**60) / 5


@pytest.mark.parametrize(
    ("exit_index", "num_samples", "message"),
    [
        ([], 0, "an operating point needs at least one sample"),
        ([0, 2], 2, "exit_index_N must lie in 0..1, got 0..2"),
        ([-1, 1], 2, "exit_index_N must lie in 0..1, got -1..1"),
        ([0, 1], 3, "exit_index_N (2,) and macs_L (2,) do not fit correct_LN (2, 3)"),
    ],
)
def test_impossible_operating_points_are_refused(exit_index: list[int], num_samples: int, message: str) -> None:
    correct = np.ones((2, num_samples), dtype=bool)
    with pytest.raises(ValueError) as error:
        operating_point(np.array(exit_index, dtype=np.int64), correct, np.array([1, 2]), 2)
    assert str(error.value) == message


finite_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(st.integers(-1, 5), finite_float32), max_size=6))
def test_configuration_json_round_trip_is_exact(exits: list[tuple[int, float]]) -> None:
    configuration = Configuration(tuple(exits))
    back = Configuration.from_json(json.loads(json.dumps(configuration.to_json())))
    assert back == configuration
    assert [np.float32(t).tobytes() for _, t in back.exits] == [np.float32(t).tobytes() for _, t in exits]


def test_whole_number_thresholds_may_come_back_as_integers() -> None:
    assert Configuration.from_json([[0, 1], [-1, 0]]) == Configuration(((0, 1.0), (-1, 0.0)))


@pytest.mark.parametrize("threshold", [0.9, 0.1, 1 / 3, 1, np.float64(0.7), np.float32(0.7), 1e-300, 3e38])
def test_thresholds_are_rounded_to_float32(threshold: Any) -> None:
    configuration = Configuration(((0, threshold), (-1, 1.0)))
    assert configuration.exits == ((0, float(np.float32(threshold))), (-1, 1.0))
    assert type(configuration.exits[0][1]) is float
    assert configuration == Configuration(configuration.exits)
    confidence = np.full((2, 1, 3), np.float32(threshold))
    confidence[0, 0, 1:] = np.nextafter(np.float32(threshold), np.float32([-np.inf, np.inf]))
    right = np.ones((2, 1, 3), dtype=bool)
    assert apply_configuration(configuration, confidence, right, right[0, 0])[0].tolist() == [2, 2, 0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([[0, math.nan]], "a threshold is a finite number in float32, got nan"),
        ([[0, math.inf]], "a threshold is a finite number in float32, got inf"),
        ([[0, 1e300]], "a threshold is a finite number in float32, got 1e+300"),
        ([[0, "high"]], "a threshold is a finite number in float32, got 'high'"),
        ([[0, None]], "a threshold is a finite number in float32, got None"),
        ([[-2, 0.5]], "a head type is an index, or -1 for no exit, got -2"),
        ([[0.0, 0.5]], "a head type is an index, or -1 for no exit, got 0.0"),
        ([[0, 0.5, 1]], "a configuration is a list of [head type, threshold] pairs"),
        ([3], "a configuration is a list of [head type, threshold] pairs"),
        (3, "a configuration is a list of [head type, threshold] pairs"),
    ],
)
def test_impossible_configurations_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Configuration.from_json(data)
    assert str(error.value) == message


def test_configuration_macs_count_enabled_heads_only() -> None:
    configuration = Configuration(((1, 0.5), (-1, 0.0), (0, 0.5), (1, 0.25)))
    macs = configuration_macs_L(configuration, COSTS)
    assert macs.dtype == np.int64
    assert macs.tolist() == [110, 310, 513, 953, 1053]
    assert configuration_macs_L(Configuration(((-1, 0.0),) * P), COSTS).tolist() == [100, 300, 500, 900, 1000]


def test_configuration_that_does_not_fit_the_costs_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        configuration_macs_L(Configuration(((0, 0.5),)), COSTS)
    assert str(error.value) == "the configuration has 1 positions, the costs have 4"
    with pytest.raises(ValueError) as error:
        configuration_macs_L(Configuration(((2, 0.5),) * P), COSTS)
    assert str(error.value) == "head type 2 is out of range; there are 2"


def random_record(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    confidence = (rng.integers(0, 9, (P, H, N)) / 8).astype(np.float32)  # many ties
    return confidence, rng.random((P, H, N)) < 0.7, rng.random(N) < 0.9


@pytest.mark.parametrize("seed", range(20))
def test_apply_configuration_equals_loops(seed: int) -> None:
    confidence, correct, base_correct = random_record(seed)
    rng = np.random.default_rng(100 + seed)
    configuration = Configuration(tuple((int(rng.integers(-1, H)), int(rng.integers(0, 9)) / 8) for _ in range(P)))
    exit_index, ok = apply_configuration(configuration, confidence, correct, base_correct)
    for n in range(N):
        where, right = P, base_correct[n]
        for p, (t, threshold) in enumerate(configuration.exits):
            if t >= 0 and confidence[p, t, n] > threshold:
                where, right = p, correct[p, t, n]
                break
        assert (exit_index[n], ok[n]) == (where, right)


def test_apply_configuration_compares_in_float32() -> None:
    confidence = np.array([[[0.1, np.nextafter(np.float32(0.1), np.float32(1))]]], dtype=np.float32)
    configuration = Configuration(((0, float(np.float32(0.1))),))
    right = np.ones((1, 1, 2), dtype=bool)
    assert apply_configuration(configuration, confidence, right, right[0, 0])[0].tolist() == [1, 0]
    with pytest.raises(ValueError) as error:
        apply_configuration(configuration, confidence.astype(np.float64), right, right[0, 0])
    assert str(error.value) == "confidences are compared in float32, got float64"
    with pytest.raises(ValueError) as error:
        apply_configuration(Configuration(()), confidence, right, right[0, 0])
    assert str(error.value) == "confidences (1, 1, 2) and correct (1, 1, 2) do not fit 0 positions"


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=25)


@given(points)
def test_pareto_front_equals_brute_force(pairs: list[tuple[int, int]]) -> None:
    mask = pareto_front([a for a, _ in pairs], [m for _, m in pairs])
    assert mask.dtype == bool
    beaten = [any(b >= a and n <= m and (b, n) != (a, m) for b, n in pairs) for a, m in pairs]
    assert mask.tolist() == [not lost for lost in beaten]


@given(points)
def test_hypervolume_equals_counted_squares(pairs: list[tuple[int, int]]) -> None:
    area = hypervolume([a for a, _ in pairs], [m for _, m in pairs], reference=(2.0, 5.0))
    squares = {(x, y) for a, m in pairs for x in range(m, 5) for y in range(2, a)}
    assert area == len(squares)


def test_hypervolume_of_known_shapes() -> None:
    assert hypervolume([], []) == 0
    assert hypervolume([1.0], [0.0]) == 1
    assert hypervolume([0.8, 0.5], [0.5, 0.25]) == pytest.approx(0.8 * 0.5 + 0.5 * 0.25)
    assert hypervolume([0.9], [1.2]) == 0


@pytest.mark.parametrize("function", [pareto_front, hypervolume])
def test_points_that_are_not_points_are_refused(function: Callable[..., object]) -> None:
    with pytest.raises(ValueError) as error:
        function([0.5, math.nan], [1, 2])
    assert str(error.value) == "accuracies and MACs must not be NaN"
    with pytest.raises(ValueError) as error:
        function([0.5], [1, 2])
    assert str(error.value) == "accuracies (1,) and MACs (2,) must be lists of the same length"
