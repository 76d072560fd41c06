"""Optimizers of stacked members: each member as under torch.optim, whoever else is stepped."""

import pytest
import torch

from dynexit.train.optimizers import MemberAdam, MemberSGD

M, SHAPES = 3, {"weight": (4, 2), "bias": (5,)}


def draw(generator: torch.Generator, num_members: int) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(num_members, *shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_a_member_moves_as_under_torch_whoever_else_does(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    stack = draw(generator, M)
    alone = [[stack[name][i].clone().requires_grad_() for name in SHAPES] for i in range(M)]
    if kind == "sgd":
        ours: MemberSGD | MemberAdam = MemberSGD(stack, 0.9, 0.03)
        theirs = [torch.optim.SGD(p, lr=1, momentum=0.9, weight_decay=0.03) for p in alone]
    else:
        ours = MemberAdam(stack, 0.03, decoupled=kind == "adamw")
        make = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
        theirs = [make(p, lr=1, weight_decay=0.03) for p in alone]
    for step in range(12):
        chosen = [[0, 1, 2], [0, 2], [1]][step % 3]
        members = None if len(chosen) == M else torch.tensor(chosen)
        gradients = draw(generator, len(chosen))
        rates = 0.01 * (1 + torch.rand(len(chosen), generator=generator, dtype=torch.float64))
        active = {name: torch.rand(len(chosen), generator=generator) < 0.7 for name in SHAPES}
        ours.step(gradients, members, rates, active)
        for place, i in enumerate(chosen):
            for name, parameter in zip(SHAPES, alone[i], strict=True):
                parameter.grad = gradients[name][place].clone() if active[name][place] else None
            theirs[i].param_groups[0]["lr"] = rates[place].item()
            theirs[i].step()
    for i in range(M):
        for name, parameter in zip(SHAPES, alone[i], strict=True):
            torch.testing.assert_close(stack[name][i], parameter.detach(), rtol=1e-12, atol=1e-14)
