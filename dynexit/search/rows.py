"""A record's rows (one head type at one position) sorted by falling confidence, cut into bins, packed for the search.

Shapes: N samples, P positions, H head types, B bins.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

OFF = -1
EVERYONE = -1.0  # a threshold below every confidence: whoever arrives leaves
MAX_SAMPLES = 1 << 30
MAX_BINS = 2048

INDEX = MAX_SAMPLES - 1
"""Bits of `Rows.order_PHN` that hold the sample; above them CORRECT and TIE (with the next sample of the order)."""
CORRECT = 1 << 30
TIE = 1 << 31
BIN = (1 << 15) - 1
"""Bits of `Rows.code_PNH` that hold the bin; the one above them says whether the sample is right."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled at its first call, and kept on disk for the next process where there is a place for it."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(nogil=True)(function)


class Rows:
    """A record prepared for the search: every row sorted by falling confidence and cut into bins. Never changes."""

    def __init__(self, confidence_PHN: np.ndarray, correct_PHN: np.ndarray, base_correct_N: np.ndarray) -> None:
        num_positions, num_heads, count = confidence_PHN.shape
        bins = min(MAX_BINS, max(1, math.isqrt(count), count // 128))
        self.confidence_PHN = confidence_PHN
        self.correct_PHN = correct_PHN
        self.base_correct_N = base_correct_N
        self.order_PHN = np.empty(confidence_PHN.shape, np.uint32)
        """Samples by falling confidence, with two flags."""
        self.edges_PHB = np.empty((num_positions, num_heads, bins + 1), np.int32)
        """(P, H, B + 1) where each bin starts in `order_PHN`; equal confidences share a bin."""
        self.code_PNH = np.empty((num_positions, count, num_heads), np.uint16)
        """The bin of every sample, with a flag."""
        for position in range(num_positions):
            for head in range(num_heads):
                _cut_row(
                    _falling_keys(confidence_PHN[position, head]),
                    np.ascontiguousarray(correct_PHN[position, head]),
                    self.order_PHN[position, head],
                    self.edges_PHB[position, head],
                    self.code_PNH[position, :, head],
                )

    def order(self, position: int, head: int) -> np.ndarray:
        """(N,) int64, the samples of one row by falling confidence; of equals the first one first."""
        order_N: np.ndarray = self.order_PHN[position, head] & np.uint32(INDEX)
        return order_N.astype(np.int64)


def midpoint(upper: float, lower: float) -> float:
    """The float32 midpoint of two float32 confidences, or `lower` where the midpoint is not strictly below `upper`."""
    middle = np.float32((float(upper) + float(lower)) / 2)
    return float(middle) if middle < upper else float(lower)


def _falling_keys(confidence_N: np.ndarray) -> np.ndarray:
    """uint64, rising: the confidence's bits turned so that the highest comes first, and below them the sample."""
    # the bits of a float of 0 or more sort like the float (+ 0 turns -0 into 0); one sort of 64 bits beats an argsort
    key_N = ((confidence_N + np.float32(0)).view(np.uint32) ^ np.uint32(0xFFFFFFFF)).astype(np.uint64)
    key_N <<= np.uint64(32)
    key_N |= np.arange(len(key_N), dtype=np.uint64)
    key_N.sort()
    return key_N


@compiled
def _cut_row(
    key_N: np.ndarray, correct_N: np.ndarray, order_N: np.ndarray, edges_B: np.ndarray, code_N: np.ndarray
) -> None:
    """Finds the bins of one row, and packs them, correctness and ties into `order_N`, `edges_B` and `code_N`."""
    count, bins = len(key_N), len(edges_B) - 1
    bin_ = last = -1
    tied = False
    for i in range(count):
        n = int(key_N[i]) & INDEX
        share = i * bins // count
        if share > last and not tied:
            bin_, last = bin_ + 1, share
            edges_B[bin_] = i
        tied = i + 1 < count and int(key_N[i + 1]) >> 32 == int(key_N[i]) >> 32
        order_N[i] = n | (CORRECT if correct_N[n] else 0) | (TIE if tied else 0)
        code_N[n] = bin_ | (int(correct_N[n]) << 15)
    edges_B[bin_ + 1 :] = count
