"""What is said to be certain of probabilities holds, is said wherever it is clear, and needs few bytes."""

import numpy as np
import pytest

from dynexit.core.bounds import ProbabilityLimit


def layer(num_classes: int, num_features: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (K, D), bias (K,) and features (D,); some weights large, one row zero."""
    random = np.random.default_rng(num_features)
    weight = random.standard_t(3, (num_classes, num_features)) * scale / num_features**0.5
    weight[1] = 0
    features = np.abs(random.standard_normal(num_features)) + 0.5
    return weight.astype(np.float32), random.normal(size=num_classes).astype(np.float32), features.astype(np.float32)


def largest_probability(weight: np.ndarray, bias: np.ndarray, x: np.ndarray) -> float:
    logit = weight.astype(np.float64) @ x + bias
    return float(1 / np.exp(logit - logit.max()).sum())


@pytest.mark.parametrize("shape", [(2, 1), (10, 48), (100, 300), (1000, 384), (7, 4096)])
@pytest.mark.parametrize("scale", [0.01, 0.5, 2.0, 30.0])
def test_certain_is_true_and_what_is_clear_is_certain(shape: tuple[int, int], scale: float) -> None:
    weight, bias, x = layer(*shape, scale)
    limit = ProbabilityLimit(weight, bias)
    probability = largest_probability(weight, bias, x)
    for above in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1):
        assert not limit.is_above_all(probability * (1 - above), x)
    # two bytes: less than a step of 2 in 2^15 for each weight, doubled in the bound
    step = np.abs(weight).max(1).max() / 2**14
    assert limit.is_above_all(probability * np.exp(2 * step * np.abs(x).sum() + 1e-3), x)


def test_upper_bytes_decide_alone_where_the_limit_is_far() -> None:
    weight, bias, x = layer(100, 300, 0.5)
    far, close = ProbabilityLimit(weight, bias), ProbabilityLimit(weight, bias)
    probability = largest_probability(weight, bias, x)
    far._bytes_2KD[1] = 127  # wrong, if anybody looked
    assert far.is_above_all(4 * probability, x)
    assert close.is_above_all(1.01 * probability, x)
    assert not far.is_above_all(1.01 * probability, x)


def test_nothing_is_certain_of_features_that_are_not_finite() -> None:
    weight, bias, x = layer(10, 48, 0.5)
    limit = ProbabilityLimit(weight, bias)
    assert limit.is_above_all(1.0, x)
    for value in (np.nan, np.inf, 3e38):
        x[7] = value
        assert not limit.is_above_all(1.0, x)


def test_logits_far_apart_are_no_trouble() -> None:
    weight, bias, x = layer(1000, 48, 0.01)
    bias[:] = -np.arange(1000, dtype=np.float32)
    probability = largest_probability(weight, bias, x)
    assert probability == pytest.approx(0.632, abs=0.05)
    limit = ProbabilityLimit(weight, bias)
    assert limit.is_above_all(probability * 1.02, x)
    assert not limit.is_above_all(probability * 0.999, x)
