"""L2W-DEN on a frozen backbone: samples are weighed by a small network that learns what helps once samples leave early.

Every `meta_interval` batches the heads take a step ahead on one half of the batch, the other half is allotted to exits
by confidence as at inference, and the network is moved so that those samples' loss falls; then the heads take their
real step, and the halves change places. Several ranks each halve and look ahead on their own share.
Source: Han et al., Learning to Weight Samples for Dynamic Early-exiting Networks (arXiv 2209.08310), section 3.
Shapes: M members, G exits with heads, B batch, K classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dynexit.core.confidence import max_probability
from dynexit.core.losses import cross_entropies
from dynexit.data import Batch
from dynexit.models.heads import StackedHeads
from dynexit.study.methods import WeightedSettings
from dynexit.train.independent import IndependentTask
from dynexit.train.optimizers import MemberAdam, MemberSGD, Stack, leaves
from dynexit.train.pack import Pack

HeadInputs = tuple[list[Tensor], Tensor, Tensor]  # what the exits read, the backbone's logits, labels

_OTHER_SEEDS = 2**31  # above every seed of a study, so the network shares no initial value with a head


class WeightedTask(IndependentTask):
    """Weighted deep supervision, as the loop's Task; the weighting network is a part of each member's state."""

    terms = ("head loss", "meta loss")

    def __init__(self, pack: Pack, method: WeightedSettings) -> None:
        super().__init__(pack)
        self.method = method
        num_exits = len(pack.model.positions)
        shape = [f"mlp2x{method.hidden_width}"]
        seeds = [_OTHER_SEEDS + seed for seed in self.seeds]
        self.network = StackedHeads([num_exits], [0], shape, num_exits, seeds)
        self._add("weighting", self.network, lambda stack: MemberAdam(stack, method.weight_decay, decoupled=False))

    def train_step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """One update of every member's heads from one pass of the backbone; at its time two, and two of the network."""
        _, images, labels_B = batch
        features, final_BK = self._features(images)
        figures: dict[str, Tensor] = {}
        if self.step_number % self.method.meta_interval == 0 and self._can_be_halved(len(labels_B), share):
            half = len(labels_B) // 2
            halves = [_part(features, final_BK, labels_B, part) for part in (slice(half), slice(half, None))]
            for mine, other in (halves, halves[::-1]):
                self.settle()
                figures[self.terms[1]] = self._meta_step(mine, other, share)
                self.settle()
                loss_M = self._head_step(*mine, share)
        else:
            loss_M = self._head_step(features, final_BK, labels_B, share)
        self.step_number += 1
        return {self.terms[0]: loss_M, **figures}

    def _can_be_halved(self, size: int, share: float) -> bool:
        """Whether every rank has two samples of the batch; the same answer everywhere."""
        return share > 0 and round(size / share) >= 2 * self.ranks.world_size

    def _loss(self, logits_MGBK: Tensor, final_BK: Tensor, target: Tensor) -> Tensor:
        ce_MGB = cross_entropies(logits_MGBK, target)
        with torch.no_grad():
            weight_MGB = self._weights(self.optimizers["weighting"].stack, ce_MGB)
        return (weight_MGB * ce_MGB + self._distilled(logits_MGBK, final_BK)).mean(-1).sum(-1)

    def _weights(self, network: Stack, ce_MGB: Tensor) -> Tensor:
        """The weight (M, G, B) of every sample at every exit, 1 on average over a batch's samples and exits."""
        inputs_MBG = ce_MGB.detach().transpose(1, 2)
        output_MBG: Tensor = self.network([inputs_MBG], blocks=network)[:, 0].tanh()
        centred_MBG = output_MBG - output_MBG.mean((1, 2), keepdim=True)
        return 1 + self.method.strength * centred_MBG.transpose(1, 2)

    def _meta_step(self, mine: HeadInputs, other: HeadInputs, share: float) -> Tensor:
        heads, network = leaves(self.optimizers["heads"].stack, None), leaves(self.optimizers["weighting"].stack, None)
        features, final_BK, labels_B = mine
        logits_MGBK = self._logits(heads, features, None)
        ce_MGB = cross_entropies(logits_MGBK, labels_B, twice=True)
        losses_MGB = self._weights(network, ce_MGB) * ce_MGB + self._distilled(logits_MGBK, final_BK)
        gradients = torch.autograd.grad(losses_MGB.mean(-1).sum(), list(heads.values()), create_graph=True)
        ahead = self._ahead(heads, dict(zip(heads, gradients, strict=True)))
        loss_M = self._allotted_loss(self._logits(ahead, other[0], None), other[2])
        self._update("weighting", network, loss_M, None, share, 1)
        return loss_M.detach()

    def _ahead(self, heads: Stack, gradients: Stack) -> Stack:
        """The heads after the step that the optimizer would take, as a function of the gradients."""
        optimizer = self.optimizers["heads"]
        assert isinstance(optimizer, MemberSGD)
        rate_M = self._learning_rate("heads", None)
        ahead = {}
        for name, value in heads.items():
            old = value.detach()
            moved = optimizer.momentum * optimizer.momenta[name] + gradients[name] + optimizer.weight_decay * old
            ahead[name] = old - rate_M.view((1, -1) + (1,) * (old.dim() - 2)) * moved
        return ahead

    def _allotted_loss(self, logits_MGBK: Tensor, labels_B: Tensor) -> Tensor:
        """Sum over the exits of the mean cross-entropy of the samples allotted to each, (M,)."""
        mine_MGB = allotment(max_probability(logits_MGBK.detach()), self.method.exit_ratio)
        ce_MGB = torch.where(mine_MGB, cross_entropies(logits_MGBK, labels_B), 0.0)
        return (ce_MGB.sum(-1) / mine_MGB.sum(-1).clamp_min(1)).sum(-1)

    def _learning_rate(self, part: str, members: Tensor | None) -> Tensor:
        if part == "weighting":
            return self._everyones(self.method.learning_rate)
        return super()._learning_rate(part, members)


def allotment(confidence_MGB: Tensor, ratio: float) -> Tensor:
    """Which exit takes which sample, (M, G, B) bool; who is taken by none is left to the last exit.

    Exits choose in order, of the samples not yet taken the most confident, ties by place in the batch. Exit k = 1..G+1
    takes floor(B f_k) of them, f_k proportional to ratio^k.
    """
    num_gates, size = confidence_MGB.shape[-2:]
    powers = [ratio**k for k in range(1, num_gates + 2)]
    mine_MGB = torch.zeros_like(confidence_MGB, dtype=torch.bool)
    for k in range(num_gates):
        left_MB = confidence_MGB[:, k].masked_fill(mine_MGB.any(1), -1.0)
        order_MB = left_MB.argsort(dim=-1, descending=True, stable=True)
        mine_MGB[:, k].scatter_(1, order_MB[:, : int(size * powers[k] / sum(powers))], True)
    return mine_MGB


def _part(features: list[Tensor], final_BK: Tensor, labels_B: Tensor, part: slice) -> HeadInputs:
    return [feature[part] for feature in features], final_BK[part], labels_B[part]
