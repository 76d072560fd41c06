"""Slow, obvious re-derivations of the search over exit configurations, from the definitions alone.

A configuration is [(head type or -1, threshold), ...] per position. Shapes: N samples, P positions, H head types.
"""

import numba
import numpy as np
from scipy.optimize import fminbound

from dynexit.search.problem import Problem

Exits = list[tuple[int, float]]


def evaluate(problem: Problem, exits: Exits) -> tuple[int, int]:
    """(correct, MACs) summed over the samples, one sample after the other."""
    correct = macs = 0
    costs = problem.costs
    readers = costs.reader_macs or (0,) * len(exits)
    last = max((position for position, (head, _) in enumerate(exits) if head != -1), default=-1)
    for n in range(problem.num_samples):
        heads = 0
        for position, (head, threshold) in enumerate(exits):
            if head == -1:
                continue
            heads += costs.head_macs[position][head]
            if problem.confidence_PHN[position, head, n] > np.float32(threshold):
                correct += bool(problem.correct_PHN[position, head, n])
                macs += costs.backbone_macs[position] + heads + sum(readers[: position + 1])
                break
        else:
            correct += bool(problem.base_correct_N[n])
            macs += costs.full_macs + heads + sum(readers[: last + 1])
    return correct, macs


def objective(problem: Problem, exits: Exits, weight: float, normalize: bool = False) -> float:
    """w·(1 − accuracy) + (1 − w)·MACs, relative to the backbone's, or between the first exit's and the backbone's."""
    correct, macs = evaluate(problem, exits)
    accuracy, macs = correct / problem.num_samples, macs / problem.num_samples
    base, full = problem.base_correct_N.mean(), problem.costs.full_macs
    if not normalize:
        return weight * (1 - accuracy / base) + (1 - weight) * macs / full
    lowest, cheapest = problem.correct_PHN[0, 0].mean(), problem.costs.backbone_macs[0]
    accuracy, macs = (accuracy - lowest) / (base - lowest), (macs - cheapest) / (full - cheapest)
    return weight * (1 - accuracy) + (1 - weight) * macs


def dyce_onepass(problem: Problem, weight: float, normalize: bool = False) -> Exits:
    """DyCE's one-pass search: positions in order, each once, the threshold by a bounded scalar minimiser in [0, 1].

    Ties between types go to the later one, and to no exit last of all.
    """
    num_positions, num_heads, _ = problem.confidence_PHN.shape
    exits: Exits = [(-1, 1.0)] * num_positions
    evaluator = FastEvaluator(problem, weight, normalize)
    for position in range(num_positions):
        lowest, chosen = np.inf, exits[position]
        for head in [*range(num_heads), -1]:

            def cost(threshold: float, position: int = position, head: int = head) -> float:
                return evaluator([*exits[:position], (head, float(threshold)), *exits[position + 1 :]])

            threshold, value = fminbound(cost, 0, 1, full_output=True)[:2] if head != -1 else (1.0, cost(1.0))
            if value <= lowest:
                lowest, chosen = value, (head, float(threshold))
        exits[position] = chosen
    return exits


def evaluate_fast(problem: Problem, exits: Exits) -> tuple[int, int]:
    """`evaluate` in numpy."""
    costs = problem.costs
    left_N = np.zeros(problem.num_samples, dtype=bool)
    correct = macs = heads = unread = 0
    for position, (head, threshold) in enumerate(exits):
        unread += costs.reader_macs[position] if costs.reader_macs else 0
        if head != -1:
            heads += costs.head_macs[position][head] + unread
            unread = 0
            leaves_N = ~left_N & (problem.confidence_PHN[position, head] > np.float32(threshold))
            correct += int(np.count_nonzero(problem.correct_PHN[position, head] & leaves_N))
            macs += int(np.count_nonzero(leaves_N)) * (costs.backbone_macs[position] + heads)
            left_N |= leaves_N
    correct += int(np.count_nonzero(problem.base_correct_N & ~left_N))
    return correct, macs + int(np.count_nonzero(~left_N)) * (costs.full_macs + heads)


class FastEvaluator:
    """`objective` in numpy, for minimisers that call it thousands of times."""

    def __init__(self, problem: Problem, weight: float, normalize: bool = False) -> None:
        self.problem, self.weight = problem, weight
        base, full = problem.base_correct_N.mean(), problem.costs.full_macs
        self.lowest = problem.correct_PHN[0, 0].mean() if normalize else 0
        self.cheapest = problem.costs.backbone_macs[0] if normalize else 0
        self.spans = base - self.lowest, full - self.cheapest

    def __call__(self, exits: Exits) -> float:
        problem = self.problem
        correct, macs = evaluate_fast(problem, exits)
        accuracy = (correct / problem.num_samples - self.lowest) / self.spans[0]
        relative_macs = (macs / problem.num_samples - self.cheapest) / self.spans[1]
        return self.weight * (1 - accuracy) + (1 - self.weight) * relative_macs


