"""The exact line search over one record, and coordinate descent with it from any configuration to a fixed point."""

from dataclasses import dataclass

import numpy as np

from dynexit.core.tradeoff import OperatingPoint, last_enabled
from dynexit.errors import UserError
from dynexit.search.kernels import MAX_SAMPLES, OFF
from dynexit.search.problem import Objective, Problem
from dynexit.search.rows import Rows
from dynexit.search.tables import MAX_POSITIONS, Tables

Exits = tuple[tuple[int, float], ...]
"""What a Configuration holds: per position (head type or -1, threshold)."""


@dataclass(frozen=True)
class Candidate:
    """A configuration with its exact sums over the record."""

    exits: Exits
    correct: int
    macs: int
    exit_counts: tuple[int, ...]
    """Samples leaving at each position, last at the end."""

    def point(self, full_macs: int) -> OperatingPoint:
        """Its operating point; equals the problem's `evaluate`."""
        count = sum(self.exit_counts)
        return OperatingPoint(
            accuracy=self.correct / count,
            macs=self.macs / count,
            relative_macs=self.macs / (count * full_macs),
            exit_fractions=tuple(leaving / count for leaving in self.exit_counts),
            num_samples=count,
        )


def no_exits(problem: Problem) -> Exits:
    """The configuration in which every sample goes to the end."""
    return ((OFF, 1.0),) * len(problem.costs.positions)


class LineSearch:
    """A record prepared once, and a configuration that moves over it."""

    def __init__(self, problem: Problem, rows: Rows | None = None, refine: bool = True) -> None:
        """`rows`: those of another search of the same record, to be shared. `refine`: see Front."""
        num_positions, num_heads, count = problem.confidence_PHN.shape
        if num_positions > MAX_POSITIONS or count >= MAX_SAMPLES:
            raise UserError(
                f"the record has {num_positions} positions and {count} samples; at most {MAX_POSITIONS} positions and "
                f"{MAX_SAMPLES - 1} samples can be searched; leave some out"
            )
        costs = problem.costs
        self.problem = problem
        self.rows = rows or Rows(problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N)
        self.tables = Tables(
            self.rows,
            np.array([*costs.backbone_macs, costs.full_macs], dtype=np.int64),
            np.array(costs.head_macs, dtype=np.int64).reshape(num_positions, num_heads),
            costs.read_macs(),
            refine,
        )

    def descend(self, exits: Exits, objective: Objective) -> list[Candidate]:
        """The configuration after each sweep over the positions, last to first; the last one is a fixed point.

        At the fixed point no change of one position's head type, threshold or both lowers the objective. Ties keep what
        is there, then prefer no exit, the first head type, and the highest threshold.
        """
        self.move_to(exits)
        path: list[Candidate] = []
        while self._sweep(objective) or not path:
            path.append(self.candidate())
        return path

    def _sweep(self, objective: Objective) -> bool:
        changed = False
        for position in reversed(range(len(self.tables.head_P))):
            head, threshold, gain = self.tables.best_exit(position, objective.per_mac, objective.per_correct)
            changed |= gain > 0 or head != self.tables.head_P[position]
            self.tables.move(position, head, threshold)
        return changed

    def pass_once(self, objective: Objective) -> Candidate:
        """DyCE's one-pass search: from no exits, positions in order of depth, each set once to its best exit."""
        self.move_to(no_exits(self.problem))
        for position in range(len(self.tables.head_P)):
            head, threshold, _ = self.tables.best_exit(position, objective.per_mac, objective.per_correct)
            self.tables.move(position, head, threshold)
        return self.candidate()

    def move_to(self, exits: Exits) -> None:
        """Sets the configuration."""
        for position, (head, threshold) in enumerate(exits):
            self.tables.move(position, head, threshold)

    def candidate(self) -> Candidate:
        """The configuration as it is now."""
        heads, thresholds = self.tables.head_P.tolist(), self.tables.threshold_P.tolist()
        costs = self.problem.costs
        paid_P = [row[head] if head != OFF else 0 for row, head in zip(costs.head_macs, heads, strict=True)]
        counts = self.tables.count_FQ.sum(axis=1).tolist()
        path = costs.path_macs(np.array(paid_P, dtype=np.int64), last_enabled(heads)).tolist()
        return Candidate(
            exits=tuple(zip(heads, thresholds, strict=True)),
            correct=int(self.tables.right_F[0].sum()),
            macs=sum(count * macs for count, macs in zip(counts, path, strict=True)),
            exit_counts=tuple(counts),
        )
