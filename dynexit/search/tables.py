"""The compiled part of the exact search: sorted rows, tables of what leaving would change, the line search over them.

A configuration decides, per sample, where it leaves (`first`) and where it would leave if not there (`second`). A table
holds, per position, head type and bin of confidences, how many of the samples that arrive at the position would go on
to leave at each later one, and how many would be right only there or only here. Tables hold integers and depend neither
on the accuracy weight nor on MACs: a new weight reads them again, a new threshold updates the samples that cross it.

Shapes: N samples, P positions, H head types, B bins, Q = F = P + 1 places to leave, the last the end.
"""

import numpy as np

from dynexit.search.rows import BIN, EVERYONE, INDEX, OFF, Rows, compiled, midpoint

MAX_POSITIONS = 62  # where a sample would leave is a bit each, in 64 with a sign
EQUAL = 1e-12
"""Below this two objectives count as equal: rounding in the last product must not turn the descent in circles."""

_BULK = 2  # more than half of the samples moved: the tables are made anew when next read
_LATER, _HERE, _AT = 0, 1, 2  # columns of a table: right only later, right only here, and leaving at q in _AT + q


class Tables:
    """One configuration on prepared rows, with its tables; `move` changes an exit, `best_exit` finds the best one."""

    def __init__(self, rows: Rows, path_macs_Q: np.ndarray, head_macs_PH: np.ndarray, refine: bool = True) -> None:
        """`refine`: thresholds between any two confidences that differ; without it only between bins."""
        num_positions, num_heads, count = rows.confidence_PHN.shape
        self.rows = rows
        self.refine = refine
        self.path_macs_Q = path_macs_Q
        """int64, the backbone alone up to each position, last to the end."""
        self.head_macs_PH = head_macs_PH
        self.head_P = np.full(num_positions, OFF, np.int64)
        self.threshold_P = np.ones(num_positions, np.float32)
        self._leaves_N = np.full(count, 1 << num_positions, np.int64)
        """Bit p: would leave at p if it arrives; bit P always."""
        self._right_N = rows.base_correct_N.astype(np.int64) << num_positions
        """Bit p: the enabled head at p is right; bit P: the backbone is."""
        self._state_N = np.full(count, -1, np.int32)
        """First, second (8 bits each), whether right at first, at second; -1 before it is known."""
        bins = rows.edges_PHB.shape[2] - 1
        self.table_PHQB = np.zeros((num_positions, num_heads, _AT + num_positions + 1, bins), np.int32)
        self.fresh_P = np.zeros(num_positions, np.bool_)
        """Whether the tables of a position are those of the configuration."""
        self.count_FQ = np.zeros((num_positions + 1, num_positions + 1), np.int64)
        """Samples by first and second."""
        self.right_F = np.zeros((2, num_positions + 1), np.int64)
        """(2, F) samples right at first and at second, by first."""
        self._update(np.arange(count))

    def move(self, position: int, head: int, threshold: float) -> None:
        """Sets the exit at one position; head -1 is none."""
        new, old = np.float32(threshold), self.threshold_P[position]
        if head == self.head_P[position] and (head == OFF or new == old):
            return
        rows, bit = self.rows, np.int64(1 << position)
        if head == self.head_P[position]:
            start = self._rank(position, head, max(new, old))
            stop = self._rank(position, head, min(new, old))
            crossing_M = (rows.order_PHN[position, head, start:stop] & np.uint32(INDEX)).astype(np.int64)
            self._leaves_N[crossing_M] ^= bit
        else:
            leaves_N, right_N = self._leaves_N & ~bit, self._right_N & ~bit
            if head != OFF:
                leaves_N |= np.where(rows.confidence_PHN[position, head] > new, bit, 0)
                right_N |= np.where(rows.correct_PHN[position, head], bit, 0)
            crossing_M = np.flatnonzero((leaves_N != self._leaves_N) | (right_N != self._right_N))
            self._leaves_N, self._right_N = leaves_N, right_N
        # exits behind the second choice of a sample do not concern it
        crossing_M = crossing_M[((self._state_N[crossing_M] >> 8) & 255) >= position]
        self.head_P[position], self.threshold_P[position] = head, new if head != OFF else 1
        if len(crossing_M) * _BULK > len(self._state_N):
            self.fresh_P[:] = False
        self._update(crossing_M)

    def _rank(self, position: int, head: int, threshold: np.float32) -> int:
        """How many samples have a confidence above the threshold."""
        order_N, confidence_N = self.rows.order_PHN[position, head], self.rows.confidence_PHN[position, head]
        low, high = 0, len(order_N)
        while low < high:
            middle = (low + high) // 2
            if confidence_N[order_N[middle] & INDEX] > threshold:
                low = middle + 1
            else:
                high = middle
        return low

    def _update(self, crossing_M: np.ndarray) -> None:
        _update(
            crossing_M,
            self._leaves_N,
            self._right_N,
            self._state_N,
            self.rows.code_PNH,
            self.table_PHQB,
            np.flatnonzero(self.fresh_P),
            self.count_FQ,
            self.right_F,
        )

    def best_exit(self, position: int, per_mac: float, per_correct: float) -> tuple[int, float, float]:
        """(head, threshold, gain) of the best exit at one position, the others fixed; the gain is in the objective.

        Ties keep what is there, then prefer no exit, the first head type and the highest threshold. An exit that is no
        better than none is removed.
        """
        if not self.fresh_P[position]:
            _build(position, self._state_N, self.rows.code_PNH, self.table_PHQB)
            self.fresh_P[position] = True
        head, last, following, gain = _best_exit(
            position,
            per_mac,
            per_correct,
            self.refine,
            self.path_macs_Q,
            self.head_macs_PH,
            self.head_P,
            self.count_FQ,
            self.right_F,
            self.table_PHQB[position],
            self.rows.edges_PHB[position],
            self.rows.order_PHN[position],
            self._state_N,
        )
        if last < 0:
            return head, float(self.threshold_P[position]) if head != OFF else 1.0, gain
        confidence_N = self.rows.confidence_PHN[position, head]
        threshold = midpoint(confidence_N[last], confidence_N[following]) if following >= 0 else EVERYONE
        return head, threshold, gain


