"""Where samples leave: from gate outputs (JEI-DNN) or from confidence thresholds.

Shapes: x any leading axes, G gates or intermediate exits, B batch. Exit index G is the backbone's own classifier.
"""

import torch
from torch import Tensor


def exit_probabilities(gates_xGB: Tensor) -> Tensor:
    """Probability (..., G, B) of leaving at each intermediate exit: max(0, min(g_l, 1 - sum of the g before l)).

    gates_xGB are sigmoid outputs in [0, 1]. What is missing to a sum of 1 is the probability of reaching the last exit.
    Source: JEI-DNN (arXiv 2310.09163), direct form of the exit distribution.
    """
    before_xGB = torch.zeros_like(gates_xGB)
    before_xGB[..., 1:, :] = gates_xGB[..., :-1, :].cumsum(-2)
    return torch.minimum(gates_xGB, 1 - before_xGB).clamp_min(0)


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


def exit_index_from_thresholds(confidence_GB: Tensor, threshold_G: Tensor, enabled_G: Tensor) -> Tensor:
    """Exit taken by each sample, (B,) int64 in 0..G: the first enabled exit with confidence > threshold, otherwise G.

    confidence_GB and threshold_G are float32 and compared as such, enabled_G is bool; equality does not leave.
    Raises ValueError on another dtype: a comparison in another precision can decide differently at equality.
    """
    if confidence_GB.dtype != torch.float32 or threshold_G.dtype != torch.float32:
        raise ValueError(f"thresholds are compared in float32, got {confidence_GB.dtype} and {threshold_G.dtype}")
    leaves_GB = (confidence_GB > threshold_G[:, None]) & enabled_G[:, None]
    last_1B = leaves_GB.new_ones((1, leaves_GB.shape[1]))
    return torch.cat((leaves_GB, last_1B)).to(torch.uint8).argmax(0)
