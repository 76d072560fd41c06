"""A record's rows (one head type at one position) sorted by falling confidence, cut into bins, packed for the search.

Shapes: N samples, P positions, H head types, B bins.
"""

import math

import numpy as np

from dynexit.search.kernels import INDEX, cut_row

EVERYONE = -1.0  # a threshold below every confidence: whoever arrives leaves
MAX_BINS = 2048


class Rows:
    """A record prepared for the search: every row sorted by falling confidence and cut into bins. Never changes."""

    def __init__(self, confidence_PHN: np.ndarray, correct_PHN: np.ndarray, base_correct_N: np.ndarray) -> None:
        num_positions, num_heads, count = confidence_PHN.shape
        bins = min(MAX_BINS, max(1, math.isqrt(count), count // 128))
        self.confidence_PHN = np.ascontiguousarray(confidence_PHN)
        self.base_correct_N = base_correct_N
        self.order_PHN = np.empty(confidence_PHN.shape, np.uint32)
        """Samples by falling confidence, with two flags."""
        self.edges_PHB = np.empty((num_positions, num_heads, bins + 1), np.int32)
        """(P, H, B + 1) where each bin starts in `order_PHN`; equal confidences share a bin."""
        self.code_PNH = np.empty((num_positions, count, num_heads), np.uint16)
        """The bin of every sample, with a flag."""
        for position in range(num_positions):
            for head in range(num_heads):
                cut_row(
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