@compiled
def _update(
    crossing_M: np.ndarray,
    leaves_N: np.ndarray,
    right_N: np.ndarray,
    state_N: np.ndarray,
    code_PNH: np.ndarray,
    table_PHQB: np.ndarray,
    fresh: np.ndarray,
    count_FQ: np.ndarray,
    right_F: np.ndarray,
) -> None:
    """Brings the states of these samples, the sums and the tables of the fresh positions up to the bits."""
    num_positions = len(table_PHQB)
    for n in crossing_M:
        leaves, right = leaves_N[n], right_N[n]
        first = 0
        while not (leaves >> first) & 1:
            first += 1
        second = first + (first < num_positions)
        while not (leaves >> second) & 1:
            second += 1
        new = first | (second << 8) | (((right >> first) & 1) << 16) | (((right >> second) & 1) << 17)
        old = state_N[n]
        state_N[n] = new
        for sign in (-1, 1):
            state = old if sign < 0 else new
            if state >= 0:
                count_FQ[state & 255, (state >> 8) & 255] += sign
                right_F[0, state & 255] += sign * ((state >> 16) & 1)
                right_F[1, state & 255] += sign * ((state >> 17) & 1)
        for position in fresh:
            before, after = _rest(old, position), _rest(new, position)
            if before != after:
                _enter(n, position, code_PNH, table_PHQB, before, after)


@compiled
def _rest(state: int, position: int) -> int:
    """Where a sample that arrives would leave later, and above 8 bits whether it is right there; -1: it does not
    arrive."""
    first = state & 255
    if state < 0 or first < position:
        return -1
    return first | (state >> 8) & 256 if first > position else ((state >> 8) & 255) | (state >> 9) & 256


@compiled
def _enter(n: int, position: int, code_PNH: np.ndarray, table_PHQB: np.ndarray, before: int, after: int) -> None:
    """Takes a sample out of every head's table of a position with one rest, and puts it in with another."""
    # arrays are indexed whole: making a view costs more than what is done with it
    for head in range(code_PNH.shape[2]):
        code = code_PNH[position, n, head]
        bin_, right_here = code & BIN, code >> 15
        if before >= 0:
            table_PHQB[position, head, _AT + (before & 255), bin_] -= 1
        if after >= 0:
            table_PHQB[position, head, _AT + (after & 255), bin_] += 1
        if before < 0 or after < 0 or (before ^ after) & 256:
            column = _HERE if right_here else _LATER
            was_other = before >= 0 and (before >> 8) != right_here
            is_other = after >= 0 and (after >> 8) != right_here
            table_PHQB[position, head, column, bin_] += is_other - was_other


