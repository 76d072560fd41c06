"""Where samples leave by gate outputs (JEI-DNN). The rule for thresholds is core.tradeoff.apply_configuration.

Shapes: x any leading axes, G gates or intermediate exits, B batch. Exit index G is the backbone's own classifier.
"""

import torch
from torch import Tensor
from torch.nn import functional


def exit_probabilities(gates_xGB: Tensor) -> Tensor:
    """Probability (..., G, B) of leaving at each intermediate exit: max(0, min(g_l, 1 - sum of the g before l)).

    gates_xGB are sigmoid outputs in [0, 1]. What is missing to a sum of 1 is the probability of reaching the last exit.
    Source: JEI-DNN (arXiv 2310.09163), direct form of the exit distribution.
    """
    before_xGB = functional.pad(gates_xGB[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)
    return torch.clamp(1 - before_xGB, min=before_xGB[..., :1, :], max=gates_xGB)  # before the first gate it is 0


def exit_index_from_gates(gates_xGB: Tensor, single: bool = False) -> Tensor:
    """Exit taken by each sample, (..., B) int64 in 0..G: the first that stops with conditional probability >= 0.5.

    That probability is k_l = clip(P_l / prod_{j<l} (1 - k_j), 0, 1) with P of exit_probabilities; `single` puts the
    gate outputs themselves in place of P. The two choose the same exits: before the first stop P_l = g_l.
    Source: JEI-DNN (arXiv 2310.09163), inference.
    """
    mass_xGB = gates_xGB if single else exit_probabilities(gates_xGB)
    num_gates = mass_xGB.shape[-2]
    remaining_xB = mass_xGB.new_ones(mass_xGB.shape[:-2] + mass_xGB.shape[-1:])
    index_xB = torch.full_like(remaining_xB, num_gates, dtype=torch.int64)
    for gate in range(num_gates):
        # 0/0 is NaN and compares False; such a sample has left before
        stop_xB = (mass_xGB[..., gate, :] / remaining_xB).clamp(0, 1)
        index_xB = torch.where((index_xB == num_gates) & (stop_xB >= 0.5), gate, index_xB)
        remaining_xB = remaining_xB * (1 - stop_xB)
    return index_xB
