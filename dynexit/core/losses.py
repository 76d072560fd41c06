"""Losses of exit heads and gates, and the targets and weights of JEI-DNN's gates. One value per member.

Shapes: M members (or x, any leading axes, also none), L exits of which the last is the backbone's own classifier,
G = L-1 gates, B batch, K classes. Every loss has the dtype of its logits. Source, where no other is named: JEI-DNN
(arXiv 2310.09163).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dynexit.core.confidence import Softmax, max_probability
from dynexit.core.exit_policy import exit_index_from_gates, exit_probabilities

HEAD_LOSSES = ("reference", "paper", "single")
OBJECTIVES = ("ce", "prob", "zero_one")
POSITIVE_WEIGHTS = ("reference", "cumulative", "none")

_MIN_POSITIVES = 0.1
_MAX_POSITIVE_WEIGHT = 5.0


def cross_entropies(
    logits_xLBK: Tensor, labels_B: Tensor, *, twice: bool = False, softmax: Softmax | None = None
) -> Tensor:
    """Cross-entropy in nats of every exit on every sample, (..., L, B); differentiable once, or with `twice` twice.

    `softmax` has the parts of the logits' softmax, if they are known.
    """
    index_xLB1 = labels_B[:, None].expand((*logits_xLBK.shape[:-1], 1))
    if not twice:
        entropies_xLB: Tensor = _CrossEntropies.apply(logits_xLBK, index_xLB1, softmax)
        return entropies_xLB
    shifted_xLBK = logits_xLBK - logits_xLBK.detach().amax(-1, keepdim=True)
    return shifted_xLBK.exp().sum(-1).log() - shifted_xLBK.gather(-1, index_xLB1).squeeze(-1)


class _CrossEntropies(torch.autograd.Function):
    """The same with half the kernels in its backward pass, and the gradient in the memory layout of the logits."""

    @staticmethod
    def forward(ctx: Any, logits_xLBK: Tensor, index_xLB1: Tensor, softmax: Softmax | None) -> Tensor:
        if softmax is not None:
            at_label_xLB = softmax.z_xK.gather(-1, index_xLB1).squeeze(-1)
            ctx.save_for_backward(softmax.e_xK, softmax.sum_x, index_xLB1)
            return softmax.log_sum_x - at_label_xLB
        # spelled out, because torch's log_softmax is several times slower on CPU for a handful of classes
        shifted_xLBK = logits_xLBK - logits_xLBK.amax(-1, keepdim=True)
        at_label_xLB = shifted_xLBK.gather(-1, index_xLB1).squeeze(-1)
        exponentials_xLBK = shifted_xLBK.exp_()
        sum_xLB = exponentials_xLBK.sum(-1)
        ctx.save_for_backward(exponentials_xLBK, sum_xLB, index_xLB1)
        return sum_xLB.log() - at_label_xLB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_xLB: Tensor) -> tuple[Tensor, None, None]:
        exponentials_xLBK, sum_xLB, index_xLB1 = ctx.saved_tensors
        gradient_xLBK = exponentials_xLBK * (slope_xLB / sum_xLB)[..., None]
        return gradient_xLBK.scatter_add_(-1, index_xLB1, -slope_xLB[..., None]), None, None


def soft_cross_entropies(logits_xLBK: Tensor, target_xBK: Tensor) -> Tensor:
    """Cross-entropy in nats of every exit to the probabilities `target_xBK`, which broadcast, (..., L, B)."""
    shifted_xLBK = logits_xLBK - logits_xLBK.detach().amax(-1, keepdim=True)
    return shifted_xLBK.exp().sum(-1).log() * target_xBK.sum(-1) - (shifted_xLBK * target_xBK).sum(-1)


def divergences(logits_xRBK: Tensor, teacher_BK: Tensor, temperature: float = 3.0) -> Tensor:
    """Divergence of every exit from the teacher's logits, (..., R, B): T^2 KL(teacher || exit), both logits over T.

    The teacher is a constant. T^2 keeps the gradient's size. Source: Hinton et al., Distilling the Knowledge in a
    Neural Network (arXiv 1503.02531), section 2.
    """
    teacher_BK = teacher_BK.detach() / temperature
    target_BK = (teacher_BK - teacher_BK.amax(-1, keepdim=True)).exp()
    target_BK = target_BK / target_BK.sum(-1, keepdim=True)
    ce_xRB = soft_cross_entropies(logits_xRBK / temperature, target_BK)
    return temperature**2 * (ce_xRB - soft_cross_entropies(teacher_BK, target_BK))


def first_exit_weights(logits_MRBK: Tensor, num_head_types: int) -> Tensor:
    """Weight (M, R, B) of every head on every sample: 1 at the first position, 2 (1 - p_max there) at all later ones.

    Rows R are position-major, and a head is weighed by the one of its own type at the first position. Constants: held
    fixed, the first exit cannot lower the loss by being sure of itself. Source: DyCE (arXiv 2403.01695).
    """
    first_MHB = max_probability(logits_MRBK.detach()[:, :num_head_types])
    later_MRB = (2 * (1 - first_MHB)).repeat(1, logits_MRBK.shape[1] // num_head_types, 1)
    return torch.cat((torch.ones_like(first_MHB), later_MRB[:, num_head_types:]), 1)


def warm_up_loss(logits_MLBK: Tensor, labels_B: Tensor) -> Tensor:
    """Mean over the batch of every exit's cross-entropy, summed over the exits with weights L, L-1, ..., 1: (M,).

    The last exit counts in the value; it gets a gradient only if its logits ask for one. Source: JEI-DNN's warm-up.
    """
    ce_ML = cross_entropies(logits_MLBK, labels_B).mean(-1)
    num_exits = ce_ML.shape[-1]
    return ce_ML @ torch.arange(num_exits, 0, -1, dtype=ce_ML.dtype, device=ce_ML.device)


def head_loss(
    logits_MLBK: Tensor, labels_B: Tensor, gates_MGB: Tensor, kind: str, softmax: Softmax | None = None
) -> Tensor:
    """Loss of the exit heads in the joint phase, (M,). gates_MGB are sigmoid outputs and count as constants.

    reference: mean cross-entropy over intermediate exits and samples. The published code writes it as `paper` with a
        rescaling that is not held constant, which cancels the exit probabilities from value and gradient alike.
    paper: the same value, but the gradient of CE_il is P_il rho_i / (B G), with P of exit_probabilities and
        rho_i = sum_l CE_il / sum_l P_il CE_il held constant. Where that denominator is 0 the exits weigh alike.
    single: mean cross-entropy of the exit each sample takes, the last one included.
    Of the other kinds the last exit is no part, and its logits may be left out. `softmax` is that of the logits, if it
    is known.
    Raises ValueError on another kind.
    """
    if kind not in HEAD_LOSSES:
        raise ValueError(f"head loss {kind!r} is unknown; it is one of {', '.join(HEAD_LOSSES)}")
    if kind == "single":
        taken_MB = exit_index_from_gates(gates_MGB.detach(), single=True)
        return cross_entropies(logits_MLBK, labels_B).gather(-2, taken_MB[..., None, :]).squeeze(-2).mean(-1)
    ce_MGB = cross_entropies(logits_MLBK, labels_B, softmax=softmax)
    if ce_MGB.shape[-2] > gates_MGB.shape[-2]:  # later than of the logits, whose gradient would be padded
        ce_MGB = ce_MGB[..., :-1, :]
    if kind == "paper" and ce_MGB.requires_grad:  # in the value the weights cancel
        weights_MGB = _paper_weights(ce_MGB.detach(), gates_MGB.detach())
        ce_MGB.register_hook(weights_MGB.mul)  # type: ignore[no-untyped-call]
    return ce_MGB.mean((-2, -1))


def prediction_errors(logits_MLBK: Tensor, labels_B: Tensor, objective: str, softmax: Softmax | None = None) -> Tensor:
    """Error of every exit on every sample as the gate targets count it, (M, L, B); no gradient.

    ce: cross-entropy in nats. prob: minus the largest probability where correct, else 0. zero_one: -1 where correct,
    else 0. `softmax` is that of the logits, if it is known. Raises ValueError on another objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"gate objective {objective!r} is unknown; it is one of {', '.join(OBJECTIVES)}")
    logits_MLBK = logits_MLBK.detach()
    if objective == "ce":
        return cross_entropies(logits_MLBK, labels_B, softmax=softmax)
    correct_MLB = (logits_MLBK.max(-1).indices == labels_B).to(logits_MLBK.dtype)
    return -correct_MLB * max_probability(logits_MLBK) if objective == "prob" else -correct_MLB


