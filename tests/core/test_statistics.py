"""Intervals against slow resampling, their coverage on made-up classifiers, and the verdicts."""

import math

import numpy as np
import pytest

from dynexit.core.statistics import Interval, accuracy_interval, mean_interval, paired_interval, verdict


def resampled(values_N: np.ndarray, origin_N: np.ndarray, num_resamples: int = 4000) -> tuple[float, float]:
    """The percentile interval by drawing originals one by one."""
    random = np.random.default_rng(1)
    groups = [values_N[origin_N == origin] for origin in np.unique(origin_N)]
    means = []
    for _ in range(num_resamples):
        drawn = random.integers(0, len(groups), len(groups))
        means.append(np.concatenate([groups[i] for i in drawn]).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def test_bootstrap_equals_drawing_originals_one_by_one() -> None:
    random = np.random.default_rng(3)
    origin_N = np.arange(240) % 80  # three views of each
    values_N = random.integers(-1, 2, 240) * (random.random(240) < 0.2)
    interval = mean_interval(values_N, origin_N)
    assert interval.value == values_N.mean()
    assert (interval.low, interval.high) == pytest.approx(resampled(values_N, origin_N), abs=1.01 / 240)


def test_views_of_one_original_add_no_certainty() -> None:
    values_G = np.random.default_rng(0).integers(-1, 2, 100)
    once = mean_interval(values_G)
    thrice = mean_interval(np.tile(values_G, 3), np.tile(np.arange(100), 3))
    assert (once.low, once.high) == pytest.approx((thrice.low, thrice.high))
    right_G = values_G > -1
    assert accuracy_interval(right_G).low == pytest.approx(
        accuracy_interval(np.tile(right_G, 3), np.tile(np.arange(100), 3)).low, abs=1e-3
    )


def test_wilson_by_hand() -> None:
    # 8 of 10: (0.8 + 0.19207) / 1.38415 ± 1.95996 sqrt(0.016 + 0.0096) / 1.38415
    interval = accuracy_interval(np.arange(10) < 8)
    assert (interval.low, interval.high) == pytest.approx((0.490162, 0.943318), abs=1e-5)


@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_wrong_is_not_certain(right: bool) -> None:
    interval = accuracy_interval(np.full(60, right), np.arange(60) % 20)
    limit = 1.96**2 / (20 + 1.96**2)  # Wilson's of 20 originals
    expected = (1 - limit, 1.0) if right else (0.0, limit)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=1e-3)


def test_limits_of_equal_classifiers_follow_the_rule_of_three() -> None:
    interval = mean_interval(np.zeros(300), np.arange(300) % 100)
    assert (interval.low, interval.high) == pytest.approx((-math.log(20) / 100, math.log(20) / 100))


@pytest.mark.parametrize("right", [True, False])
def test_nobody_gains_over_a_classifier_that_is_always_right(right: bool) -> None:
    other_N, limit = np.full(300, right), math.log(20) / 100
    equal = paired_interval(other_N, other_N, np.arange(300) % 100)
    assert (equal.value, equal.low, equal.high) == pytest.approx((0, -limit * right, limit * (not right)))
    differing_N = other_N ^ (np.arange(300) % 100 < 5)
    interval = paired_interval(differing_N, other_N, np.arange(300) % 100)
    assert interval == mean_interval(differing_N.astype(int) - other_N, np.arange(300) % 100)
    mixed_N = np.arange(300) % 100 < 50
    assert paired_interval(mixed_N, mixed_N) == mean_interval(np.zeros(300))


def test_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(5)
    trials, held = 300, {"accuracy": 0, "difference": 0}
    for _ in range(trials):
        difficulty_G = random.random(200)
        first_NG, second_NG = (random.random((3, 200)) < rate + 0.2 * (difficulty_G - 0.5) for rate in (0.80, 0.75))
        origin_N = np.tile(np.arange(200), 3)
        accuracy = accuracy_interval(first_NG.ravel(), origin_N)
        difference = mean_interval(first_NG.ravel().astype(int) - second_NG.ravel(), origin_N)
        held["accuracy"] += accuracy.low <= 0.80 <= accuracy.high
        held["difference"] += difference.low <= 0.05 <= difference.high
    assert all(0.91 < count / trials <= 0.99 for count in held.values()), held


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.001, 0.02, "better"),
        (-0.03, -0.001, "worse"),
        (-0.002, 0.009, "no difference found"),
        (-0.011, 0.012, "too few samples to tell"),
        (-0.1125, 0.0062, "too few samples to tell"),
    ],
)
def test_verdicts(low: float, high: float, expected: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high)) == expected


def test_no_samples_are_refused() -> None:
    for function in (accuracy_interval, mean_interval):
        with pytest.raises(ValueError, match="no samples: an interval needs at least one"):
            function(np.zeros(0))