def thresholds_of(confidence_N: np.ndarray) -> list[float]:
    """Every threshold that makes a difference: the distinct confidences (nobody at the highest), and below them all."""
    return [*sorted({float(value) for value in confidence_N}, reverse=True), -1.0]


def best_single_change(problem: Problem, exits: Exits, weight: float, normalize: bool = False) -> float:
    """The lowest objective that any change of one position reaches."""
    evaluator = FastEvaluator(problem, weight, normalize)
    lowest = evaluator(exits)
    for position in range(len(exits)):
        choices = [(-1, 1.0)]
        for head, confidence_N in enumerate(problem.confidence_PHN[position]):
            choices += [(head, threshold) for threshold in thresholds_of(confidence_N)]
        for choice in choices:
            lowest = min(lowest, evaluator([*exits[:position], choice, *exits[position + 1 :]]))
    return lowest


def brute_force(problem: Problem, weight: float, normalize: bool = False) -> float:
    """The lowest objective of all configurations; for a handful of samples."""
    evaluator = FastEvaluator(problem, weight, normalize)
    configurations: list[Exits] = [[]]
    for confidence_HN in problem.confidence_PHN:
        choices = [(-1, 1.0)]
        for head, confidence_N in enumerate(confidence_HN):
            choices += [(head, threshold) for threshold in thresholds_of(confidence_N)]
        configurations = [[*exits, choice] for exits in configurations for choice in choices]
    return min(evaluator(exits) for exits in configurations)


def global_optimum(problem: Problem, weight: float) -> float:
    """The lowest plain objective of all configurations of three positions, compiled: every choice at the first two.

    The third is settled by trying every boundary between its sorted arrivals. Confidences of a row must differ.
    """
    num_samples = problem.num_samples
    order_PHN = np.argsort(-problem.confidence_PHN, axis=-1)
    per_mac = (1 - weight) / (num_samples * problem.costs.full_macs)
    per_correct = weight / problem.base_correct_N.sum()
    path = np.array([*problem.costs.backbone_macs, problem.costs.full_macs], dtype=np.float64)
    heads = np.array(problem.costs.head_macs, dtype=np.float64)
    lowest = _global_optimum(
        order_PHN,
        problem.correct_PHN.astype(np.float64),
        problem.base_correct_N.astype(np.float64),
        path * per_mac,
        heads * per_mac,
        per_correct,
    )
    return float(weight + lowest)


@numba.njit(cache=True)
def _global_optimum(order_PHN, correct_PHN, base_N, path, heads, per_correct):  # type: ignore[no-untyped-def]
    _, num_heads, num_samples = order_PHN.shape
    lowest = np.inf
    for head0 in range(-1, num_heads):
        for leaving0 in range(num_samples + 1 if head0 >= 0 else 1):
            gone0 = np.zeros(num_samples, dtype=np.bool_)
            cost0, paid0 = 0.0, heads[0, head0] if head0 >= 0 else 0.0
            for i in range(leaving0):
                n = order_PHN[0, head0, i]
                gone0[n] = True
                cost0 += path[0] + paid0 - per_correct * correct_PHN[0, head0, n]
            for head1 in range(-1, num_heads):
                gone = gone0.copy()
                cost1, paid1 = cost0, paid0 + (heads[1, head1] if head1 >= 0 else 0.0)
                for leaving1 in range(num_samples + 1 if head1 >= 0 else 1):
                    if leaving1 > 0:
                        n = order_PHN[1, head1, leaving1 - 1]
                        if gone[n]:
                            continue
                        gone[n] = True
                        cost1 += path[1] + paid1 - per_correct * correct_PHN[1, head1, n]
                    rest, left = 0.0, 0
                    for n in range(num_samples):
                        if not gone[n]:
                            rest += path[3] + paid1 - per_correct * base_N[n]
                            left += 1
                    lowest = min(lowest, cost1 + rest)
                    for head2 in range(num_heads):
                        cost2 = cost1 + rest + left * heads[2, head2]
                        lowest = min(lowest, cost2)
                        for i in range(num_samples):
                            n = order_PHN[2, head2, i]
                            if not gone[n]:
                                cost2 += path[2] - path[3] + per_correct * (base_N[n] - correct_PHN[2, head2, n])
                                lowest = min(lowest, cost2)
    return lowest
