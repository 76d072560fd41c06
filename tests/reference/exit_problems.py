"""Made-up records for the search: heads that get better with depth, confidences that mean something, and oddities."""

import numpy as np

from dynexit.core.cost import ExitCosts
from dynexit.search.problem import Problem


def random_problem(
    generator: np.random.Generator, num_samples: int, num_positions: int, num_heads: int, levels: int = 0
) -> Problem:
    """A problem as training leaves it; `levels` > 0 rounds confidences to that many steps, so that many are equal."""
    shape = (num_positions, num_heads, num_samples)
    hardness_N = generator.normal(size=num_samples)
    skill_PH1 = (np.arange(num_positions)[:, None, None] + 1) / (num_positions + 1) * 2.5 - 1
    skill_PH1 = skill_PH1 + generator.normal(scale=0.3, size=(num_positions, num_heads, 1))
    lead_PHN = skill_PH1 - hardness_N + generator.normal(scale=0.6, size=shape)
    confidence_PHN = 1 / (1 + np.exp(-1.5 * lead_PHN - generator.normal(scale=0.7, size=shape)))
    if levels:
        confidence_PHN = np.round(confidence_PHN * levels) / levels
    base_correct_N = hardness_N + generator.normal(scale=0.3, size=num_samples) < 1.8
    base_correct_N[0] = True
    return Problem(lead_PHN > 0, confidence_PHN.astype(np.float32), base_correct_N, random_costs(generator, *shape[:2]))


def random_costs(generator: np.random.Generator, num_positions: int, num_heads: int) -> ExitCosts:
    """Costs whose blocks and heads are of all sizes, a block of no MACs among them."""
    steps = generator.integers(0, 1000, size=num_positions + 1)
    path = [int(macs) for macs in np.cumsum(steps) + 10]
    heads = generator.integers(0, 120, size=(num_positions, num_heads))
    return ExitCosts(
        full_macs=path[-1] + 1,
        positions=tuple(range(0, 2 * num_positions, 2)),
        backbone_macs=tuple(path[:-1]),
        head_types=tuple(f"type{head}" for head in range(num_heads)),
        head_macs=tuple(tuple(int(macs) for macs in row) for row in heads),
        gate_macs=(4,) * num_positions,
    )


def odd_problem(generator: np.random.Generator, kind: int) -> Problem:
    """A problem of one of ten odd kinds, 0..9, at the edges of what a record may hold."""
    problem = random_problem(generator, int(generator.integers(1, 40)), 3, 2, levels=int(generator.integers(0, 6)))
    confidence_PHN, correct_PHN = problem.confidence_PHN.copy(), problem.correct_PHN.copy()
    base_correct_N = problem.base_correct_N.copy()
    if kind == 0:
        confidence_PHN[:] = 1  # fp16 softmax: everything ties at exactly 1
    elif kind == 1:
        confidence_PHN[:] = 0
    elif kind == 2:
        correct_PHN[:] = False
    elif kind == 3:
        correct_PHN[:] = True
        base_correct_N[1:] = False
    elif kind == 4:
        confidence_PHN[1] = confidence_PHN[0]
    elif kind == 5:  # neighbours in float32, between which there is no midpoint
        low = np.float32(0.7)
        confidence_PHN = np.where(correct_PHN, np.nextafter(low, np.float32(1)), low)
    elif kind == 6:
        confidence_PHN[0] = -0.0
    elif kind == 7:
        correct_PHN[0, 0] = base_correct_N
    elif kind == 8:
        correct_PHN[:, 1] = correct_PHN[:, 0]
        confidence_PHN[:, 1] = confidence_PHN[:, 0]
    return Problem(correct_PHN, confidence_PHN, base_correct_N, problem.costs)
