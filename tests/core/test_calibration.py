"""Calibration measures against loops and against what they promise."""

import math

import numpy as np
import pytest

from dynexit.core.calibration import (
    CONFORMAL_VARIANTS,
    conformal_quantile,
    conformal_sets,
    conformal_thresholds,
    ece,
    scaled_confidence,
    set_sizes,
    temperature,
)


def test_width_ece_equals_loops() -> None:
    rng = np.random.default_rng(0)
    confidence, correct = rng.random(500), rng.random(500) < 0.7
    total = 0.0
    for b in range(10):
        inside = [n for n in range(500) if b / 10 < confidence[n] <= (b + 1) / 10]
        total += abs(sum(correct[n] for n in inside) - sum(confidence[n] for n in inside)) / 500
    assert ece(confidence, correct, num_bins=10, binning="width") == pytest.approx(total, rel=1e-12)


def test_quantile_ece_has_bins_of_equal_size() -> None:
    confidence = np.linspace(0.1, 0.9, 60)
    correct = np.random.default_rng(1).random(60) < 0.5
    bins = [slice(4 * b, 4 * b + 4) for b in range(15)]
    expected = sum(abs(correct[b].mean() - confidence[b].mean()) / 15 for b in bins)
    assert ece(confidence, correct) == pytest.approx(expected, rel=1e-12)


def test_a_sample_on_an_edge_belongs_below() -> None:
    confidence, correct = np.array([0.1, 0.5, 0.9]), np.array([True, False, True])
    assert ece(confidence, correct, num_bins=2) == pytest.approx((abs(1 - 0.6) + abs(1 - 0.9)) / 3)


@pytest.mark.parametrize("binning", ["quantile", "width"])
def test_ece_of_extremes(binning: str) -> None:
    sure = np.ones(8, dtype=np.float32)
    assert ece(sure, np.ones(8, dtype=bool), binning=binning) == 0
    assert ece(sure, np.zeros(8, dtype=bool), binning=binning) == 1
    assert ece(sure[:1], np.zeros(1, dtype=bool), binning=binning) == 1


def test_ece_of_a_calibrated_predictor_is_small_on_many_samples_and_large_on_few() -> None:
    rng = np.random.default_rng(2)
    confidence = rng.beta(8, 1, 40_000)
    correct = rng.random(40_000) < confidence
    assert ece(confidence, correct) < 0.01
    batches = [ece(confidence[n : n + 64], correct[n : n + 64]) for n in range(0, 6400, 64)]
    assert np.mean(batches) > 0.05


def test_ece_refuses_nothing_and_the_unknown() -> None:
    with pytest.raises(ValueError) as error:
        ece(np.zeros(0), np.zeros(0, dtype=bool))
    assert str(error.value) == "a calibration error needs at least one sample"
    with pytest.raises(ValueError) as error:
        ece(np.zeros(1), np.zeros(1, dtype=bool), binning="equal")
    assert str(error.value) == "binning 'equal' is unknown; it is one of quantile, width"


