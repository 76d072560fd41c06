"""What the members of a pack do on a split: sums and counts first, over all ranks; division last.

Shapes: M members, L exits, G = L-1 gates, B batch, K classes.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynexit.core.exit_policy import exit_index_from_gates
from dynexit.core.losses import cross_entropies, gate_targets, prediction_errors
from dynexit.data import Split, load_batches

if TYPE_CHECKING:
    from dynexit.train.jei_dnn import JeiDnnTask
    from dynexit.train.pack import PackTask

_BATCH_SIZE = 256


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Whole-split figures of every member under its own gates, on the CPU in float64."""

    exit_accuracy_ML: Tensor
    target_counts_ML: Tensor  # samples whose gate target is exit l
    exit_counts_ML: Tensor  # samples that leave at exit l
    cross_entropy_M: Tensor  # mean, of the exit taken
    accuracy_M: Tensor
    relative_cost_M: Tensor  # mean cost of the exit taken over that of the last exit
    relative_macs_M: Tensor  # mean MACs of the exit taken over the bare backbone's

    def figures(self, member: int, gated: bool) -> dict[str, Any]:
        """The member's figures for its metrics; those of the gates only where `gated`."""
        figures: dict[str, Any] = {"exit_accuracy": self.exit_accuracy_ML[member].tolist()}
        if gated:
            counts_L = self.exit_counts_ML[member]
            figures |= {
                "validation_accuracy": self.accuracy_M[member].item(),
                "validation_cross_entropy": finite_or_none(self.cross_entropy_M[member].item()),
                "validation_relative_cost": self.relative_cost_M[member].item(),
                "validation_relative_macs": self.relative_macs_M[member].item(),
                "exit_fractions": (counts_L / counts_L.sum()).tolist(),
            }
        return figures


def finite_or_none(value: float) -> float | None:
    """NaN and infinity have no place in JSON."""
    return value if abs(value) < float("inf") else None


@torch.no_grad()
def evaluate(task: "JeiDnnTask", split: Split) -> Evaluation:
    """Figures of every member's current weights on `split`, each rank taking its share of the batches."""
    num_members, num_exits = len(task.members), len(task.cost_L)
    sums = {
        "exit_correct": (num_members, num_exits),
        "targets": (num_members, num_exits),
        "exits": (num_members, num_exits),
        "cross_entropy": (num_members,),
        "correct": (num_members,),
        "count": (1,),
    }
    total = {name: torch.zeros(size, dtype=torch.float64, device=task.ranks.device) for name, size in sums.items()}
    for images, labels in _my_batches(task, split):
        _add_batch(task, total, images, labels)
    task.ranks.all_reduce(total.values())
    count = total["count"]
    exits_ML = total["exits"]
    figures = {
        "exit_accuracy_ML": total["exit_correct"] / count,
        "target_counts_ML": total["targets"],
        "exit_counts_ML": exits_ML,
        "cross_entropy_M": total["cross_entropy"] / count,
        "accuracy_M": total["correct"] / count,
        "relative_cost_M": exits_ML @ task.cost_L.to(torch.float64) / count,
        "relative_macs_M": exits_ML @ task.macs_L.to(torch.float64) / (count * task.full_macs),
    }
    return Evaluation(**{name: value.cpu() for name, value in figures.items()})


@torch.no_grad()
def evaluate_exits(task: "PackTask", split: Split) -> tuple[Tensor, Tensor]:
    """(accuracy, mean cross-entropy) of every member's exits on `split`, both (M, L) float64 on the CPU."""
    sums_2ML: Tensor | None = None
    for images, labels_B in _my_batches(task, split):
        logits_MLBK = task.exit_logits(images)
        correct_MLB = (logits_MLBK.argmax(-1) == labels_B).to(torch.float64)
        ce_MLB = cross_entropies(logits_MLBK, labels_B).to(torch.float64)
        batch_2ML = torch.stack((correct_MLB.sum(-1), ce_MLB.sum(-1)))
        sums_2ML = batch_2ML if sums_2ML is None else sums_2ML + batch_2ML
    if sums_2ML is None:  # more ranks than batches
        shape = (2, len(task.members), len(task.heads.row_names) + 1)
        sums_2ML = torch.zeros(shape, dtype=torch.float64, device=task.ranks.device)
    task.ranks.all_reduce([sums_2ML])
    accuracy_ML, cross_entropy_ML = sums_2ML.cpu() / len(split)
    return accuracy_ML, cross_entropy_ML


def _my_batches(task: "PackTask", split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of this rank's share of the batches, on its device."""
    order = list(range(len(split)))
    batches = [order[i : i + _BATCH_SIZE] for i in range(0, len(order), _BATCH_SIZE)]
    for _, images, labels in load_batches(split, task.ranks.share(batches)):
        yield images.to(task.ranks.device), labels.to(task.ranks.device)


def _add_batch(task: "JeiDnnTask", total: dict[str, Tensor], images: Tensor, labels_B: Tensor) -> None:
    logits_MLBK, gates_MGB = task.forward(images)
    ce_MLB = cross_entropies(logits_MLBK, labels_B)
    errors_MLB = prediction_errors(logits_MLBK, labels_B, task.method.gate_objective)
    correct_MLB = logits_MLBK.argmax(-1) == labels_B
    exit_MB = exit_index_from_gates(gates_MGB)
    targets_MB = gate_targets(errors_MLB, task.cost_L, task.tradeoff_M)
    taken_M1B = exit_MB[:, None, :]
    total["exit_correct"] += correct_MLB.sum(-1)
    total["targets"] += _counts(targets_MB, len(task.cost_L))
    total["exits"] += _counts(exit_MB, len(task.cost_L))
    total["cross_entropy"] += ce_MLB.gather(1, taken_M1B).to(torch.float64).sum((1, 2))
    total["correct"] += correct_MLB.gather(1, taken_M1B).sum((1, 2))
    total["count"] += len(labels_B)


def _counts(index_MB: Tensor, num_exits: int) -> Tensor:
    return torch.nn.functional.one_hot(index_MB, num_exits).sum(1)
