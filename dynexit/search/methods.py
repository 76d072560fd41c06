"""Other ways to choose a configuration, to be compared with: DyCE's named methods and MSDNet's fixed thresholds.

DyCE's methods (Wang et al., DyCE, arXiv 2403.01695) as published, but for the exact line search inside.
Shapes: M exits (the last one takes everything that is left), N samples, P positions.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dynexit.core.tradeoff import Configuration
from dynexit.search.exact import SearchResult, results, sweep
from dynexit.search.kernels import EQUAL
from dynexit.search.line_search import LineSearch, no_exits
from dynexit.search.problem import Objective, Problem, tie_breaking
from dynexit.search.rows import EVERYONE, midpoint

FloatArray = NDArray[np.floating]

_NUM_STEPS = 39  # MSDNet's sweep of geometric_fractions
NEVER = 1e8
"""Threshold of an exit that takes nobody; its negative is that of the last exit, which takes everybody."""


def geometric_fractions(step: int, num_exits: int, num_steps: int = 20) -> NDArray[np.float64]:
    """Share of the samples each exit should take, (M,), sum 1: proportional to q^k, k = 1..M, q = step / num_steps.

    step is 1 or more; below num_steps the early exits take most, above it the late ones.
    Source: MSDNet (arXiv 1703.09844), budgeted batch classification; its sweep is step = 1..39.
    """
    if step < 1 or num_exits < 1:
        raise ValueError(f"step and num_exits must be 1 or more, got {step} and {num_exits}")
    powers = (step / num_steps) ** np.arange(1, num_exits + 1, dtype=np.float64)
    return np.asarray(powers / powers.sum())


def fixed_thresholds(confidence_MN: FloatArray, fractions_M: FloatArray) -> FloatArray:
    """Thresholds (M,), in the dtype of the confidences, by which exit k takes floor(N * fractions_M[k]) samples.

    Exits choose in order: among samples not yet taken, exit k's threshold is the confidence of the last one it should
    take, and everyone at or above it (ties too) is taken: compared with >=, unlike thresholds of a Configuration.
    An exit that should take nobody, or more than are left, has NEVER; the last exit has -NEVER.
    Source: MSDNet (arXiv 1703.09844), dynamic evaluation.
    """
    num_exits, num_samples = confidence_MN.shape
    if fractions_M.shape != (num_exits,):
        raise ValueError(f"fractions_M has shape {fractions_M.shape}, but the confidences have {num_exits} exits")
    thresholds_M = np.full(num_exits, NEVER, dtype=confidence_MN.dtype)
    thresholds_M[-1] = -NEVER
    taken_N = np.zeros(num_samples, dtype=bool)
    # N in the fractions' own dtype: a float32 product that rounds up to a whole number counts as that number
    wanted_M = np.floor(fractions_M.dtype.type(num_samples) * fractions_M).astype(np.int64)
    for k in range(num_exits - 1):
        falling = np.sort(confidence_MN[k, ~taken_N])[::-1]
        if 0 < wanted_M[k] <= len(falling):
            thresholds_M[k] = falling[wanted_M[k] - 1]
        taken_N |= confidence_MN[k] >= thresholds_M[k]
    return thresholds_M


def fixed_configurations(problem: Problem) -> list[Configuration]:
    """MSDNet's thresholds, set on `problem` for each of its 39 divisions of the samples among the exits.

    Every position has its exit, and all the same head type; with several types each has its own 39. Divisions that
    give the same thresholds are one configuration. Source: MSDNet (arXiv 1703.09844), budgeted batch classification.
    """
    found = []
    for head in range(len(problem.costs.head_types)):
        confidence_PN = problem.confidence_PHN[:, head]
        confidence_MN = np.concatenate((confidence_PN, np.zeros_like(confidence_PN[:1])))
        for step in range(1, _NUM_STEPS + 1):
            thresholds_M = fixed_thresholds(confidence_MN, geometric_fractions(step, len(confidence_MN)))
            # MSDNet leaves at a confidence of at least the threshold, a configuration above it
            below_P = np.nextafter(thresholds_M[:-1], np.float32(-np.inf))
            values_P = np.where(thresholds_M[:-1] == np.float32(NEVER), np.float32(1), below_P)
            found.append(Configuration(tuple((head, float(value)) for value in values_P)))
    return list(dict.fromkeys(found))


def onepass(problem: Problem, accuracy_weights: Sequence[float], *, normalize: bool = False) -> list[SearchResult]:
    """DyCE's `onepass`: from no exits, positions in order of depth, each set once to its best type and threshold."""
    search = LineSearch(problem)
    found = [search.pass_once(objective) for objective in tie_breaking(problem, accuracy_weights, normalize)]
    return results(problem, accuracy_weights, found, normalize)