@compiled
def _build(position: int, state_N: np.ndarray, code_PNH: np.ndarray, table_PHQB: np.ndarray) -> None:
    """Makes the tables of one position from the states of all samples."""
    table_PHQB[position] = 0
    for n in range(len(state_N)):
        rest = _rest(state_N[n], position)
        if rest >= 0:
            _enter(n, position, code_PNH, table_PHQB, -1, rest)


@compiled
def _best_exit(
    position: int,
    per_mac: float,
    per_correct: float,
    refine: bool,
    path_macs_Q: np.ndarray,
    head_macs_PH: np.ndarray,
    head_P: np.ndarray,
    count_FQ: np.ndarray,
    right_F: np.ndarray,
    table_HQB: np.ndarray,
    edges_HB: np.ndarray,
    order_HN: np.ndarray,
    state_N: np.ndarray,
) -> tuple[int, int, int, float]:
    """(head, last sample to leave, first arriving sample to stay, gain); a sample is -1 where there is none."""
    num_positions, num_heads = head_macs_PH.shape
    bins, current = table_HQB.shape[2], head_P[position]
    # MACs saved by leaving here instead of at each later place, the head here aside
    saved_Q = np.zeros(num_positions + 1, np.int64)
    heads = 0
    for later in range(position + 1, num_positions + 1):
        if later < num_positions and head_P[later] != OFF:
            heads += head_macs_PH[later, head_P[later]]
        saved_Q[later] = path_macs_Q[later] - path_macs_Q[position] + heads
    arrived = count_FQ[position:].sum()
    kept = 0.0
    if current != OFF:
        macs = head_macs_PH[position, current] * arrived - (count_FQ[position] * saved_Q).sum()
        kept = per_mac * macs - per_correct * (right_F[0, position] - right_F[1, position])
    best, best_head, best_last = min(0.0, kept - EQUAL), OFF, -1
    # leaving costs a sample that is right only later at most this, and any other nothing
    steepest = max(0.0, per_correct - per_mac * saved_Q[position + 1]) if refine else 0.0
    change_B, saved_B, gained_B = np.empty(bins), np.empty(bins, np.int64), np.empty(bins, np.int64)
    for head in range(num_heads):
        paid = head_macs_PH[position, head] * arrived
        saved_B[:] = 0
        for later in range(position + 1, num_positions + 1):
            for b in range(bins):
                saved_B[b] += table_HQB[head, _AT + later, b] * saved_Q[later]
        saved, gained, lowest = 0, 0, np.inf
        for b in range(bins):
            saved += saved_B[b]
            gained += table_HQB[head, _HERE, b] - table_HQB[head, _LATER, b]
            saved_B[b], gained_B[b] = saved, gained
            change_B[b] = per_mac * (paid - saved) - per_correct * gained
            lowest = min(lowest, change_B[b])
        for b in range(bins):
            # no threshold inside the bin is better than this bound; EQUAL covers its rounding
            bound = change_B[b] - steepest * table_HQB[head, _LATER, b] - EQUAL
            if bound >= best or bound > lowest:
                continue
            saved, gained = (saved_B[b - 1], gained_B[b - 1]) if b else (0, 0)
            last = -1
            for i in range(edges_HB[head, b], edges_HB[head, b + 1]):
                packed = order_HN[head, i]
                state = state_N[packed & INDEX]
                first = state & 255
                if first >= position:
                    later, right = (first, state >> 16) if first > position else ((state >> 8) & 255, state >> 17)
                    saved += saved_Q[later]
                    gained += ((packed >> 30) & 1) - (right & 1)
                    last = i
                if last >= 0 and not packed >> 31 and (refine or i + 1 == edges_HB[head, b + 1]):
                    change = per_mac * (paid - saved) - per_correct * gained
                    if change < best:
                        best, best_head, best_last = change, head, last
                    last = -1
    if best_last < 0:
        unneeded = current != OFF and kept >= 0
        return (OFF if unneeded else current), -1, -1, (kept if unneeded else 0.0)
    order_N = order_HN[best_head]
    for i in range(best_last + 1, order_N.shape[0]):
        following = order_N[i] & INDEX
        if (state_N[following] & 255) >= position:
            return best_head, order_N[best_last] & INDEX, following, kept - best
    return best_head, order_N[best_last] & INDEX, -1, kept - best
