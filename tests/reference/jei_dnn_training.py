"""JEI-DNN's training of one point, written down slowly from its description: torch.optim, plain loops, no stacking."""

# ruff: noqa: E741  l is the exit, as in the formulas
import copy
import math

import numpy as np
import torch
from torch.nn import functional

from dynexit.data import Split, epoch_batches
from dynexit.models.multi_exit import MultiExit
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.schema import TrainSettings
from tests.reference.deep_supervision_training import divergence


def features_of(probabilities: torch.Tensor) -> torch.Tensor:
    """The four gate inputs of one exit, (B, 4)."""
    top = probabilities.topk(2, -1).values
    entropy = -(probabilities * probabilities.log()).sum(-1)
    squared = probabilities**2 / (probabilities**2).sum(-1, keepdim=True)
    return torch.stack((top[:, 0], entropy, top[:, 0] - top[:, 1], -(squared * squared.log()).sum(-1)), -1)


def taken_exits(gates: list[torch.Tensor]) -> list[int]:
    """The first exit whose share of the probability left is at least a half, sample by sample."""
    taken = []
    for sample in range(len(gates[0])):
        left, before, exit_taken = 1.0, 0.0, len(gates)
        for l, gate in enumerate(gates):
            p = max(0.0, min(gate[sample].item(), 1 - before))
            if p >= left / 2 and left > 0:
                exit_taken = l
                break
            before += gate[sample].item()
            left -= p
        taken.append(exit_taken)
    return taken


def train_alone(
    model: MultiExit,
    cost: np.ndarray,
    fresh: dict[str, torch.Tensor],
    tradeoff: float,
    settings: TrainSettings,
    method: JeiDnnSettings,
    train: Split,
    validation: Split,
    seed: int,
) -> dict[str, torch.Tensor]:
    """The state after training, under the names of `fresh` (initial heads and gates, float64)."""
    num_gates = len(model.positions)
    heads = [torch.nn.Linear(d, model.backbone.num_classes).double() for d in model.feature_dims]
    for position, head in zip(model.positions, heads, strict=True):
        prefix = f"heads.{position}.linear.0."
        head.load_state_dict({name: fresh[prefix + name] for name in ("weight", "bias")})
    gates = [torch.nn.Linear(4, 1).double() for _ in heads]
    for i, gate in enumerate(gates):
        gate.load_state_dict({"weight": fresh["gates.weight"][i][None], "bias": fresh["gates.bias"][i][None]})
    parameters = [p for module in (*heads, *gates) for p in module.parameters()]
    sgd = torch.optim.SGD(
        parameters, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )

    def logits_of(images: torch.Tensor) -> list[torch.Tensor]:
        features, final = model.features(images)
        return [head(z.double()) for head, z in zip(heads, features, strict=True)] + [final.double()]

    def gate_logits(logits: list[torch.Tensor]) -> list[torch.Tensor]:
        return [gate(features_of(a.detach().softmax(-1)))[:, 0] for gate, a in zip(gates, logits[:-1], strict=True)]

    def best_exit(logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        errors = torch.stack([functional.cross_entropy(a, labels, reduction="none") for a in logits])
        return (errors.detach() + tradeoff * torch.tensor(cost)[:, None]).argmin(0)

    def warm_up(logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        ce = [functional.cross_entropy(a, labels) + distilled(a, logits[-1]).mean() for a in logits[:-1]]
        losses = [(num_gates + 1 - l) * ce[l] for l in range(num_gates)]
        return sum(losses) + functional.cross_entropy(logits[-1], labels)

    def distilled(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return settings.distillation * divergence(student, teacher)

    def gate_loss(logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        target = best_exit(logits, labels)
        total = torch.zeros((), dtype=torch.float64)
        for l, r in enumerate(gate_logits(logits)):
            label = (target <= l).double()
            entropy = functional.binary_cross_entropy_with_logits(r, label, reduction="none")
            total = total + (entropy * torch.where(label == 1, positive_weight[l], 1.0)).sum()
        return total / (len(labels) * num_gates)

    def head_loss(logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        ce = torch.stack([functional.cross_entropy(a, labels, reduction="none") for a in logits])
        added = torch.stack([distilled(a, logits[-1]) for a in logits[:-1]]).mean()
        if method.head_loss == "reference":
            return ce[:-1].mean() + added
        g = [r.sigmoid().detach() for r in gate_logits(logits)]
        if method.head_loss == "single":
            return ce[taken_exits(g), range(len(labels))].mean() + added
        p = [torch.clamp(torch.minimum(g[l], 1 - sum(g[:l], torch.zeros_like(g[0]))), min=0) for l in range(num_gates)]
        weights = torch.stack(p)
        rho = (ce[:-1].sum(0) / (weights * ce[:-1]).sum(0)).detach()
        return (weights * ce[:-1] * rho).mean() + added

    def step(loss: torch.Tensor, modules: list[torch.nn.Linear]) -> None:
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        for p in parameters:
            if not any(p is own for module in modules for own in module.parameters()):
                p.grad = None
        sgd.step()

    positive_weight = torch.ones(num_gates, dtype=torch.float64)
    best = [(-1.0, copy.deepcopy(head.state_dict())) for head in heads]
    patience, frozen = [0] * num_gates, [False] * num_gates
    warming, joint_epochs, joint_step = True, 0, 0
    for epoch in range(settings.num_epochs):
        epoch_step = 0
        if not warming:
            low, high = settings.min_learning_rate, settings.learning_rate
            cosine = (1 + math.cos(math.pi * joint_epochs / settings.num_epochs)) / 2
            sgd.param_groups[0]["lr"] = low + (high - low) * cosine
        for batch in epoch_batches(len(train), settings.global_batch_size, seed, epoch):
            logits, labels = logits_of(train.images[batch]), train.labels[batch]
            if warming:
                step(warm_up(logits, labels), [head for head, done in zip(heads, frozen, strict=True) if not done])
                continue
            count = epoch_step if method.alternation == "reference" else joint_step
            if count // method.bilevel_batch_count % 2 == 0:
                step(gate_loss(logits, labels), gates)
            else:
                step(head_loss(logits, labels), heads)
            joint_step, epoch_step = joint_step + 1, epoch_step + 1
        with torch.no_grad():
            validation_final = logits_of(validation.images)
        if warming:
            for l in range(num_gates):
                if frozen[l]:
                    continue
                accuracy = (validation_final[l].argmax(-1) == validation.labels).double().mean().item()
                if accuracy > best[l][0]:
                    best[l], patience[l] = (accuracy, copy.deepcopy(heads[l].state_dict())), 0
                else:
                    patience[l] += 1
                if patience[l] >= method.warm_up_patience or epoch + 1 >= method.max_warm_up_epochs:
                    frozen[l] = True
                    heads[l].load_state_dict(best[l][1])
            warming = not all(frozen)
            continue
        joint_epochs += 1
        counts = torch.bincount(best_exit(validation_final, validation.labels), minlength=num_gates + 1).double()
        for l in range(num_gates):
            n = {"reference": counts[l], "cumulative": counts[: l + 1].sum(), "none": None}[method.positive_weight]
            if n is not None:
                n = max(n.item(), 0.1)
                positive_weight[l] = min((len(validation) - n) / n, 5.0)
    state = {
        f"heads.{position}.linear.0.{name}": value
        for position, head in zip(model.positions, heads, strict=True)
        for name, value in head.state_dict().items()
    }
    state["gates.weight"] = torch.cat([gate.weight.detach() for gate in gates])
    state["gates.bias"] = torch.cat([gate.bias.detach() for gate in gates])
    return state
