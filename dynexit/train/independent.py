"""Plain deep supervision: every exit head has its own cross-entropy and takes no notice of the others; no gates.

The other methods without gates differ from this one in the loss, the heads or the optimizer.
Shapes: M members, R rows of heads, L exits (those, then the backbone's classifier), B batch, K classes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynexit.core.losses import cross_entropies
from dynexit.data import Batch
from dynexit.study.methods import BoostedSettings
from dynexit.train.evaluate import evaluate_exits, finite_or_none
from dynexit.train.optimizers import cosine_rate, leaves
from dynexit.train.pack import MakeOptimizer, Pack, PackTask


class IndependentTask(PackTask):
    """The training of a pack's heads, as the loop's Task; the rate is a cosine over all steps."""

    def __init__(
        self, pack: Pack, method: object = None, make_optimizer: MakeOptimizer | None = None, **heads: Any
    ) -> None:
        super().__init__(pack, **heads)
        self.num_steps = self.settings.num_epochs * pack.steps_per_epoch
        self._add("heads", self.heads, make_optimizer)

    def train_step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """One update of every member's heads from one pass of the backbone."""
        _, images, labels_B = batch
        loss_M = self._head_step(*self._features(images), labels_B, share)
        self.step_number += 1
        return {self.terms[0]: loss_M}

    def _head_step(self, features: list[Tensor], final_BK: Tensor, target: Tensor, share: float) -> Tensor:
        heads = leaves(self.optimizers["heads"].stack, None)
        loss_M = self._loss(self._logits(heads, features, None), final_BK, target)
        self._update("heads", heads, loss_M, None, share, 0)
        return loss_M.detach()

    def _loss(self, logits_MRBK: Tensor, final_BK: Tensor, target: Tensor) -> Tensor:
        """Sum over the heads of the mean loss over the batch, (M,); `target` is what a batch is trained on (labels)."""
        losses_MRB = cross_entropies(logits_MRBK, target) + self._distilled(logits_MRBK, final_BK)
        return losses_MRB.mean(-1).sum(-1)

    def _learning_rate(self, part: str, members: Tensor | None) -> Tensor:
        high, low = self.settings.learning_rate, self.settings.min_learning_rate
        return self._everyones(cosine_rate(self.step_number, self.num_steps, high, low))

    def _everyones(self, rate: float) -> Tensor:
        return torch.full((len(self.members),), rate, dtype=self.dtype, device=self.ranks.device)

    def end_epoch(self, epoch: int) -> None:
        """Evaluates on validation and keeps the best: the lowest mean cross-entropy over the heads."""
        self.settle()
        accuracy_ML, cross_entropy_ML = evaluate_exits(self, self.validation)
        objective_M = cross_entropy_ML[:, :-1].mean(-1)
        self._keep_better(objective_M, self.alive_M)
        losses, improved = self.losses.take(), (self.improved_M & self.alive_M.cpu()).tolist()
        for i, accuracy_L in enumerate(accuracy_ML.tolist()):
            mean = finite_or_none(objective_M[i].item())
            figures = {"exit_accuracy": accuracy_L, "validation_mean_cross_entropy": mean}
            self.rows.append({"member": i, "epoch": epoch, **figures, **losses[i], "improved": improved[i]})
        self._report_stopped()


class BoostedTask(IndependentTask):
    """BoostedNet on a frozen backbone: each exit learns what the exits before it left undone.

    The logits of exit k are its head's plus `shrinkage` times those of exit k-1, held constant; StackedHeads adds them
    up, so training, recording and inference see the same sums. With a frozen backbone the published rescaling of
    gradients has nothing to act on. Source: Yu et al., Boosted Dynamic Neural Networks (arXiv 2211.16726), section 3.
    """

    def __init__(self, pack: Pack, method: BoostedSettings) -> None:
        super().__init__(pack, shrinkage=method.shrinkage)