@pytest.mark.parametrize("num_samples", [1, 9, 10, 19, 20, 99, 100, 1000])
def test_conformal_quantile_is_the_score_of_its_rank(num_samples: int) -> None:
    scores = np.random.default_rng(3).random(num_samples)
    for thousandths in (10, 50, 100, 300, 900):
        rank = -(-(num_samples + 1) * (1000 - thousandths) // 1000)  # in integers
        expected = sorted(scores)[rank - 1] if rank <= num_samples else 1.0
        assert conformal_quantile(scores, thousandths / 1000) == expected
    assert conformal_quantile(np.zeros(0), 0.05) == 1.0


@pytest.mark.parametrize("num_samples", [10, 100, 1000])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_sets_cover_as_promised_from_few_samples_on(num_samples: int, alpha: float) -> None:
    rng = np.random.default_rng(8)
    num_trials, num_new = 400_000 // num_samples, 50
    covered = {"finite_sample": 0, "reference": 0}
    for _ in range(num_trials):
        label_probability = rng.beta(3, 1, num_samples + num_new)
        scores, new = 1 - label_probability[:num_samples], label_probability[num_samples:, None]
        for quantile in covered:
            threshold = np.array([conformal_quantile(scores, alpha, quantile)])
            covered[quantile] += conformal_sets(new, np.zeros(num_new, dtype=np.int64), threshold).sum()
    coverage = {quantile: count / (num_trials * num_new) for quantile, count in covered.items()}
    rank = min(math.ceil((num_samples + 1) * (1 - alpha) - 1e-9), num_samples + 1)
    # the mean of a rank's coverage is rank / (N + 1); of a trial it varies by at most 1 / (2 sqrt(N + 2))
    error = 4 * (0.5 / math.sqrt(num_samples + 2) + 0.5 / math.sqrt(num_new)) / math.sqrt(num_trials)
    error *= 2 * math.sqrt(alpha)  # the deviation of a share near 1
    assert coverage["finite_sample"] >= 1 - alpha - error
    assert coverage["finite_sample"] == pytest.approx(rank / (num_samples + 1), abs=error)
    if (num_samples, alpha) == (10, 0.01):
        assert coverage["finite_sample"] == 1
        assert coverage["reference"] == pytest.approx(10 / 11, abs=0.005)  # short of the promised 0.99


def test_the_references_quantile_is_the_order_statistic_at_its_level() -> None:
    rng = np.random.default_rng(3)
    for num_samples in (1, 2, 19, 20, 99, 100, 250):
        scores = rng.random(num_samples)
        for alpha in (0.01, 0.1, 0.3, 0.9):
            level = min(1.0, math.ceil((num_samples + 1) * (1 - alpha)) / num_samples)
            expected = sorted(scores)[math.ceil(level * (num_samples - 1))]
            assert conformal_quantile(scores, alpha, "reference") == expected
    assert conformal_quantile(np.zeros(0), 0.05, "reference") == 0.95
    with pytest.raises(ValueError) as error:
        conformal_quantile(np.zeros(3), 0.05, "exact")
    assert str(error.value) == "quantile 'exact' is unknown; it is one of finite_sample, reference"


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 1.5])
def test_conformal_quantile_refuses_impossible_alpha(alpha: float) -> None:
    with pytest.raises(ValueError) as error:
        conformal_quantile(np.zeros(3), alpha)
    assert str(error.value) == f"alpha must lie between 0 and 1, got {alpha}"


def test_conformal_thresholds_choose_their_samples() -> None:
    rng = np.random.default_rng(4)
    scores = rng.random((3, 60))
    exit_index = np.array([0] * 21 + [1] * 20 + [0] * 19)  # 40 leave at 0, 20 at 1, nobody at 2
    gated = np.array([scores[e, n] for n, e in enumerate(exit_index)])
    alphas = (0.1, 0.4)
    thresholds = {v: conformal_thresholds(scores, exit_index, alphas, v) for v in CONFORMAL_VARIANTS}
    for a, alpha in enumerate(alphas):
        every = [conformal_quantile(scores[l], alpha) for l in range(3)]  # noqa: E741
        own = [conformal_quantile(scores[l, exit_index == l], alpha) for l in range(3)]  # noqa: E741
        assert own[2] == 1  # nobody: every class
        assert thresholds["general"][a].tolist() == [conformal_quantile(gated, alpha)] * 3
        assert thresholds["gated_all"][a].tolist() == every
        assert thresholds["gated_strict"][a].tolist() == own
        assert thresholds["gated"][a].tolist() == [own[0], every[1], every[2]]  # 20 samples are not more than 20
    with pytest.raises(ValueError) as error:
        conformal_thresholds(scores, exit_index, alphas, "strict")
    assert str(error.value) == (
        "conformal variant 'strict' is unknown; it is one of general, gated_all, gated_strict, gated"
    )


