"""What the members of a pack do on a split: sums and counts first, over all ranks; division last.

Shapes: M members, L exits, G = L-1 gates, B batch, K classes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dynexit.core.exit_policy import exit_index_from_gates
from dynexit.core.losses import cross_entropies
from dynexit.data import Split, load_batches
from dynexit.train.pack import PackTask

Gating = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From images and their labels: logits (M, L, B, K), gate outputs (M, G, B), gate targets (M, B) of current weights."""

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
def evaluate_gates(task: PackTask, split: Split, gating: Gating, cost_L: Tensor) -> Evaluation:
    """Figures of every member's current weights on `split`; `cost_L` is each exit's cost over that of the last."""
    costs = task.costs
    num_members, num_exits = len(task.members), len(cost_L)

    def sums_of(images: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        logits_MLBK, gates_MGB, targets_MB = gating(images, labels_B)
        ce_MLB = cross_entropies(logits_MLBK, labels_B)
        correct_MLB = logits_MLBK.max(-1).indices == labels_B
        exit_MB = exit_index_from_gates(gates_MGB)
        taken_M1B = exit_MB[:, None, :]
        return {
            "exit_correct_ML": correct_MLB.sum(-1),
            "targets_ML": _counts(targets_MB, num_exits),
            "exits_ML": _counts(exit_MB, num_exits),
            "cross_entropy_M": ce_MLB.gather(1, taken_M1B).to(torch.float64).sum((1, 2)),
            "correct_M": correct_MLB.gather(1, taken_M1B).sum((1, 2)),
        }

    per_exit, per_member = (num_members, num_exits), (num_members,)
    sizes = {"exit_correct_ML": per_exit, "targets_ML": per_exit, "exits_ML": per_exit}
    total = _sums_over(task, split, {**sizes, "cross_entropy_M": per_member, "correct_M": per_member}, sums_of)
    exits_ML = total["exits_ML"]
    count = exits_ML.new_tensor(len(split))
    macs_L = torch.from_numpy(costs.macs_L()).to(exits_ML)
    figures = {
        "exit_accuracy_ML": total["exit_correct_ML"] / count,
        "target_counts_ML": total["targets_ML"],
        "exit_counts_ML": exits_ML,
        "cross_entropy_M": total["cross_entropy_M"] / count,
        "accuracy_M": total["correct_M"] / count,
        "relative_cost_M": exits_ML @ cost_L.to(torch.float64) / count,
        "relative_macs_M": exits_ML @ macs_L / (count * costs.full_macs),
    }
    return Evaluation(**{name: value.cpu() for name, value in figures.items()})


@torch.no_grad()
def evaluate_exits(task: PackTask, split: Split) -> tuple[Tensor, Tensor]:
    """(accuracy, mean cross-entropy) of every member's exits on `split`, both (M, L) float64 on the CPU."""

    def sums_of(images: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        logits_MLBK = task.exit_logits(images)
        ce_MLB = cross_entropies(logits_MLBK, labels_B).to(torch.float64)
        return {"correct_ML": (logits_MLBK.max(-1).indices == labels_B).sum(-1), "cross_entropy_ML": ce_MLB.sum(-1)}

    per_exit = (len(task.members), len(task.heads.row_names) + 1)
    total = _sums_over(task, split, {"correct_ML": per_exit, "cross_entropy_ML": per_exit}, sums_of)
    return total["correct_ML"].cpu() / len(split), total["cross_entropy_ML"].cpu() / len(split)


def _sums_over(
    task: PackTask,
    split: Split,
    sizes: Mapping[str, tuple[int, ...]],
    sums_of: Callable[[Tensor, Tensor], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """The sums of `sums_of` (images, labels) over the split, of these sizes, in float64, the same on every rank."""
    ranks = task.ranks
    total = {name: torch.zeros(size, dtype=torch.float64, device=ranks.device) for name, size in sizes.items()}
    order = list(range(len(split)))
    batches = [order[i : i + _BATCH_SIZE] for i in range(0, len(order), _BATCH_SIZE)]
    for _, images, labels_B in load_batches(split, ranks.share(batches), ranks=ranks):
        for name, value in sums_of(images, ranks.to_device(labels_B)).items():
            total[name] += value
    ranks.all_reduce(total.values())
    return total


def _counts(index_MB: Tensor, num_exits: int) -> Tensor:
    return torch.nn.functional.one_hot(index_MB, num_exits).sum(1)