def gate_targets(errors_MLB: Tensor, relative_cost_L: Tensor, ce_ic_tradeoff_M: Tensor) -> Tensor:
    """Exit with the least error + tradeoff * cost for every sample, (M, B) int64 in 0..G; ties go to the lowest."""
    cost_ML = ce_ic_tradeoff_M[..., None] * relative_cost_L
    return (errors_MLB + cost_ML[..., None]).min(-2).indices  # on CPU many times as fast as argmin


def gate_labels(targets_MB: Tensor, num_gates: int) -> Tensor:
    """Whether a sample should have left by gate l, (M, G, B) bool: true at its target and at all later gates."""
    return targets_MB[..., None, :] <= torch.arange(num_gates, device=targets_MB.device)[:, None]


def gate_loss(gate_logits_MGB: Tensor, targets_MB: Tensor, positive_weight_MG: Tensor) -> Tensor:
    """Mean over gates and samples of the binary cross-entropy to gate_labels, positives weighted by gate: (M,)."""
    labels_MGB = gate_labels(targets_MB, gate_logits_MGB.shape[-2]).to(gate_logits_MGB.dtype)
    weights_MG1 = positive_weight_MG[..., None].to(gate_logits_MGB.dtype)
    return functional.binary_cross_entropy_with_logits(
        gate_logits_MGB, labels_MGB, pos_weight=weights_MG1, reduction="none"
    ).mean((-2, -1))


