"""Intervals of accuracies and of paired differences. Samples made from one original are one cluster.

Shapes: N samples, G originals, C distinct clusters, R resamples.
"""

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Confidence level of every interval."""
NUM_RESAMPLES = 4000
SMALLEST_RELEVANT = 0.01
"""A difference of this size matters: an interval that reaches further than this from 0 cannot rule it out."""
_Z = 1.959963984540054  # the normal quantile of LEVEL, two-sided


@dataclass(frozen=True)
class Interval:
    """An estimate and the limits of its interval at LEVEL."""

    value: float
    low: float
    high: float


def accuracy_interval(correct_N: np.ndarray, origin_N: np.ndarray | None = None) -> Interval:
    """Returns the accuracy with Wilson's interval, whose number of samples accounts for the clusters.

    `correct_N` is boolean, `origin_N` (N,) names each sample's original (default: every sample is its own). The
    effective number of samples is p(1 - p) over the variance between clusters, and lies between G and N; where all
    samples are right or all wrong it is G. Raises ValueError without samples.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927); Korn and Graubard, Survey Methodology 24 (1998) for clusters.
    """
    sum_G, count_G = _clusters(np.asarray(correct_N, dtype=np.float64), origin_N)
    num_originals, num_samples = len(count_G), float(count_G.sum())
    accuracy = float(sum_G.sum() / num_samples)
    residual_G = sum_G - accuracy * count_G
    variance = float((residual_G**2).sum()) / num_samples**2 * num_originals / max(num_originals - 1, 1)
    effective = accuracy * (1 - accuracy) / variance if variance > 0 else num_originals
    effective = min(max(effective, num_originals), num_samples)
    low, high = wilson_interval(accuracy, effective)
    # rounding may place a limit a hair inside the estimate at 0 and 1
    return Interval(accuracy, min(low, accuracy), max(high, accuracy))


def wilson_interval(fraction: float, count: float) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a fraction seen in `count` independent trials.

    Views of an original image are not independent, so `count` is that of the originals. Source: Wilson (1927).
    """
    centre = (fraction + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z * math.sqrt(fraction * (1 - fraction) / count + _Z**2 / (4 * count**2)) / (1 + _Z**2 / count)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def mean_interval(values_N: np.ndarray, origin_N: np.ndarray | None = None, seed: int = 0) -> Interval:
    """Returns the mean with its percentile bootstrap interval over originals.

    For a paired difference `values_N` holds one sample's value minus the other's, as -1, 0 or 1 of two classifiers.
    Where all values are 0 the limits are those of the rule of three, ± ln(1 / (1 - LEVEL)) / G. Raises ValueError
    without samples.

    Resampling originals with replacement draws the counts of equal clusters from a multinomial distribution, so the
    cost depends on the number of distinct clusters and not on N. Source: Efron and Tibshirani, An Introduction to the
    Bootstrap (1993), chapters 8 and 13.
    """
    sum_G, count_G = _clusters(np.asarray(values_N, dtype=np.float64), origin_N)
    mean = float(sum_G.sum() / count_G.sum())
    if not np.any(values_N):
        limit = math.log(1 / (1 - LEVEL)) / len(count_G)
        return Interval(0.0, -limit, limit)
    # pairs as complex numbers sort as rows do, and far faster
    cluster_C, num_C = np.unique(sum_G + 1j * count_G, return_counts=True)
    draws_RC = np.random.default_rng(seed).multinomial(len(count_G), num_C / len(count_G), size=NUM_RESAMPLES)
    sum_R, count_R = draws_RC @ cluster_C.real, draws_RC @ cluster_C.imag
    low, high = np.quantile(sum_R / count_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def paired_interval(correct_N: np.ndarray, other_N: np.ndarray, origin_N: np.ndarray | None = None) -> Interval:
    """Returns the accuracy of one classifier minus that of another on the same samples, as `mean_interval` does.

    No gain over a classifier that is always right is allowed for, and no loss to one that is always wrong: the
    bootstrap never has them, the rule of three would.
    """
    found = mean_interval(correct_N.astype(np.int64) - other_N, origin_N)
    low = found.low if np.any(other_N) else max(found.low, 0.0)
    return Interval(found.value, low, min(found.high, 0.0) if np.all(other_N) else found.high)


def verdict(difference: Interval) -> str:
    """Returns what a paired difference of accuracies shows: better, worse, no difference found, or too few samples.

    "too few samples to tell" where the interval holds 0 and also a difference larger than SMALLEST_RELEVANT.
    """
    if difference.low > 0:
        return "better"
    if difference.high < 0:
        return "worse"
    wide = max(-difference.low, difference.high) > SMALLEST_RELEVANT
    return "too few samples to tell" if wide else "no difference found"


def _clusters(values_N: np.ndarray, origin_N: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the values and the number of samples of every original, each (G,)."""
    if not len(values_N):
        raise ValueError("no samples: an interval needs at least one")
    if origin_N is None:
        return values_N, np.ones(len(values_N))
    place_N = np.asarray(origin_N)
    if place_N.dtype.kind not in "iu" or place_N.min() < 0 or place_N.max() > 4 * len(place_N):
        _, place_N = np.unique(origin_N, return_inverse=True)
    count_G = np.bincount(place_N)
    return np.bincount(place_N, weights=values_N)[count_G > 0], count_G[count_G > 0].astype(np.float64)
