"""Learning rates and optimizers: of members whose parameters are stacked on a leading axis, and of the backbone.

Shapes: M members of the pack, m chosen members.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynexit.models.backbones import Backbone
from dynexit.study.schema import PrepareSettings

Groups = list[dict[str, Any]]  # parameter groups of torch.optim, with the learning rate's `factor`
Stack = dict[str, Tensor]  # parameter name -> (M, ...)


def cosine_rate(step: int, num_steps: int, high: float, low: float, num_warm_up_steps: int = 0) -> float:
    """The rate of a step: linear up to `high` over the warm-up, then half a cosine that would reach `low` at the end.

    The first step of a warm-up has 1/num_warm_up_steps of `high`, the first after it all of `high`.
    """
    if step < num_warm_up_steps:
        return high * (step + 1) / num_warm_up_steps
    progress = (step - num_warm_up_steps) / max(num_steps - num_warm_up_steps, 1)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


def stack_of(module: nn.Module) -> Stack:
    """The stacked parameters of `module` by name, sharing its memory."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def leaves(stack: Stack, members: Tensor | None) -> Stack:
    """The parameters of the chosen members (all of them if None) as fresh leaves that ask for gradients."""
    chosen = stack if members is None else {name: value[members] for name, value in stack.items()}
    return {name: value.detach().requires_grad_() for name, value in chosen.items()}


def clone(stack: Stack) -> Stack:
    """A copy of every tensor."""
    return {name: value.clone() for name, value in stack.items()}


def pick(tensor: Tensor, members: Tensor | None) -> Tensor:
    """The chosen members' entries of (M, ...); all of them if None."""
    return tensor if members is None else tensor[members]


def copy_members(stack: Stack, source: Mapping[str, Tensor], chosen_M: Tensor) -> None:
    """Overwrites, in place, the members of `stack` where `chosen_M` (M,) is true by those of `source`."""
    for name, value in stack.items():
        value[chosen_M] = source[name][chosen_M]


class MemberSGD:
    """Stochastic gradient descent with momentum and weight decay, as torch.optim.SGD's, for any part of the members.

    Who is not stepped keeps parameters and momentum as they are, as a parameter without gradient does in torch.
    """

    def __init__(self, stack: Stack, momentum: float, weight_decay: float) -> None:
        self.stack, self.momentum, self.weight_decay = stack, momentum, weight_decay
        self.buffers = {name: torch.zeros_like(value) for name, value in stack.items()}

    def step(
        self, gradients: Stack, members: Tensor | None, learning_rate_m: Tensor, active_m: Mapping[str, Tensor]
    ) -> None:
        """One step of the chosen members; a parameter moves only where its entry of `active_m` (m,) is true."""
        values, buffers = [self.stack[name] for name in gradients], [self.buffers[name] for name in gradients]
        olds, old_buffers = ([pick(slot, members) for slot in slots] for slots in (values, buffers))
        # one kernel on a GPU for many parameters; on a CPU the same operations one by one
        moved = list(torch._foreach_mul(old_buffers, self.momentum))
        torch._foreach_add_(moved, list(gradients.values()))
        torch._foreach_add_(moved, olds, alpha=self.weight_decay)
        news, new_buffers = [], []
        for name, old, old_buffer, step in zip(gradients, olds, old_buffers, moved, strict=True):
            wide = (-1,) + (1,) * (old.dim() - 1)
            active = active_m[name].view(wide)
            new_buffers.append(torch.where(active, step, old_buffer))
            news.append(torch.where(active, torch.addcmul(old, step, learning_rate_m.view(wide), value=-1), old))
        if members is None:
            torch._foreach_copy_(values + buffers, news + new_buffers)
        else:
            for slot, new in zip(values + buffers, news + new_buffers, strict=True):
                slot[members] = new


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
        self.buffers = {
            f"{kind}.{name}": torch.zeros_like(v) for kind in ("mean", "square") for name, v in stack.items()
        }
        self.buffers |= {f"num_steps.{name}": value.new_zeros(len(value)) for name, value in stack.items()}

    def step(
        self, gradients: Stack, members: Tensor | None, learning_rate_m: Tensor, active_m: Mapping[str, Tensor]
    ) -> None:
        """One step of the chosen members; a parameter moves only where its entry of `active_m` (m,) is true."""
        for name, gradient in gradients.items():
            slots = [self.stack[name], *(self.buffers[f"{kind}.{name}"] for kind in ("mean", "square", "num_steps"))]
            before = [slot if members is None else slot[members] for slot in slots]
            for slot, old, new in zip(slots, before, self._moved(gradient, learning_rate_m, *before), strict=True):
                kept = torch.where(active_m[name].view((-1,) + (1,) * (old.dim() - 1)), new, old)
                if members is None:
                    slot.copy_(kept)
                else:
                    slot[members] = kept

    def _moved(
        self, gradient: Tensor, rate_m: Tensor, value: Tensor, mean: Tensor, square: Tensor, num_steps_m: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_steps_m = num_steps_m + 1
        wide = (-1,) + (1,) * (value.dim() - 1)
        rate, corrections = rate_m.view(wide), [(1 - beta**num_steps_m).view(wide) for beta in self.betas]
        if self.decoupled:
            value = value * (1 - rate * self.weight_decay)
        else:
            gradient = gradient + self.weight_decay * value
        mean = self.betas[0] * mean + (1 - self.betas[0]) * gradient
        square = self.betas[1] * square + (1 - self.betas[1]) * gradient**2
        scale = (square / corrections[1]).sqrt() + self.epsilon
        return value - rate * (mean / corrections[0]) / scale, mean, square, num_steps_m


def finite_members(loss_m: Tensor, gradients: Stack) -> Tensor:
    """Whether loss and all gradients of each chosen member are finite, (m,) bool; NaN in one touches no other."""
    sums = [loss_m.detach(), *(gradient.flatten(1).sum(1) for gradient in gradients.values())]
    return torch.stack(sums).isfinite().all(0)


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
