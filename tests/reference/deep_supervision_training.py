"""The training of one point without gates, written down slowly: torch.optim, plain loops, no stacking."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from dynexit.data import Split, epoch_batches
from dynexit.models.multi_exit import MultiExit

Logits = list[torch.Tensor]  # of every head, position-major, then of the backbone's own classifier


def build_heads(model: MultiExit, head_types: Sequence[str], fresh: dict[str, torch.Tensor]) -> torch.nn.ModuleList:
    """One module a head, position-major, holding the initial values `fresh` (named as a member's state, float64)."""
    heads = torch.nn.ModuleList()
    for position, width in zip(model.positions, model.feature_dims, strict=True):
        for name in head_types:
            depth, hidden = (1, 0) if name == "linear" else map(int, name.removeprefix("mlp").split("x"))
            widths = [width, *[hidden] * (depth - 1), model.backbone.num_classes]
            layers: list[torch.nn.Module] = []
            for i in range(depth):
                linear = torch.nn.Linear(widths[i], widths[i + 1]).double()
                prefix = f"heads.{position}.{name}.{i}."
                linear.load_state_dict({part: fresh[prefix + part] for part in ("weight", "bias")})
                layers += [linear, torch.nn.ReLU()]
            heads.append(torch.nn.Sequential(*layers[:-1]))
    return heads


def state_of(model: MultiExit, head_types: Sequence[str], heads: torch.nn.ModuleList) -> dict[str, torch.Tensor]:
    """The heads' values under the names of a member's state."""
    state = {}
    rows = [(position, name) for position in model.positions for name in head_types]
    for (position, name), head in zip(rows, heads, strict=True):
        for i, layer in enumerate(layer for layer in head if isinstance(layer, torch.nn.Linear)):
            for part, value in layer.state_dict().items():
                state[f"heads.{position}.{name}.{i}.{part}"] = value.clone()
    return state


def logits_of(model: MultiExit, heads: torch.nn.ModuleList, images: torch.Tensor) -> Logits:
    """What every head says, each by itself."""
    features, final = model.features(images)
    per_position = len(heads) // len(features)
    own = [head(features[i // per_position].double()) for i, head in enumerate(heads)]
    return [*own, final.double()]


def added_up(logits: Logits, shrinkage: float) -> Logits:
    """Boosted: every exit's logits plus what the exit before says, which is not trained again."""
    summed: Logits = []
    for own in logits[:-1]:
        summed.append(own + shrinkage * summed[-1].detach() if summed else own)
    return [*summed, logits[-1]]


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Divergence of `student` from `teacher` at temperature 3, sample by sample."""
    p = functional.softmax(teacher.detach() / 3, -1)
    return 9 * (p * (p.log() - functional.log_softmax(student / 3, -1))).sum(-1)


def cosine(step: int, num_steps: int, high: float, low: float, num_warm_up_steps: int = 0) -> float:
    """The learning rate of a step."""
    if step < num_warm_up_steps:
        return high * (step + 1) / num_warm_up_steps
    turn = math.pi * (step - num_warm_up_steps) / (num_steps - num_warm_up_steps)
    return low + (high - low) / 2 * (1 + math.cos(turn))


def train_heads(
    model: MultiExit,
    heads: torch.nn.ModuleList,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    loss_of: Callable[[Logits, torch.Tensor], torch.Tensor],
    split: Split,
    *,
    num_epochs: int,
    batch_size: int,
    seed: int,
    mix: Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Trains `heads` in place: `rate` by step, `loss_of` (logits, targets), `mix` images and labels, `after` a step."""
    step = 0
    for epoch in range(num_epochs):
        for batch in epoch_batches(len(split), batch_size, seed, epoch):
            images, target = split.images[batch], split.labels[batch]
            if mix is not None:
                images, target = mix(step, images, target)
            optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.zero_grad(set_to_none=True)
            loss_of(logits_of(model, heads, images), target).backward()
            optimizer.step()
            if after is not None:
                after(step)
            step += 1
