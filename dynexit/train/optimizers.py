"""Learning rates and optimizers: of members whose parameters are stacked on a leading axis, and of the backbone.

Shapes: R rows of a block, M members of the pack, m chosen members.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynexit.models.backbones import Backbone
from dynexit.study.schema import PrepareSettings

Groups = list[dict[str, Any]]  # parameter groups of torch.optim, with the learning rate's `factor`
Stack = dict[str, Tensor]  # name of a block -> (R, M, ...), or of a parameter -> (M, ...); see models/heads.py


def cosine_rate(step: int, num_steps: int, high: float, low: float, num_warm_up_steps: int = 0) -> float:
    """The rate of a step: linear up to `high` over the warm-up, then half a cosine that would reach `low` at the end.

    The first step of a warm-up has 1/num_warm_up_steps of `high`, the first after it all of `high`.
    """
    if step < num_warm_up_steps:
        return high * (step + 1) / num_warm_up_steps
    progress = (step - num_warm_up_steps) / max(num_steps - num_warm_up_steps, 1)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def leaves(stack: Stack, members: Tensor | None) -> Stack:
    """The parameters of the chosen members (all of them if None) as fresh leaves that ask for gradients."""
    return {name: pick(value, members).detach().requires_grad_() for name, value in stack.items()}


def clone(stack: Stack) -> Stack:
    """A copy of every tensor."""
    return {name: value.clone() for name, value in stack.items()}


def pick(block: Tensor, members: Tensor | None) -> Tensor:
    """The chosen members' entries of (R, M, ...); all of them if None."""
    return block if members is None else block[:, members]


def copy_members(stack: Mapping[str, Tensor], source: Mapping[str, Tensor], chosen_M: Tensor) -> None:
    """Overwrites, in place, the members of the blocks where `chosen_M` (M,) is true by those of `source`."""
    for name, value in stack.items():
        value.copy_(torch.where(_wide(chosen_M, value), source[name], value))


def _wide(value_m: Tensor, block: Tensor) -> Tensor:
    """(m,) or (R, m) so that it broadcasts with a block (R, m, ...)."""
    return value_m.reshape((-1, value_m.shape[-1]) + (1,) * (block.dim() - 2))


class MemberSGD:
    """Stochastic gradient descent with momentum and weight decay, as torch.optim.SGD's, for any part of the members.

    Who is not stepped keeps parameters and momentum as they are, as a parameter without gradient does in torch.
    """

    def __init__(self, stack: Stack, momentum: float, weight_decay: float) -> None:
        self.stack, self.momentum, self.weight_decay = stack, momentum, weight_decay
        self.momenta = {name: torch.zeros_like(value) for name, value in stack.items()}

    @property
    def states(self) -> dict[str, Stack]:
        """What is kept of every parameter, by the prefix of its name."""
        return {"": self.momenta}

    def step(
        self,
        gradients: Stack,
        members: Tensor | None,
        learning_rate_m: Tensor,
        active_m: Tensor,
        moving: Mapping[str, Tensor] | None = None,
    ) -> None:
        """One step of the chosen members where `active_m` (m,) is true and, of a block, `moving` (R, m), if given."""
        values = [pick(self.stack[name], members) for name in gradients]
        momenta = [pick(self.momenta[name], members) for name in gradients]
        # one kernel on a GPU for all blocks; on a CPU the same operations one by one
        moved = list(torch._foreach_add(list(gradients.values()), values, alpha=self.weight_decay))
        torch._foreach_add_(moved, momenta, alpha=self.momentum)
        rate_m = torch.where(active_m, learning_rate_m, 0.0)  # what is not finite stays out, and the rest is exact
        for name, value, momentum, step in zip(gradients, values, momenta, moved, strict=True):
            active, rate = active_m, rate_m
            if moving is not None:
                active, rate = active_m & moving[name], torch.where(moving[name], rate_m, 0.0)
            torch.where(_wide(active, step), step, momentum, out=momentum)
            value.addcmul_(momentum, _wide(rate, value), value=-1)
        if members is not None:
            _put_back([self.stack, self.momenta], members, [values, momenta], list(gradients))


