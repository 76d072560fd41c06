"""The compiled parts of the search: cutting rows (for `rows.py`), moving and pricing over tables (for `tables.py`).

Shapes: N samples, P positions, H head types, B bins, Q = F = P + 1 places to leave, the last the end; M samples moved.
"""

from typing import TypeAlias

import numpy as np

from dynexit.compiled import compiled

Arrays: TypeAlias = tuple[np.ndarray, ...]
"""Arrays that a kernel takes together; its docstring has their names."""

# Compiled code holds these as constants; they live here because it is compiled again when this file changes.
OFF = -1
"""The head type of no exit."""
MAX_SAMPLES = 1 << 30

INDEX = MAX_SAMPLES - 1
"""Bits of `Rows.order_PHN` that hold the sample; above them CORRECT and TIE (with the next sample of the order)."""
CORRECT = 1 << 30
TIE = 1 << 31
BIN = (1 << 15) - 1
"""Bits of `Rows.code_PNH` that hold the bin; the one above them says whether the sample is right."""

EQUAL = 1e-12
"""Below this two objectives count as equal: rounding in the last product must not turn the descent in circles."""

LATER, HERE, AT = 0, 1, 2
"""Columns of a table: samples right only later, right only here, and those that would leave at q in AT + q."""


@compiled
def cut_row(
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


@compiled
def crossing(
    position: int,
    head: int,
    threshold: float,
    old_threshold: float,
    rows: Arrays,
    samples: Arrays,
) -> np.ndarray:
    """Sets the bits of one exit; returns the samples whose first or second place may change.

    `rows`: order_PHN, confidence_PHN, code_PNH; `samples`: leaves_N, right_N, state_N.

    `old_threshold` is NaN unless the head stays: then only samples between the thresholds change, and they are found in
    the order. Exits behind the second place of a sample do not concern it.
    """
    order_PHN, confidence_PHN, code_PNH = rows
    leaves_N, right_N, state_N = samples
    bit = np.int64(1) << position
    found = 0
    if old_threshold == old_threshold:
        start = rank(position, head, max(threshold, old_threshold), order_PHN, confidence_PHN)
        stop = rank(position, head, min(threshold, old_threshold), order_PHN, confidence_PHN)
        crossing_M = np.empty(stop - start, np.int64)
        for i in range(start, stop):
            n = order_PHN[position, head, i] & INDEX
            leaves_N[n] ^= bit
            if (state_N[n] >> 8) & 255 >= position:
                crossing_M[found] = n
                found += 1
        return crossing_M[:found]
    crossing_M = np.empty(len(state_N), np.int64)
    for n in range(len(state_N)):
        leaves, right = leaves_N[n] & ~bit, right_N[n] & ~bit
        if head != OFF:
            if confidence_PHN[position, head, n] > threshold:
                leaves |= bit
            right |= np.int64(code_PNH[position, n, head] >> 15) << position
        if leaves != leaves_N[n] or right != right_N[n]:
            leaves_N[n], right_N[n] = leaves, right
            if (state_N[n] >> 8) & 255 >= position:
                crossing_M[found] = n
                found += 1
    return crossing_M[:found]


@compiled
def rank(position: int, head: int, threshold: float, order_PHN: np.ndarray, confidence_PHN: np.ndarray) -> int:
    """How many samples have a confidence above the threshold."""
    low, high = 0, order_PHN.shape[2]
    while low < high:
        middle = (low + high) // 2
        if confidence_PHN[position, head, order_PHN[position, head, middle] & INDEX] > threshold:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def update(
    crossing_M: np.ndarray,
    samples: Arrays,
    sums: Arrays,
    fresh: np.ndarray,
    code_PNH: np.ndarray,
    table_PHQB: np.ndarray,
) -> None:
    """Brings the states of these samples, the sums and the tables of the fresh positions up to the bits.

    `samples`: leaves_N, right_N, state_N; `sums`: count_FQ, right_F.
    """
    leaves_N, right_N, state_N = samples
    count_FQ, right_F = sums
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
            before, after = rest_of(old, position), rest_of(new, position)
            if before != after:
                enter(n, position, code_PNH, table_PHQB, before, after)


@compiled
def rest_of(state: int, position: int) -> int:
    """Where a sample that arrives would leave later, and above 8 bits whether it is right there; -1: it does not
    arrive."""
    first = state & 255
    if state < 0 or first < position:
        return -1
    return first | (state >> 8) & 256 if first > position else ((state >> 8) & 255) | (state >> 9) & 256


@compiled
def enter(n: int, position: int, code_PNH: np.ndarray, table_PHQB: np.ndarray, before: int, after: int) -> None:
    """Takes a sample out of every head's table of a position with one rest, and puts it in with another."""
    # arrays are indexed whole: making a view costs more than what is done with it
    for head in range(code_PNH.shape[2]):
        code = code_PNH[position, n, head]
        bin_, right_here = code & BIN, code >> 15
        if before >= 0:
            table_PHQB[position, head, AT + (before & 255), bin_] -= 1
        if after >= 0:
            table_PHQB[position, head, AT + (after & 255), bin_] += 1
        if before < 0 or after < 0 or (before ^ after) & 256:
            column = HERE if right_here else LATER
            was_other = before >= 0 and (before >> 8) != right_here
            is_other = after >= 0 and (after >> 8) != right_here
            table_PHQB[position, head, column, bin_] += is_other - was_other


@compiled
def build(position: int, state_N: np.ndarray, code_PNH: np.ndarray, table_PHQB: np.ndarray) -> None:
    """Makes the tables of one position from the states of all samples."""
    table_PHQB[position] = 0
    for n in range(len(state_N)):
        rest = rest_of(state_N[n], position)
        if rest >= 0:
            enter(n, position, code_PNH, table_PHQB, -1, rest)


@compiled
def best_exit(
    position: int, per_mac: float, per_correct: float, refine: bool, arrays: Arrays
) -> tuple[int, int, int, float]:
    """(head, last sample to leave, first arriving sample to stay, gain); a sample is -1 if there is none.

    `arrays`: path_macs_Q, head_macs_PH, read_macs_P, head_P, count_FQ, right_F, table_PHQB, edges_PHB, order_PHN,
    state_N.
    """
    path_macs_Q, head_macs_PH, read_macs_P, head_P, count_FQ, right_F, table_PHQB, edges_PHB, order_PHN, state_N = (
        arrays
    )
    table_HQB, edges_HB, order_HN = table_PHQB[position], edges_PHB[position], order_PHN[position]
    bins, current = table_HQB.shape[2], head_P[position]
    saved_Q, read = saved_macs(position, path_macs_Q, head_macs_PH, read_macs_P, head_P)
    arrived = count_FQ[position:].sum()
    kept = 0.0
    if current != OFF:
        macs = (head_macs_PH[position, current] + read) * arrived - (count_FQ[position] * saved_Q).sum()
        kept = per_mac * macs - per_correct * (right_F[0, position] - right_F[1, position])
    best, best_head, best_last = min(0.0, kept - EQUAL), OFF, -1
    # leaving costs a sample that is right only later at most this, and any other nothing
    steepest = max(0.0, per_correct - per_mac * saved_Q[position + 1]) if refine else 0.0
    change_B, saved_B, gained_B = np.empty(bins), np.empty(bins, np.int64), np.empty(bins, np.int64)
    for head in range(len(table_HQB)):
        paid = (head_macs_PH[position, head] + read) * arrived
        sum_bins(table_HQB[head], position, saved_Q, saved_B, gained_B)
        lowest = np.inf
        for b in range(bins):
            change_B[b] = per_mac * (paid - saved_B[b]) - per_correct * gained_B[b]
            lowest = min(lowest, change_B[b])
        for b in range(bins):
            # no threshold inside the bin is better than this bound; EQUAL covers its rounding
            bound = change_B[b] - steepest * table_HQB[head, LATER, b] - EQUAL
            if bound >= best or bound > lowest:
                continue
            saved, gained = (saved_B[b - 1], gained_B[b - 1]) if b else (0, 0)
            last, stop = -1, edges_HB[head, b + 1]
            for i in range(edges_HB[head, b], stop):
                packed = order_HN[head, i]
                state = state_N[packed & INDEX]
                first = state & 255
                if first >= position:
                    later, right = (first, state >> 16) if first > position else ((state >> 8) & 255, state >> 17)
                    saved += saved_Q[later]
                    gained += ((packed >> 30) & 1) - (right & 1)
                    last = i
                if last >= 0 and not packed >> 31 and (refine or i + 1 == stop):
                    change = per_mac * (paid - saved) - per_correct * gained
                    if change < best:
                        best, best_head, best_last = change, head, last
                    last = -1
    if best_last < 0:
        unneeded = current != OFF and kept >= 0
        return (OFF if unneeded else current), -1, -1, (kept if unneeded else 0.0)
    following = next_arrival(position, best_last + 1, order_HN[best_head], state_N)
    return best_head, order_HN[best_head, best_last] & INDEX, following, kept - best


@compiled
def saved_macs(
    position: int, path_macs_Q: np.ndarray, head_macs_PH: np.ndarray, read_macs_P: np.ndarray, head_P: np.ndarray
) -> tuple[np.ndarray, int]:
    """MACs (Q,) saved by leaving at `position` instead of at each later place, the head there aside; and what an exit
    there has everybody who arrives pay for features."""
    num_positions, heads, last_reader = len(head_P), 0, position
    saved_Q = np.zeros(num_positions + 1, np.int64)
    for later in range(position + 1, num_positions + 1):
        if later < num_positions and head_P[later] != OFF:
            heads += head_macs_PH[later, head_P[later]]
            last_reader = later
        read = read_macs_P[last_reader] - read_macs_P[position]
        saved_Q[later] = path_macs_Q[later] - path_macs_Q[position] + heads + read
    if last_reader != position:  # a later exit has them read anyway
        return saved_Q, 0
    paid = read_macs_P[position]
    for before in range(position):
        if head_P[before] != OFF:
            paid = read_macs_P[position] - read_macs_P[before]
    return saved_Q, paid


@compiled
def sum_bins(
    table_QB: np.ndarray, position: int, saved_Q: np.ndarray, saved_B: np.ndarray, gained_B: np.ndarray
) -> None:
    """Fills in what is saved (MACs) and gained (samples right) if everybody up to each bin leaves."""
    saved_B[:] = 0
    for later in range(position + 1, len(saved_Q)):
        for b in range(len(saved_B)):
            saved_B[b] += table_QB[AT + later, b] * saved_Q[later]
    saved, gained = 0, 0
    for b in range(len(saved_B)):
        saved += saved_B[b]
        gained += table_QB[HERE, b] - table_QB[LATER, b]
        saved_B[b], gained_B[b] = saved, gained


@compiled
def next_arrival(position: int, start: int, order_N: np.ndarray, state_N: np.ndarray) -> int:
    """The first sample of the order, from `start`, that arrives at the position; -1 if there is none."""
    for i in range(start, len(order_N)):
        sample: int = order_N[i] & INDEX
        if (state_N[sample] & 255) >= position:
            return sample
    return -1
