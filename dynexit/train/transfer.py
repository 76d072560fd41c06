"""Fits a backbone to a data set, all of its weights or what of them is not frozen, as the loop's Task."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dynexit.data import Batch, Split, load_batches
from dynexit.dist import Ranks
from dynexit.errors import Failure, UserError
from dynexit.models.backbones import Backbone
from dynexit.study.schema import PrepareSettings
from dynexit.train.optimizers import cosine_rate, parameter_groups
from dynexit.train.parallel import Updates, WholeModel, ZeroModel

_BATCH_SIZE = 256


def freeze(backbone: Backbone, names: Iterable[str]) -> list[nn.Module]:
    """Freezes the weights and modules of these names; returns the modules, whose statistics are to stay too.

    Raises UserError for a name of neither, and where no weight is left to train.
    """
    modules, weights = dict(backbone.model.named_modules()), dict(backbone.model.named_parameters())
    frozen = []
    for name in names:
        if name in weights:
            weights[name].requires_grad_(False)
        elif name and name in modules:
            frozen.append(modules[name].requires_grad_(False))
        else:
            near = difflib.get_close_matches(name, [*weights, *modules], n=1, cutoff=0.0)
            raise UserError(
                f"prepare.frozen: {backbone.name} has no weight or module {name!r}; the nearest name is {near[0]!r}"
            )
    if not any(weight.requires_grad for weight in weights.values()):
        raise UserError("prepare.frozen: no weight is left to train; set prepare.num_epochs=0 to take them as they are")
    return frozen


def refuse_single_images(backbone: Backbone, settings: PrepareSettings, num_images: int, ranks: Ranks) -> None:
    """Raises UserError where an epoch's last batch leaves a rank with one image that a batch norm cannot use."""
    last = num_images % settings.global_batch_size or settings.global_batch_size
    if settings.num_epochs == 0 or last // ranks.world_size > 1:
        return
    frozen = freeze(backbone, settings.frozen)
    _train_mode(backbone, frozen)
    cut = backbone.shapes_only()
    backbone.eval()
    with _single_images(settings), torch.no_grad():
        h = cut.stem(backbone.blank())
        for block in cut.blocks:
            h = block(h)
        cut.tail(h)