class MemberAdam:
    """Adam, or with `decoupled` weight decay AdamW, as torch.optim's, for any part of the members.

    Who is not stepped keeps parameters, moments and step count as they are.
    """

    def __init__(
        self,
        stack: Stack,
        weight_decay: float,
        *,
        decoupled: bool,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
    ) -> None:
        self.stack, self.weight_decay, self.decoupled = stack, weight_decay, decoupled
        self.betas, self.epsilon = betas, epsilon
        self.means, self.squares = ({name: torch.zeros_like(v) for name, v in stack.items()} for _ in range(2))
        self.num_steps = {name: value.new_zeros(value.shape[:2]) for name, value in stack.items()}

    @property
    def states(self) -> dict[str, Stack]:
        """What is kept of every parameter, by the prefix of its name."""
        return {"mean.": self.means, "square.": self.squares, "num_steps.": self.num_steps}

    def step(
        self,
        gradients: Stack,
        members: Tensor | None,
        learning_rate_m: Tensor,
        active_m: Tensor,
        moving: Mapping[str, Tensor] | None = None,
    ) -> None:
        """One step of the chosen members where `active_m` (m,) is true and, of a block, `moving` (R, m), if given."""
        kept = [self.stack, self.means, self.squares, self.num_steps]
        values, means, squares, counts = slots = [[pick(own[name], members) for name in gradients] for own in kept]
        slopes = list(gradients.values())
        masks = [active_m if moving is None else active_m & moving[name] for name in gradients]
        rate_m = torch.where(active_m, learning_rate_m, 0.0)
        rates = [rate_m if moving is None else torch.where(mask, rate_m, 0.0) for mask in masks]
        if self.decoupled:
            shrinks = [1 - rate_m * self.weight_decay] * len(rates)
            shrinks = shrinks if moving is None else [1 - rate * self.weight_decay for rate in rates]
            for value, shrink in zip(values, shrinks, strict=True):
                value.mul_(_wide(shrink, value))
        else:
            slopes = list(torch._foreach_add(slopes, values, alpha=self.weight_decay))
        squared = list(torch._foreach_mul(slopes, slopes))
        corrections = []
        later = torch._foreach_add(counts, 1)
        for own, added, beta in ((means, slopes, self.betas[0]), (squares, squared, self.betas[1])):
            moved = list(torch._foreach_mul(own, beta))
            torch._foreach_add_(moved, torch._foreach_mul(added, 1 - beta))
            shares = list(torch._foreach_pow(beta, later))
            torch._foreach_mul_(shares, -1)
            torch._foreach_add_(shares, 1)
            corrections.append(shares)
            for mask, old, new in zip(masks, own, moved, strict=True):
                torch.where(_wide(mask, old), new, old, out=old)
        for mask, old, new in zip(masks, counts, later, strict=True):
            torch.where(_wide(mask, old), new, old, out=old)
        moves, scales = (
            [own / _wide(share, own) for own, share in zip(*pair, strict=True)]
            for pair in zip((means, squares), corrections, strict=True)
        )
        torch._foreach_sqrt_(scales)
        torch._foreach_add_(scales, self.epsilon)
        torch._foreach_div_(moves, scales)
        for value, move, rate in zip(values, moves, rates, strict=True):
            value.addcmul_(move, _wide(rate, value), value=-1)
        if members is not None:
            _put_back(kept, members, slots, list(gradients))


def _put_back(stacks: Sequence[Stack], members: Tensor, slots: Sequence[Sequence[Tensor]], names: list[str]) -> None:
    """Writes the chosen members' values into the stacks that they were picked from."""
    for stack, values in zip(stacks, slots, strict=True):
        for name, value in zip(names, values, strict=True):
            stack[name][:, members] = value


def finite_members(loss_m: Tensor, gradients: Stack) -> Tensor:
    """Whether loss and all gradients of each chosen member are finite, (m,) bool; NaN in one touches no other."""
    sums = [gradient.sum([axis for axis in range(gradient.dim()) if axis != 1]) for gradient in gradients.values()]
    found = torch.stack([loss_m.detach(), *sums])
    largest_m: Tensor = torch.linalg.vector_norm(found, math.inf, 0)
    return largest_m < math.inf  # fewer kernels than isfinite; NaN is not less


def parameter_groups(backbone: Backbone, settings: PrepareSettings) -> Groups:
    """The weights that are trained, by `factor` of the learning rate and `weight_decay`.

    Stem and blocks have factors of their own (JEI-DNN, section 5); from the tail to the stem each layer has
    `layer_decay` times the rate of the one behind it. Weight decay acts on matrices and kernels, or on everything.
    """
    layers, last = backbone.layers(), backbone.num_blocks + 1
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in backbone.model.named_parameters():
        if weight.requires_grad:
            layer = layers[name]
            own = settings.stem_rate if layer == 0 else settings.block_rate if layer < last else 1.0
            decay = settings.weight_decay if weight.dim() > 1 or settings.decay_all else 0.0
            groups.setdefault((own * settings.layer_decay ** (last - layer), decay), []).append(weight)
    return [{"params": params, "factor": factor, "weight_decay": decay} for (factor, decay), params in groups.items()]


def make_optimizer(groups: Groups, settings: PrepareSettings) -> torch.optim.Optimizer:
    """The optimizer that the settings name."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)


def set_rate(groups: Groups, rate: float) -> None:
    """The learning rate of the next step, each group's own share of it."""
    for group in groups:
        group["lr"] = rate * group["factor"]
