"""Coordinate descent with the exact line search, written straight from its definition in numpy.

For the samples arriving at a position, sorted by falling confidence: leaving there instead of going on changes the sum
of MACs and of correct answers; prefix sums over them price every threshold. Nothing is kept between calls.
"""

import numpy as np

from dynexit.search.problem import Objective, Problem

EQUAL = 1e-12
Exits = tuple[tuple[int, float], ...]


def descend(problem: Problem, exits: Exits, objective: Objective) -> list[Exits]:
    """The configuration after each sweep that changed something (or the one that did not, where it is the first)."""
    path = []
    while True:
        new = _sweep(problem, exits, objective)
        if new == exits and path:
            return path
        path.append(new)
        if new == exits:
            return path
        exits = new


def _sweep(problem: Problem, exits: Exits, objective: Objective) -> Exits:
    chosen = list(exits)
    for position in reversed(range(len(exits))):
        chosen[position] = best_exit(problem, tuple(chosen), position, objective)
    return tuple(chosen)


def best_exit(problem: Problem, exits: Exits, position: int, objective: Objective) -> tuple[int, float]:
    """Ties: what is there, then none, then the first type and the highest threshold; a useless exit is removed."""
    arrives_N, rest_macs_N, rest_correct_N = _without(problem, exits, position)
    best, best_change, kept = (-1, 1.0), 0.0, 0.0
    for head, head_macs in enumerate(problem.costs.head_macs[position]):
        confidence_N = problem.confidence_PHN[position, head]
        order_A = [n for n in np.argsort(-confidence_N, kind="stable") if arrives_N[n]]
        confidence_A = confidence_N[order_A]
        saved_A = np.cumsum(rest_macs_N[order_A])
        gained_A = np.cumsum(problem.correct_PHN[position, head][order_A].astype(int) - rest_correct_N[order_A])
        change_A = objective.per_mac * (head_macs * len(order_A) - saved_A) - objective.per_correct * gained_A
        if head == exits[position][0]:
            leaving = np.count_nonzero(confidence_A > np.float32(exits[position][1]))
            kept = change_A[leaving - 1] if leaving else objective.per_mac * head_macs * len(order_A)
        for last, change in enumerate(change_A):
            at_end = last + 1 == len(order_A)
            if (at_end or confidence_A[last + 1] < confidence_A[last]) and change < best_change:
                best_change = change
                best = (head, -1.0 if at_end else midpoint(confidence_A[last], confidence_A[last + 1]))
    if best_change < min(0.0, kept - EQUAL):
        return best
    return (-1, 1.0) if exits[position][0] == -1 or kept >= 0 else exits[position]


def _without(problem: Problem, exits: Exits, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who arrives, and for each sample the MACs after this position and whether it ends right, if it does not leave."""
    count, costs = problem.num_samples, problem.costs
    arrives_N, rest_macs_N = np.ones(count, dtype=bool), np.zeros(count, dtype=np.int64)
    rest_correct_N, decided_N = problem.base_correct_N.astype(int), np.zeros(count, dtype=bool)
    heads = 0
    for other, (head, threshold) in enumerate(exits):
        if head == -1 or other == position:
            continue
        leaves_N = problem.confidence_PHN[other, head] > np.float32(threshold)
        if other < position:
            arrives_N &= ~leaves_N
            continue
        heads += costs.head_macs[other][head]
        first_N = leaves_N & ~decided_N
        rest_macs_N[first_N] = costs.backbone_macs[other] - costs.backbone_macs[position] + heads
        rest_correct_N[first_N] = problem.correct_PHN[other, head][first_N]
        decided_N |= leaves_N
    rest_macs_N[~decided_N] = costs.full_macs - costs.backbone_macs[position] + heads
    return arrives_N, rest_macs_N, rest_correct_N


def midpoint(upper: np.float32, lower: np.float32) -> float:
    middle = np.float32((float(upper) + float(lower)) / 2)
    return float(middle) if middle < upper else float(lower)
