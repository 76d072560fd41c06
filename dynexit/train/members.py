"""Parameters of many members, stacked on a leading axis; an optimizer with a state per member.

Shapes: M members of the pack, m chosen members.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Stack = dict[str, Tensor]  # parameter name -> (M, ...)


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
        for name, gradient in gradients.items():
            value, buffer = self.stack[name], self.buffers[name]
            old = value if members is None else value[members]
            old_buffer = buffer if members is None else buffer[members]
            wide = (-1,) + (1,) * (old.dim() - 1)
            active = active_m[name].view(wide)
            moved = old_buffer.mul(self.momentum).add_(gradient).add_(old, alpha=self.weight_decay)
            new_buffer = torch.where(active, moved, old_buffer)
            new = torch.where(active, torch.addcmul(old, moved, learning_rate_m.view(wide), value=-1), old)
            if members is None:
                value.copy_(new)
                buffer.copy_(new_buffer)
            else:
                value[members], buffer[members] = new, new_buffer


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
    finite_m = loss_m.detach().isfinite()
    for gradient in gradients.values():
        finite_m = finite_m & gradient.flatten(1).sum(1).isfinite()
    return finite_m
