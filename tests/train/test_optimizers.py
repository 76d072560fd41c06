"""Optimizers of stacked members: each member as under torch.optim, whoever else is stepped."""

import itertools

import pytest
import torch

from dynexit.train.optimizers import MemberAdam, MemberSGD

R, M, SHAPES = 2, 3, {"weight": (4, 2), "bias": (5,)}


def draw(generator: torch.Generator, num_members: int) -> dict[str, torch.Tensor]:
    return {
        name: torch.randn(R, num_members, *shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("rows", [False, True], ids=["members", "members and rows"])
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_a_member_moves_as_under_torch_whoever_else_does(kind: str, rows: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    stack = draw(generator, M)
    alone = [[stack[name][r, i].clone().requires_grad_() for name in SHAPES for r in range(R)] for i in range(M)]
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
        active = torch.rand(len(chosen), generator=generator) < 0.7
        moving = {name: torch.rand(R, len(chosen), generator=generator) < 0.7 for name in SHAPES} if rows else None
        for name in SHAPES:
            gradients[name][:, ~active] = float("nan")
        ours.step(gradients, members, rates, active, moving)
        for place, i in enumerate(chosen):
            for (name, r), parameter in zip(itertools.product(SHAPES, range(R)), alone[i], strict=True):
                moves = active[place] and (moving is None or moving[name][r, place])
                parameter.grad = gradients[name][r, place].clone() if moves else None
            theirs[i].param_groups[0]["lr"] = rates[place].item()
            theirs[i].step()
    for i in range(M):
        for (name, r), parameter in zip(itertools.product(SHAPES, range(R)), alone[i], strict=True):
            torch.testing.assert_close(stack[name][r, i], parameter.detach(), rtol=1e-12, atol=1e-14)
