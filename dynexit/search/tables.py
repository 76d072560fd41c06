"""A configuration on sorted rows with tables of what leaving would change, and the exact line search over them.

A configuration decides, per sample, where it leaves (`first`) and where it would leave if not there (`second`). A table
holds, per position, head type and bin of confidences, how many of the samples that arrive at the position would go on
to leave at each later one, and how many would be right only there or only here. Tables hold integers and depend neither
on the accuracy weight nor on MACs: a new weight reads them again, a new threshold updates the samples that cross it.

Shapes: N samples, P positions, H head types, B bins, Q = F = P + 1 places to leave, the last the end.
"""

import numpy as np

from dynexit.search import kernels
from dynexit.search.kernels import OFF
from dynexit.search.rows import EVERYONE, Rows, midpoint

MAX_POSITIONS = 62  # where a sample would leave is a bit each, in 64 with a sign
_BULK = 2  # more than half of the samples moved: the tables are rebuilt when next read


class Tables:
    """One configuration on prepared rows, with its tables; `move` changes an exit, `best_exit` finds the best one."""

    def __init__(
        self,
        rows: Rows,
        path_macs_Q: np.ndarray,
        head_macs_PH: np.ndarray,
        read_macs_P: np.ndarray,
        refine: bool = True,
    ) -> None:
        """`refine`: thresholds between any two confidences that differ; without it only between bins."""
        num_positions, num_heads, count = rows.confidence_PHN.shape
        self.rows = rows
        self.refine = refine
        self.path_macs_Q = path_macs_Q
        """int64, the backbone alone up to each position, last to the end."""
        self.head_macs_PH = head_macs_PH
        self.read_macs_P = read_macs_P
        """int64, reading the features up to each position, which a sample pays up to the last enabled exit."""
        self.head_P = np.full(num_positions, OFF, np.int64)
        self.threshold_P = np.ones(num_positions, np.float32)
        self._leaves_N = np.full(count, 1 << num_positions, np.int64)
        """Bit p: would leave at p if it arrives; bit P always."""
        self._right_N = rows.base_correct_N.astype(np.int64) << num_positions
        """Bit p: the enabled head at p is right; bit P: the backbone is."""
        self._state_N = np.full(count, -1, np.int32)
        """First, second (8 bits each), whether right at first, at second; -1 before it is known."""
        bins = rows.edges_PHB.shape[2] - 1
        self.table_PHQB = np.zeros((num_positions, num_heads, kernels.AT + num_positions + 1, bins), np.int32)
        self.fresh_P = np.zeros(num_positions, np.bool_)
        """Whether the tables of a position are those of the configuration."""
        self.count_FQ = np.zeros((num_positions + 1, num_positions + 1), np.int64)
        """Samples by first and second."""
        self.right_F = np.zeros((2, num_positions + 1), np.int64)
        """(2, F) samples right at first and at second, by first."""
        self._kernel_rows = (rows.order_PHN, rows.confidence_PHN, rows.code_PNH)
        self._samples = (self._leaves_N, self._right_N, self._state_N)
        self._sums = (self.count_FQ, self.right_F)
        costs, row_arrays = (path_macs_Q, head_macs_PH, read_macs_P, self.head_P), (rows.edges_PHB, rows.order_PHN)
        self._arrays = (*costs, *self._sums, self.table_PHQB, *row_arrays, self._state_N)
        self._update(np.arange(count))

    def move(self, position: int, head: int, threshold: float) -> None:
        """Sets the exit at one position; head -1 is none."""
        new, old, current = np.float32(threshold), self.threshold_P[position], self.head_P[position]
        if head == current and (head == OFF or new == old):
            return
        crossing_M = kernels.crossing(
            position,
            head,
            new,
            old if head == current else np.float32(np.nan),
            self._kernel_rows,
            self._samples,
        )
        self.head_P[position], self.threshold_P[position] = head, new if head != OFF else 1
        if len(crossing_M) * _BULK > len(self._state_N):
            self.fresh_P[:] = False
        self._update(crossing_M)

    def _update(self, crossing_M: np.ndarray) -> None:
        fresh = np.flatnonzero(self.fresh_P)
        kernels.update(crossing_M, self._samples, self._sums, fresh, self.rows.code_PNH, self.table_PHQB)

    def best_exit(self, position: int, per_mac: float, per_correct: float) -> tuple[int, float, float]:
        """(head, threshold, gain) of the best exit at one position, the others fixed; the gain is in the objective.

        Ties keep what is there, then prefer no exit, the first head type and the highest threshold. An exit that is no
        better than none is removed.
        """
        if not self.fresh_P[position]:
            kernels.build(position, self._state_N, self.rows.code_PNH, self.table_PHQB)
            self.fresh_P[position] = True
        head, last, following, gain = kernels.best_exit(position, per_mac, per_correct, self.refine, self._arrays)
        if last < 0:
            return head, float(self.threshold_P[position]) if head != OFF else 1.0, gain
        confidence_N = self.rows.confidence_PHN[position, head]
        threshold = midpoint(confidence_N[last], confidence_N[following]) if following >= 0 else EVERYONE
        return head, threshold, gain
