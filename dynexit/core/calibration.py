"""How far confidences can be trusted: calibration error, conformal sets, temperature.

Shapes: L exits, N samples, K classes, A values of alpha. numpy throughout: this is arithmetic on records.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.floating]
IntArray = NDArray[np.int64]

ALPHAS = (0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05)
"""Miscoverage levels of the published conformal results."""
CONFORMAL_QUANTILES = ("finite_sample", "reference")
CONFORMAL_VARIANTS = ("general", "gated_all", "gated_strict", "gated")

_MIN_OWN_SAMPLES = 20
_RANK_ROUNDING = 1e-9  # of (N + 1)(1 - alpha) in float64: 20 * (1 - 0.05) must not be ranked as 20
_TEMPERATURE_RANGE = (1e-2, 1e2)
_ROUNDING = 1e-6  # of a sum of probabilities in float32


def ece(confidence_N: FloatArray, correct_N: BoolArray, num_bins: int = 15, binning: str = "quantile") -> float:
    """Expected calibration error, in [0, 1]: the mean over samples of |accuracy - mean confidence| of their bin.

    quantile bins hold equally many samples (edges are percentiles; a sample on an edge belongs below), width bins
    split [0, 1] evenly. Over a whole set: averaged over small batches it is biased upwards. Raises ValueError on no
    samples or another binning. Source: JEI-DNN (arXiv 2310.09163), which bins by quantile.
    """
    if len(confidence_N) == 0:
        raise ValueError("a calibration error needs at least one sample")
    confidence_N = confidence_N.astype(np.float64)
    if binning == "quantile":
        edges = np.percentile(confidence_N, np.linspace(0, 100, num_bins + 1))
    elif binning == "width":
        edges = np.linspace(0, 1, num_bins + 1)
    else:
        raise ValueError(f"binning {binning!r} is unknown; it is one of quantile, width")
    bin_N = np.searchsorted(edges[1:-1], confidence_N, side="left")
    surplus = np.bincount(bin_N, weights=correct_N - confidence_N, minlength=num_bins)
    return float(np.abs(surplus).sum() / len(confidence_N))


def conformal_quantile(scores_N: FloatArray, alpha: float, quantile: str = "finite_sample") -> float:
    """Score that a new sample's does not exceed with probability >= 1 - alpha. Scores are in [0, 1].

    finite_sample: the k-th smallest score with k = ceil((N+1)(1-alpha)), and 1 (every class is in the set) where k > N.
    reference: as JEI-DNN's code, the order statistic at or above level min(1, k / N), which is one rank higher, and
    too low where k > N; 1 - alpha if there are no scores. Raises ValueError unless 0 < alpha < 1, or on another name.
    Source: split conformal prediction with threshold (LAC) scores 1 - p[label] (Vovk et al. 2005; arXiv 2310.09163).
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha}")
    if quantile not in CONFORMAL_QUANTILES:
        raise ValueError(f"quantile {quantile!r} is unknown; it is one of {', '.join(CONFORMAL_QUANTILES)}")
    num_samples = len(scores_N)
    if quantile == "finite_sample":
        rank = math.ceil((num_samples + 1) * (1 - alpha) - _RANK_ROUNDING)
        return float(np.partition(scores_N, rank - 1)[rank - 1]) if rank <= num_samples else 1.0
    if num_samples == 0:
        return 1 - alpha
    level = min(1.0, np.ceil((num_samples + 1) * (1 - alpha)) / num_samples)
    return float(np.quantile(scores_N, level, method="higher"))