def positive_weights(counts_ML: Tensor, kind: str) -> Tensor:
    """Weight of each gate's positives, (M, G) float64: min((N - n) / n, 5), N the sum of the counts, n at least 0.1.

    counts_ML: number of samples whose gate target is exit l. reference: n_l = counts_l, as published. cumulative:
    n_l = counts_0 + ... + counts_l, which is the number of positives of gate l. none: 1.
    Raises ValueError on another kind.
    """
    if kind not in POSITIVE_WEIGHTS:
        raise ValueError(f"positive weight {kind!r} is unknown; it is one of {', '.join(POSITIVE_WEIGHTS)}")
    counts_ML = counts_ML.to(torch.float64)
    if kind == "none":
        return torch.ones_like(counts_ML[..., :-1])
    positives_ML = counts_ML.cumsum(-1) if kind == "cumulative" else counts_ML
    positives_MG = positives_ML[..., :-1].clamp_min(_MIN_POSITIVES)
    return ((counts_ML.sum(-1, keepdim=True) - positives_MG) / positives_MG).clamp_max(_MAX_POSITIVE_WEIGHT)


def _paper_weights(ce_MGB: Tensor, gates_MGB: Tensor) -> Tensor:
    """P_il rho_i; all 1, the same value of the loss, for samples whose expected cross-entropy is 0."""
    p_MGB = exit_probabilities(gates_MGB)
    # the weights do not change with the scale of a sample's P, so bring the largest to 1: no underflow in the products
    p_MGB = p_MGB / p_MGB.amax(-2, keepdim=True)
    expected_M1B = (p_MGB * ce_MGB).sum(-2, keepdim=True)
    weights_MGB = p_MGB * (ce_MGB.sum(-2, keepdim=True) / expected_M1B)
    return weights_MGB.nan_to_num(1.0, 1.0, 1.0)  # where the expected cross-entropy is 0