@contextlib.contextmanager
def _single_images(settings: PrepareSettings) -> Iterator[None]:
    """What a batch norm says of a single value in UserError's words."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"prepare.global_batch_size = {settings.global_batch_size}: leaves a rank with a single image at "
            "once, from which a batch norm learns nothing; change it, or prepare.micro_batch_size"
        ) from error


def _train_mode(backbone: Backbone, frozen: Sequence[nn.Module]) -> None:
    backbone.model.train()
    for module in frozen:
        module.eval()


class TransferTask:
    """Training of `backbone` on images: learning rate by step (warm-up, cosine), gradients summed over ranks.

    A rank's share of a batch passes in micro-batches, each weighted by its count. Batch norms normalise by what passes
    at once. With `deepspeed_stage` and several ranks the backbone is divided among them.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: PrepareSettings,
        steps_per_epoch: int,
        seed: int,
        validation: Split,
        ranks: Ranks,
        deepspeed_stage: int | None = None,
    ) -> None:
        self.backbone, self.settings, self.seed = backbone, settings, seed
        self.validation, self.ranks = validation, ranks
        self.frozen = freeze(backbone, settings.frozen) if settings.num_epochs else []
        groups = parameter_groups(backbone, settings)
        self.updates: Updates
        if deepspeed_stage is None or ranks.world_size == 1:  # alone there is nobody to divide with
            self.updates = WholeModel(backbone.model, groups, settings, ranks)
        else:
            self.updates = ZeroModel(backbone.model, groups, settings, ranks, deepspeed_stage)
        self.num_warm_up_steps = settings.num_warm_up_epochs * steps_per_epoch
        self.num_steps = settings.num_epochs * steps_per_epoch
        self.step_number = 0
        self.rows: list[dict[str, Any]] = []
        self.loss_sum = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # sum, count
        # by rank the first step whose loss was not finite, counted from 1; of this rank alone until it is asked for
        self.not_finite = torch.zeros(ranks.world_size, dtype=torch.int64, device=ranks.device)

    def begin(self) -> None:
        """Nothing comes before the first batch."""

    def train_step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """One step on this rank's `share` of a batch."""
        _, images, labels = batch
        _train_mode(self.backbone, self.frozen)
        # what is random in the model (dropout) follows from the step alone, so a resumed run draws the same
        torch.manual_seed((self.seed * 1_000_003 + self.step_number) * 4096 + self.ranks.global_rank)
        total = self.loss_sum.new_zeros(())
        for part, answers, weight, last in self._micro_batches(images, labels):
            if not weight:
                self.backbone.model.eval()  # no statistics of what is blank
            loss = functional.cross_entropy(self._logits(part), answers, label_smoothing=self.settings.label_smoothing)
            self.updates.backward(loss * (share * weight), last=last)
            total += loss.detach().to(torch.float64) * (len(labels) * weight)
        _train_mode(self.backbone, self.frozen)
        self.updates.step(share, self.learning_rate())
        self.step_number += 1
        mine = self.not_finite[self.ranks.global_rank]
        mine.copy_(torch.where((mine == 0) & ~total.isfinite(), self.step_number, mine))
        self.loss_sum += torch.stack((total, torch.full_like(total, len(labels))))
        return {"loss": total / max(len(labels), 1)}

    def _logits(self, images: Tensor) -> Tensor:
        with _single_images(self.settings):
            return self.updates.logits(images)

    def _micro_batches(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, float, bool]]:
        """(Images, labels, part of this rank's share, whether it is the last) of what passes through the model at once.

        The parts are as equal as can be, since batch norm has no use for a single image that is left over.
        Where ranks must run the model equally often, blank images that weigh nothing make up for what is missing.
        """
        most = len(labels)
        if self.updates.lockstep:
            total = torch.tensor([len(labels)], device=self.ranks.device)
            self.ranks.all_reduce([total])
            most = -(-int(total) // self.ranks.world_size)
        count = -(-most // (self.settings.micro_batch_size or max(most, 1)))
        parts = zip(images.tensor_split(count), labels.tensor_split(count), strict=True) if count else ()
        for i, (part, answers) in enumerate(parts, 1):
            weight = len(answers) / max(len(labels), 1)
            if not len(answers):
                part, answers = images.new_zeros(2, *self.backbone.input_size), labels.new_zeros(2)
            yield part, answers, weight, i == count

    def learning_rate(self) -> float:
        """The head's rate at the next step: linear up to the peak, then half a cosine."""
        settings = self.settings
        return cosine_rate(
            self.step_number, self.num_steps, settings.learning_rate, settings.min_learning_rate, self.num_warm_up_steps
        )

    def end_epoch(self, epoch: int) -> None:
        """Notes the epoch's loss and the accuracy on validation. Raises Failure where the loss is not finite."""
        self._refuse_losses_that_are_not_finite()
        self.ranks.all_reduce([self.loss_sum])
        loss = (self.loss_sum[0] / self.loss_sum[1]).item()
        self.loss_sum.zero_()
        self.rows.append({"epoch": epoch, "loss": loss, "validation_accuracy": self.accuracy()})

    def _refuse_losses_that_are_not_finite(self) -> None:
        by_rank = self.not_finite.clone()
        self.ranks.all_reduce([by_rank])
        found = [(step, rank) for rank, step in enumerate(by_rank.tolist()) if step]
        if found:
            step, rank = min(found)
            raise Failure(
                f"the backbone's loss was not finite at step {step - 1} on rank {rank}; lower prepare.learning_rate, "
                "or fix the data or the weights it started from"
            )

    @torch.no_grad()
    def accuracy(self, split: Split | None = None) -> float:
        """Accuracy of the whole backbone on validation, or on as many samples of `split`, evenly spread.

        Each rank takes its share of every batch; called on all.
        """
        self.backbone.model.eval()
        correct_count = torch.zeros(2, dtype=torch.int64, device=self.ranks.device)
        split = self.validation if split is None else split
        order = list(range(0, len(split), -(-len(split) // len(self.validation))))
        batches = [self.ranks.share(order[i : i + _BATCH_SIZE]) for i in range(0, len(order), _BATCH_SIZE)]
        for _, images, labels in load_batches(split, batches, ranks=self.ranks):
            if not len(labels):
                if self.updates.lockstep:
                    self.updates.evaluate(images.new_zeros(1, *self.backbone.input_size))
                continue
            predictions = self.updates.evaluate(images).argmax(1)
            correct_count[0] += (predictions == self.ranks.to_device(labels)).sum()
            correct_count[1] += len(labels)
        self.ranks.all_reduce([correct_count])
        return (correct_count[0] / correct_count[1]).item()

    def weights(self) -> dict[str, Tensor]:
        """The backbone's weights as they are kept, whole on the main rank; to be called on all of them."""
        return self.updates.weights()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resumed run needs. Raises Failure in place of saving weights that a loss has spoilt."""
        self._refuse_losses_that_are_not_finite()
        tensors = {f"model.{name}": value for name, value in self.updates.weights().items()}
        inner, facts = self.updates.state()
        tensors |= {f"optimizer.{name}": value for name, value in inner.items()}
        tensors["loss_sum"] = self.loss_sum if self.ranks.world_size == 1 else self._whole_loss_sum()
        layout = self.updates.layout
        return tensors, {"step_number": self.step_number, "rows": self.rows, "layout": layout, "updates": facts}

    def _whole_loss_sum(self) -> Tensor:
        total = self.loss_sum.clone()
        self.ranks.all_reduce([total])
        return total

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        layout = facts.get("layout", "whole")
        if layout != self.updates.layout:
            raise UserError(
                f"the checkpoint was left by a run whose model lay {layout}, and now it would lie "
                f"{self.updates.layout}: go on with the same dist.deepspeed_stage and number of ranks, or remove its "
                "folder"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = value
        self.updates.restore(parts["model"], parts["optimizer"], facts.get("updates", {}))
        self.loss_sum.copy_(tensors["loss_sum"] if self.ranks.is_main else torch.zeros(2))
        self.step_number, self.rows = facts["step_number"], list(facts["rows"])