def conformal_thresholds(
    scores_LN: FloatArray,
    exit_index_N: IntArray,
    alphas: Sequence[float],
    variant: str,
    quantile: str = "finite_sample",
) -> NDArray[np.float64]:
    """Conformal quantiles (A, L) of the scores 1 - p[label] of a calibration set, by the exit a sample takes.

    general: one for all exits, from the scores at the exit taken. gated_all: per exit, from all samples.
    gated_strict: per exit, from the samples that left there. gated: gated_strict where more than 20 samples left,
    otherwise gated_all. `quantile` as in conformal_quantile. Raises ValueError on another variant or quantile.
    Source: JEI-DNN (arXiv 2310.09163), conformal sets.
    """
    if variant not in CONFORMAL_VARIANTS:
        raise ValueError(f"conformal variant {variant!r} is unknown; it is one of {', '.join(CONFORMAL_VARIANTS)}")
    num_exits, num_samples = scores_LN.shape
    samples_of_exit: list[FloatArray] = []
    for exit_index in range(num_exits):
        left_here = scores_LN[exit_index, exit_index_N == exit_index]
        if variant == "general":
            samples_of_exit.append(scores_LN[exit_index_N, np.arange(num_samples)])
        elif variant == "gated_strict" or (variant == "gated" and len(left_here) > _MIN_OWN_SAMPLES):
            samples_of_exit.append(left_here)
        else:
            samples_of_exit.append(scores_LN[exit_index])
    return np.array([[conformal_quantile(scores, alpha, quantile) for scores in samples_of_exit] for alpha in alphas])


def conformal_sets(probability_NK: FloatArray, exit_index_N: IntArray, threshold_L: FloatArray) -> BoolArray:
    """Prediction sets (N, K) bool: the classes whose probability is at least 1 - the threshold of the exit taken.

    probability_NK is that of the exit taken; threshold_L one row of conformal_thresholds. A set may be empty.
    """
    return np.asarray(probability_NK >= 1 - threshold_L[exit_index_N, None])


def set_sizes(
    probability_Nk: FloatArray, num_classes: int, exit_index_N: IntArray, threshold_L: FloatArray
) -> tuple[IntArray, IntArray]:
    """Least and greatest size (N,) of the sets of conformal_sets where only the k most probable classes are known.

    probability_Nk is in falling order. The two are equal where it holds all classes, or where what is left of the
    probability cannot make another class a member.
    """
    cutoff_N = (1 - threshold_L[exit_index_N]).astype(np.float64)
    known_N = conformal_sets(probability_Nk, exit_index_N, threshold_L).sum(axis=1)
    num_known = probability_Nk.shape[1]
    rest_N = np.maximum(1 - probability_Nk.sum(axis=1, dtype=np.float64), 0) + _ROUNDING
    more_N = np.minimum(rest_N // np.maximum(cutoff_N, _ROUNDING), num_classes - num_known).astype(np.int64)
    at_most_N = np.where(known_N < num_known, known_N, known_N + more_N)
    every_N = cutoff_N <= 0
    return np.where(every_N, num_classes, known_N), np.where(every_N, num_classes, at_most_N)


def scaled_confidence(probability_NK: FloatArray, temperature_N: FloatArray) -> FloatArray:
    """Largest probability (N,) of softmax(logits / T), from that at T = 1: all classes, in falling order."""
    ratio_NK = probability_NK.astype(np.float64) / probability_NK[:, :1]
    return np.asarray(1 / (ratio_NK ** (1 / temperature_N[:, None])).sum(axis=1))


def temperature(logits_NK: ArrayLike, labels_N: IntArray) -> float:
    """Temperature T in [0.01, 100] that minimises the mean cross-entropy of softmax(logits / T).

    At a bound of that range where the data want more (0.01: every label has the largest logit). Raises ValueError on
    no samples. Source: Guo et al. 2017 (arXiv 1706.04599).
    """
    logits_NK = np.asarray(logits_NK, dtype=np.float64)
    if len(logits_NK) == 0:
        raise ValueError("a temperature needs at least one sample")
    shifted_NK = logits_NK - logits_NK.max(axis=1, keepdims=True)
    target = shifted_NK[np.arange(len(labels_N)), labels_N].mean()
    low, high = _TEMPERATURE_RANGE
    # the loss is convex in 1/T; fifty halvings of the range on a logarithmic scale reach the last bits
    for _ in range(50):
        middle = math.sqrt(low * high)
        weights_NK = np.exp(shifted_NK / middle)
        slope = ((weights_NK * shifted_NK).sum(axis=1) / weights_NK.sum(axis=1)).mean() - target
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.sqrt(low * high)


def softmax(logits_BK: np.ndarray) -> np.ndarray:
    """Returns the probabilities (B, K) of logits, in their precision."""
    odds_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
    return np.asarray(odds_BK / odds_BK.sum(1, keepdims=True))
