"""DyCE: several head types at every position of a frozen backbone, trained as ImageNet classifiers usually are.

Source: Wang et al., DyCE (arXiv 2403.01695); where its published code weighs the loss by a confidence that it trains
too, the confidence is held constant here and the first exit has a loss of its own.
Shapes: M members, R rows of heads, B batch, K classes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor

from dynexit.core.losses import divergences, first_exit_weights, soft_cross_entropies
from dynexit.data import Batch
from dynexit.study.methods import DyceSettings
from dynexit.train.independent import IndependentTask
from dynexit.train.optimizers import MemberAdam, Stack, cosine_rate
from dynexit.train.pack import Pack


class DyceTask(IndependentTask):
    """AdamW with warm-up and cosine, mixup or cutmix, a moving average of the weights; as the loop's Task.

    With a moving average it is what is evaluated and kept.
    """

    rate_key = "dyce.learning_rate"

    def __init__(self, pack: Pack, method: DyceSettings) -> None:
        super().__init__(
            pack,
            make_optimizer=lambda stack: MemberAdam(stack, method.weight_decay, decoupled=True),
            initialisation="truncated_normal",
        )
        self.method = method
        self.num_head_types = len(pack.costs.head_types)
        self.num_warm_up_steps = method.num_warm_up_epochs * pack.steps_per_epoch
        self.num_classes = pack.model.backbone.num_classes
        self.average = ModelEmaV3(self.heads, decay=method.ema_decay, use_warmup=True) if method.ema_decay else None
        self.mixup = Mixup(  # type: ignore[no-untyped-call]
            mixup_alpha=method.mixup,
            cutmix_alpha=method.cutmix,
            label_smoothing=method.label_smoothing,
            num_classes=self.num_classes,
        )
        self.mixup.mixup_enabled = method.mixup > 0 or method.cutmix > 0

    def train_step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """One update of every member's heads from one pass of the backbone over the mixed images."""
        _, images, labels_B = batch
        mixed, target_BK = self._mix(images, labels_B)
        loss_M = self._head_step(*self._features(mixed), target_BK.to(self.dtype), share)
        if self.average is not None:
            self.settle()
            self.average.update(self.heads, step=self.step_number)
        self.step_number += 1
        return {self.terms[0]: loss_M}

    def _mix(self, images: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Images and their class probabilities after mixup or cutmix, the same for all members; of an odd number of
        images the last stays as it is."""
        even = len(labels_B) // 2 * 2
        with _numpy_seeded((self.seed, self.step_number, self.ranks.global_rank)):
            mixed, target_BK = self.mixup(images[:even].clone(), labels_B[:even])
        smoothing = self.method.label_smoothing
        rest_BK = mixup_target(labels_B[even:], self.num_classes, 1.0, smoothing)  # type: ignore[no-untyped-call]
        return torch.cat((mixed, images[even:])), torch.cat((target_BK, rest_BK))

    def _loss(self, logits_MRBK: Tensor, final_BK: Tensor, target: Tensor) -> Tensor:
        """Sum over the heads of the mean loss over the batch, (M,); `target` are class probabilities (B, K)."""
        if self.method.loss == "distill":
            losses_MRB = divergences(logits_MRBK, final_BK)
        else:
            losses_MRB = soft_cross_entropies(logits_MRBK, target)
        if self.method.loss == "weighted":
            losses_MRB = losses_MRB * first_exit_weights(logits_MRBK, self.num_head_types)
        return (losses_MRB + self._distilled(logits_MRBK, final_BK)).mean(-1).sum(-1)

    def _learning_rate(self, part: str, members: Tensor | None) -> Tensor:
        high, low = self.method.learning_rate, self.method.min_learning_rate
        return self._everyones(cosine_rate(self.step_number, self.num_steps, high, low, self.num_warm_up_steps))

    def current(self) -> dict[str, Stack]:
        return super().current() if self.average is None else {"heads": self.average.module.blocks()}

    def _stacks(self) -> dict[str, Stack]:
        average = {} if self.average is None else {"average": self.heads.by_name(self.current()["heads"])}
        return {**super()._stacks(), **average}


@contextlib.contextmanager
def _numpy_seeded(words: Sequence[int]) -> Iterator[None]:
    """timm's mixup draws from numpy's global generator: within, its state follows from `words` alone."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(np.random.SeedSequence(words).generate_state(4))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
