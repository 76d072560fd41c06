"""Fits a backbone to a data set, all of its weights, as the loop's Task."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynexit.config import Prepare
from dynexit.data import Batch, Split, load_batches
from dynexit.dist import Ranks
from dynexit.errors import Failure
from dynexit.models.backbones import Backbone

_BATCH_SIZE = 256


class TransferTask:
    """Training of `backbone` on images: learning rate by step (warm-up, cosine), gradients summed over ranks."""

    def __init__(
        self, backbone: Backbone, settings: Prepare, steps_per_epoch: int, seed: int, validation: Split, ranks: Ranks
    ) -> None:
        self.backbone, self.settings, self.seed = backbone, settings, seed
        self.validation, self.ranks = validation, ranks
        self.parameters = [p for p in backbone.model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, settings)
        self.num_warm_up_steps = settings.num_warm_up_epochs * steps_per_epoch
        self.num_steps = settings.num_epochs * steps_per_epoch
        self.step_number = 0
        self.rows: list[dict[str, Any]] = []
        self.loss_sum = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # sum, count

    def train_step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """One step on this rank's `share` of a batch."""
        _, images, labels = batch
        self.backbone.model.train()
        # what is random in the model (dropout) follows from the step alone, so a resumed run draws the same
        torch.manual_seed((self.seed * 1_000_003 + self.step_number) * 4096 + self.ranks.global_rank)
        loss = functional.cross_entropy(
            self.backbone.model(images), labels, label_smoothing=self.settings.label_smoothing
        )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss * share)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.ranks.sum_(gradients)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.step_number += 1
        self.loss_sum += torch.stack(
            (loss.detach().to(torch.float64) * len(labels), self.loss_sum.new_tensor(len(labels)))
        )
        return {"loss": loss.detach()}

    def learning_rate(self) -> float:
        """The rate of the next step: linear up to the peak, then half a cosine down to 0."""
        peak, step = self.settings.learning_rate, self.step_number
        if step < self.num_warm_up_steps:
            return peak * (step + 1) / self.num_warm_up_steps
        progress = (step - self.num_warm_up_steps) / max(self.num_steps - self.num_warm_up_steps, 1)
        return peak * (1 + math.cos(math.pi * progress)) / 2

    def end_epoch(self, epoch: int) -> None:
        """Notes the epoch's loss and the accuracy on validation. Raises Failure where the loss is not finite."""
        self.ranks.sum_([self.loss_sum])
        loss = (self.loss_sum[0] / self.loss_sum[1]).item()
        if not math.isfinite(loss):
            raise Failure(
                f"the backbone's loss was {loss} in epoch {epoch}; lower prepare.learning_rate or mend the data"
            )
        self.loss_sum.zero_()
        accuracy = classify(self.backbone, self.validation, self.ranks)
        self.rows.append({"epoch": epoch, "loss": loss, "validation_accuracy": accuracy})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"model.{name}": value for name, value in self.backbone.model.state_dict().items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in slots.items() if value is not None
            }
        tensors["loss_sum"] = self.loss_sum
        return tensors, {"step_number": self.step_number, "rows": self.rows}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        model = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        self.backbone.model.load_state_dict(model)
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, slot = name.split(".", 2)
                slots.setdefault(int(i), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.loss_sum.copy_(tensors["loss_sum"])
        self.step_number, self.rows = facts["step_number"], list(facts["rows"])


def _optimizer(parameters: list[torch.nn.Parameter], settings: Prepare) -> torch.optim.Optimizer:
    """Weight decay acts on matrices and kernels, not on biases and norms."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)


@torch.no_grad()
def classify(backbone: Backbone, split: Split, ranks: Ranks) -> float:
    """Accuracy of the whole backbone on `split`, each rank taking its share of the batches."""
    backbone.model.eval()
    correct_count = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    order = list(range(len(split)))
    batches = [order[i : i + _BATCH_SIZE] for i in range(0, len(order), _BATCH_SIZE)]
    for _, images, labels in load_batches(split, ranks.share(batches)):
        predictions = backbone.model(images.to(ranks.device)).argmax(1).cpu()
        correct_count += torch.tensor([(predictions == labels).sum(), len(labels)], device=ranks.device)
    ranks.sum_([correct_count])
    return (correct_count[0] / correct_count[1]).item()
