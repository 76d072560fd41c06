"""How sure an exit is of its answer: statistics of the softmax of its logits.

Shapes: x any leading axes, K classes (2 or more). All work on z = logits - largest logit, and e = exp(z), s = sum of e:
the softmax is e / s, its largest entry 1 / s, and nothing overflows.

torch is imported only when it computes, so that the schema of a study can read the table of confidences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def max_probability(logits_xK: "Tensor") -> "Tensor":
    """Largest softmax probability, in [1/K, 1]."""
    return 1 / _shifted(logits_xK).exp().sum(-1)


def entropy(logits_xK: "Tensor") -> "Tensor":
    """Entropy of the softmax in nats, in [0, ln K]."""
    z_xK = _shifted(logits_xK)
    e_xK = z_xK.exp()
    return _entropy(e_xK.sum(-1), (e_xK * z_xK).sum(-1))


def margin(logits_xK: "Tensor") -> "Tensor":
    """Largest minus second largest softmax probability, in [0, 1]; 0 where two classes tie."""
    z_xK = _shifted(logits_xK)
    # a second max without the first one's place: on CPU faster than topk for up to some hundred classes
    second_x = z_xK.clone().scatter_(-1, z_xK.max(-1, keepdim=True).indices, -math.inf).amax(-1)
    return -second_x.expm1() / z_xK.exp().sum(-1)


def power_entropy(logits_xK: "Tensor") -> "Tensor":
    """Entropy in nats, in [0, ln K], of the squared and renormalised softmax, which is softmax(2 * logits)."""
    return entropy(2 * logits_xK)


class Softmax(NamedTuple):
    """Parts of the softmax of logits (..., K): z, e, the sum s of e over K, and its logarithm; no gradient."""

    z_xK: "Tensor"
    e_xK: "Tensor"
    sum_x: "Tensor"
    log_sum_x: "Tensor"


def gate_features(logits_xK: "Tensor") -> "Tensor":
    """What a JEI-DNN gate reads, shape (..., 4): max probability, entropy, margin, power entropy.

    No gradient flows back to the logits: a gate never moves a head. Source: JEI-DNN (arXiv 2310.09163), gate inputs.
    """
    return gate_features_and_softmax(logits_xK)[0]


def gate_features_and_softmax(logits_xK: "Tensor") -> "tuple[Tensor, Softmax]":
    """`gate_features`, and what of the softmax they were made of."""
    import torch

    z_xK = _shifted(logits_xK.detach())
    # whether a logit is the largest, e and e z, in few kernels, and in the memory layout of z
    parts_3xK = z_xK.new_empty_strided((3, *z_xK.shape), (z_xK.numel(), *z_xK.stride()))
    is_largest_xK, e_xK, pairs_2xK = parts_3xK[0], parts_3xK[1], parts_3xK[1:]
    torch.eq(z_xK, 0, out=is_largest_xK)
    torch.exp(z_xK, out=e_xK)
    torch.mul(e_xK, z_xK, out=parts_3xK[2])
    sums_5x = z_xK.new_empty(5, *z_xK.shape[:-1])
    torch.sum(parts_3xK, -1, out=sums_5x[:3])
    # softmax(2 * logits) is e² / sum of e², and its shifted logits are 2 z: no second exponential
    torch.sum(pairs_2xK * e_xK, -1, out=sums_5x[3:])
    sums_5x[4].mul_(2)
    sums_2x, sum_x = sums_5x[1::2], sums_5x[1]
    log_sums_2x = sums_2x.log()
    features_4x = z_xK.new_empty(4, *z_xK.shape[:-1])
    largest_x = torch.reciprocal(sum_x, out=features_4x[0])
    torch.addcdiv(log_sums_2x, sums_5x[2::2], sums_2x, value=-1, out=features_4x[1::2])
    # without the largest e, which is 1, unless there are two; by an index of the largest it takes a CPU longer
    is_alone_x1 = sums_5x[0].eq_(1)[..., None]
    second_x = torch.addcmul(e_xK, is_largest_xK, is_alone_x1, value=-1, out=is_largest_xK).amax(-1)
    torch.addcdiv(largest_x, second_x, sum_x, value=-1, out=features_4x[2])
    return features_4x.movedim(0, -1), Softmax(z_xK, e_xK, sum_x, log_sums_2x[0])


def entropy_confidence(logits_xK: "Tensor") -> "Tensor":
    """1 - entropy / ln K, in [0, 1]: 0 for a uniform softmax, 1 for a certain one."""
    return (1 - entropy(logits_xK) / math.log(logits_xK.shape[-1])).clamp(0, 1)


def gate_confidence(gate_logit_x: "Tensor") -> "Tensor":
    """The gate's probability of stopping, in [0, 1]."""
    return gate_logit_x.sigmoid()


@dataclass(frozen=True)
class ConfidenceKind:
    """What can be compared with an exit's threshold: `function` maps logits (..., K) or gate logits (...) to (...)."""

    function: "Callable[[Tensor], Tensor]"
    meaning: str
    reads: Literal["logits", "gates"] = "logits"
    range: tuple[float, float] = (0.0, 1.0)


CONFIDENCES = {
    "max_probability": ConfidenceKind(max_probability, "largest softmax probability"),
    "margin": ConfidenceKind(margin, "largest minus second largest softmax probability"),
    "entropy": ConfidenceKind(entropy_confidence, "1 - entropy of the softmax / ln K"),
    "gate": ConfidenceKind(gate_confidence, "probability of stopping that the position's gate gives", reads="gates"),
}
"""The confidences a threshold can be set on, by name."""

LOGIT_CONFIDENCES = tuple(name for name, kind in CONFIDENCES.items() if kind.reads == "logits")


def _shifted(logits_xK: "Tensor") -> "Tensor":
    """Logits minus the largest."""
    if logits_xK.ndim == 0 or logits_xK.shape[-1] < 2:
        raise ValueError(f"logits need at least 2 classes on their last axis, got shape {tuple(logits_xK.shape)}")
    return logits_xK - logits_xK.amax(-1, keepdim=True)


def _entropy(sum_x: "Tensor", weighted_x: "Tensor") -> "Tensor":
    """Entropy from the sum of e and the sum of e * z: both terms are 0 or more, so nothing cancels."""
    return sum_x.log().addcdiv(weighted_x, sum_x, value=-1)