def circular(problem: Problem, accuracy_weights: Sequence[float], *, normalize: bool = False) -> list[SearchResult]:
    """DyCE's `circular`: from no exits, the best single change anywhere, again and again until none gains."""

    search, found = LineSearch(problem), []
    for objective in tie_breaking(problem, accuracy_weights, normalize):
        search.move_to(no_exits(problem))
        while (change := _best_change(search, objective)) is not None:
            search.tables.move(*change)
        found.append(search.candidate())
    return results(problem, accuracy_weights, found, normalize)


def _best_change(search: LineSearch, objective: Objective) -> tuple[int, int, float] | None:
    """(position, head, threshold) of the single change that gains most; None where none gains."""
    best, most = None, EQUAL
    for position in range(len(search.tables.head_P)):
        head, threshold, gain = search.tables.best_exit(position, objective.per_mac, objective.per_correct)
        if gain > most:
            best, most = (position, head, threshold), gain
    return best


def samethres(problem: Problem, accuracy_weights: Sequence[float], *, normalize: bool = False) -> list[SearchResult]:
    """DyCE's `samethres`: one head type at every position, and one threshold for all of them, the best there is.

    DyCE takes the accuracy weight itself for the threshold; here every threshold is priced and each weight gets its
    best. Ties: the first head type, then the highest threshold.
    """
    num_heads = len(problem.costs.head_types)
    curves = [_shared_thresholds(problem, head) for head in range(num_heads)]
    search, found = LineSearch(problem), []
    for objective in tie_breaking(problem, accuracy_weights, normalize):
        prices = [objective.per_mac * macs - objective.per_correct * correct for _, correct, macs in curves]
        head = int(np.argmin([price.min() for price in prices]))
        threshold = float(curves[head][0][prices[head].argmin()])
        search.move_to(((head, threshold),) * len(problem.costs.positions))
        found.append(search.candidate())
    return results(problem, accuracy_weights, found, normalize)


def _shared_thresholds(problem: Problem, head: int) -> tuple[FloatArray, NDArray[np.int64], NDArray[np.int64]]:
    """(threshold, correct, MACs) of every threshold that makes a difference, falling, where all positions share it.

    As it falls, a sample moves to an earlier position whenever it passes a confidence above all those before.
    """
    costs, count = problem.costs, problem.num_samples
    path_macs = costs.path_macs(np.array([row[head] for row in costs.head_macs], dtype=np.int64))
    highest_N = np.full(count, -1, dtype=np.float32)
    passes = []
    for confidence_N in problem.confidence_PHN[:, head]:
        passes.append(confidence_N > highest_N)
        highest_N = np.maximum(highest_N, confidence_N)
    later_macs_N = np.full(count, path_macs[-1])
    later_correct_N = problem.base_correct_N.astype(np.int64)
    events = [(np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64))]
    for position in reversed(range(len(passes))):
        passing = passes[position]
        correct_N = problem.correct_PHN[position, head].astype(np.int64)
        events.append(
            (
                problem.confidence_PHN[position, head][passing],
                (correct_N - later_correct_N)[passing],
                (path_macs[position] - later_macs_N)[passing],
            )
        )
        later_macs_N = np.where(passing, path_macs[position], later_macs_N)
        later_correct_N = np.where(passing, correct_N, later_correct_N)
    value, gained, spent = (np.concatenate(columns) for columns in zip(*events, strict=True))
    order = np.argsort(-value, kind="stable")
    value = value[order]
    ends = np.flatnonzero(np.append(value[1:] < value[:-1], True))[: len(value)]
    following = [midpoint(value[end], value[end + 1]) for end in ends[:-1]]
    thresholds = np.array([1.0, *following, EVERYONE][: len(ends) + 1], dtype=np.float32)
    correct = problem.base_correct + np.append(0, gained[order].cumsum()[ends])
    macs = count * path_macs[-1] + np.append(0, spent[order].cumsum()[ends])
    return thresholds, correct, macs


METHODS: dict[str, Callable[..., list[SearchResult]]] = {
    "exact": sweep,
    "onepass": onepass,
    "circular": circular,
    "samethres": samethres,
}
"""The functions of `dynexit.core.search_methods.SEARCH_METHODS`."""
