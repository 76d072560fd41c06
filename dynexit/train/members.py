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


def finite_members(loss_m: Tensor, gradients: Stack) -> Tensor:
    """Whether loss and all gradients of each chosen member are finite, (m,) bool; NaN in one touches no other."""
    finite_m = loss_m.detach().isfinite()
    for gradient in gradients.values():
        finite_m = finite_m & gradient.flatten(1).sum(1).isfinite()
    return finite_m