@pytest.mark.parametrize("variant", CONFORMAL_VARIANTS)
def test_conformal_sets_cover_new_samples(variant: str) -> None:
    rng = np.random.default_rng(5)
    probability = rng.dirichlet([0.3] * 6, (3, 8000))
    label = np.array([rng.choice(6, p=p) for p in probability[2]])
    probability[0] = probability[0] * 0.3 + probability[2] * 0.7  # two exits that know something of the truth
    probability[1] = 0.1 / 6 + probability[2] * 0.9
    exit_index = rng.integers(0, 3, 8000)
    scores = 1 - probability[:, np.arange(8000), label]
    known, new = slice(0, 4000), slice(4000, 8000)
    (threshold,) = conformal_thresholds(scores[:, known], exit_index[known], (0.1,), variant)
    taken = probability[exit_index, np.arange(8000)][new]
    sets = conformal_sets(taken, exit_index[new], threshold)
    assert sets.shape == (4000, 6)
    assert 0.88 < sets[np.arange(4000), label[new]].mean() < 0.925
    assert sets.sum(1).mean() < 4


def test_conformal_sets_use_the_exit_taken() -> None:
    probability = np.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]])
    sets = conformal_sets(probability, np.array([1, 0]), np.array([0.5, 0.8]))
    assert sets.tolist() == [[True, True, False], [True, False, False]]


@pytest.mark.parametrize("true_temperature", [0.3, 1.0, 4.0])
def test_temperature_recovers_the_scale_of_the_logits(true_temperature: float) -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 2, (20_000, 5))
    odds = np.exp(logits)
    label = np.array([rng.choice(5, p=row / row.sum()) for row in odds])
    found = temperature(logits * true_temperature, label)
    assert found == pytest.approx(true_temperature, rel=0.05)

    def loss(scale: float) -> float:
        scaled = logits * true_temperature / scale
        return float((np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(label)), label]).mean())

    assert loss(found) < min(loss(found * 1.001), loss(found / 1.001))


def test_temperature_stays_in_range() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    assert temperature(logits, np.array([0, 1])) == pytest.approx(0.01)
    assert temperature(logits, np.array([1, 0])) == pytest.approx(100)
    assert 0.01 <= temperature(np.zeros((3, 2)), np.array([0, 1, 1])) <= 100
    with pytest.raises(ValueError) as error:
        temperature(np.zeros((0, 2)), np.zeros(0, dtype=np.int64))
    assert str(error.value) == "a temperature needs at least one sample"


@pytest.mark.parametrize("num_known", [1, 2, 5, 9])
def test_set_sizes_bound_the_size_that_all_classes_give(num_known: int) -> None:
    rng = np.random.default_rng(num_known)
    probability = -np.sort(-rng.dirichlet(np.full(9, 0.3), 400).astype(np.float32), axis=1)
    exit_index = rng.integers(0, 4, 400)
    threshold = np.array([0.3, 0.95, 0.999, 1.0])
    true = conformal_sets(probability, exit_index, threshold).sum(axis=1)
    least, greatest = set_sizes(probability[:, :num_known], 9, exit_index, threshold)
    assert (least <= true).all()
    assert (true <= greatest).all()
    assert np.array_equal(least[exit_index == 3], np.full((exit_index == 3).sum(), 9))
    if num_known == 9:
        assert np.array_equal(least, greatest)
    else:
        assert (least < greatest).any()
        assert (least == greatest)[exit_index == 0].all()  # above one half there is room for one class


def test_a_scaled_confidence_is_the_softmaxs_at_that_temperature() -> None:
    logits = np.random.default_rng(4).normal(0, 3, (50, 7))
    temperatures = np.linspace(0.2, 5, 50)

    def softmax(z: np.ndarray) -> np.ndarray:
        return np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)

    expected = softmax(logits / temperatures[:, None]).max(axis=1)
    found = scaled_confidence(-np.sort(-softmax(logits), axis=1), temperatures)
    assert np.allclose(found, expected, rtol=1e-12)
