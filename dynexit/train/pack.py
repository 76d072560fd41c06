"""What the training of a pack is, whatever the method: members side by side, one pass of the backbone a batch.

Shapes: M members of the pack, m chosen members, L exits, P positions, B batch, K classes.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynexit.core.cost import ExitCosts
from dynexit.core.losses import divergences
from dynexit.core.standardisation import Standardisation
from dynexit.data import Batch, Split
from dynexit.dist import Ranks
from dynexit.models.heads import Stacked, StackedHeads
from dynexit.models.multi_exit import MultiExit, features_in_parts
from dynexit.models.standardised import empty_moments, standardisation_by
from dynexit.progress import Progress
from dynexit.study.schema import ExitsSettings, TrainSettings
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.loop import EpochLosses, fit, pass_over
from dynexit.train.optimizers import (
    MemberAdam,
    MemberSGD,
    Stack,
    clone,
    copy_members,
    finite_members,
)

_PLAIN_BATCH_SIZE = 256

MakeOptimizer = Callable[[Stack], MemberSGD | MemberAdam]


@dataclasses.dataclass(frozen=True)
class Member:
    """One point of a pack: the seed of its heads and gates, a name for messages, its method's settings (or None)."""

    seed: int
    name: str
    settings: Any = None


@dataclasses.dataclass(frozen=True)
class Pack:
    """Points that are trained together, and what with.

    `num_train` is the number of samples of an epoch, `seed` that of the data, `exits` how features are standardised.
    """

    model: MultiExit
    costs: ExitCosts
    members: Sequence[Member]
    settings: TrainSettings
    validation: Split
    ranks: Ranks
    num_train: int = 1
    seed: int = 0
    plain_train: Split | None = None
    """The training images without augmentation: what statistics of features and probes are taken from."""
    exits: ExitsSettings = dataclasses.field(default_factory=ExitsSettings)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_train // self.settings.global_batch_size)


class PackTask:
    """The heads of every member, their optimizer, what is kept of them, and which members have been stopped.

    A method adds `train_step` and `end_epoch`, and modules and optimizers of its own, by `_add`.
    """

    terms: tuple[str, ...] = ("head loss",)  # what may turn out not finite, for messages
    rate_key = "train.learning_rate"
    _plain_tensors: tuple[str, ...] = ("best_objective_M", "alive_M", "stopped_at_M")

    def __init__(self, pack: Pack, *, initialisation: str = "uniform", shrinkage: float = 0.0) -> None:
        model, ranks, settings = pack.model, pack.ranks, pack.settings
        self.model, self.members, self.settings = model, list(pack.members), settings
        self.validation, self.ranks, self.seed, self.costs = pack.validation, ranks, pack.seed, pack.costs
        self.dtype = {"float32": torch.float32, "float64": torch.float64}[settings.precision]
        self.optimizers: dict[str, MemberSGD | MemberAdam] = {}
        self.modules: dict[str, Stacked] = {}
        self.best: dict[str, Stack] = {}
        self.seeds = [member.seed for member in pack.members]
        self.heads = StackedHeads(
            model.feature_dims,
            model.positions,
            pack.costs.head_types,
            model.backbone.num_classes,
            self.seeds,
            initialisation,
            shrinkage,
        )
        num_members = len(self.members)
        self.best_objective_M = torch.full((num_members,), math.inf, dtype=torch.float64)
        self.alive_M = torch.ones(num_members, dtype=torch.bool, device=ranks.device)
        self.stopped_at_M = torch.full((num_members, 3), -1, dtype=torch.int64, device=ranks.device)  # step, term, rank
        self.losses = EpochLosses(num_members, self.terms, ranks.device)
        self.improved_M = torch.zeros(num_members, dtype=torch.bool)  # by the epoch that was evaluated last
        self.stopped: dict[int, str] = {}
        self.rows: list[dict[str, Any]] = []
        self.step_number = 0
        self._at_once = settings.micro_batch_size
        self._slopes: dict[float, Tensor] = {}
        self.plain_train, self.exits = pack.plain_train, pack.exits
        self.standardisations: list[Standardisation] | None = None
        """By position; heads are trained on what they make of features, and folded into the heads that are kept."""
        self.progress = Progress("", Path(), quiet=True)
        self._finish_update: Callable[[], None] | None = None

    def _add(self, part: str, module: Stacked, make_optimizer: MakeOptimizer | None = None) -> None:
        """Makes `module` a part that is trained (by SGD if nothing else is given), kept and restored."""
        self.modules[part] = module.to(self.ranks.device, self.dtype)
        stack = module.blocks()
        sgd = MemberSGD(stack, self.settings.momentum, self.settings.weight_decay)
        self.optimizers[part] = sgd if make_optimizer is None else make_optimizer(stack)
        self.best[part] = clone(stack)

    def train(self, split: Split, checkpoints: Checkpoints, progress: Progress) -> None:
        """Trains on the (augmented) images of `split` for all epochs; see `loop.fit`."""
        self.progress = progress
        if self.exits.standardise or self.exits.whiten:
            self._standardise()
        fit(
            self,
            split,
            num_epochs=self.settings.num_epochs,
            global_batch_size=self.settings.global_batch_size,
            seed=self.seed,
            ranks=self.ranks,
            checkpoints=checkpoints,
            progress=progress,
        )

    def begin(self) -> None:
        """Nothing comes before the first batch, unless a method says so."""

    # ---- features of images that are not augmented

    def plain_features(self, split: Split) -> Iterator[tuple[Tensor, list[Tensor], Tensor, Tensor]]:
        """Yields (index (B,), what the exits read, backbone's logits (B, K), labels (B,)) of this rank's batches."""
        for index_B, images, labels_B in pass_over(split, self.plain_batches(split), self.ranks, self.progress):
            features, final_BK = features_in_parts(self.model, images, self._at_once)
            yield index_B, features, final_BK, self.ranks.to_device(labels_B)

    def plain_batches(self, split: Split) -> list[range]:
        """The batches of all ranks."""
        return [range(i, min(i + _PLAIN_BATCH_SIZE, len(split))) for i in range(0, len(split), _PLAIN_BATCH_SIZE)]

    def _standardise(self) -> None:
        assert self.plain_train is not None
        model, ranks, say = self.model, self.ranks, self.progress.say
        moments_P = [empty_moments(model, p, ranks, whiten=self.exits.whiten) for p in range(len(model.positions))]
        for _, features, _, _ in self.plain_features(self.plain_train):
            for moments, feature in zip(moments_P, features, strict=True):
                moments.add(feature)
        self.standardisations = [standardisation_by(m, model, p, ranks, say) for p, m in enumerate(moments_P)]

    # ---- one batch

    def train_step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """One update of the members from this rank's `share` of a batch; the losses to show."""
        raise NotImplementedError

    def _features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        features, final_BK = features_in_parts(self.model, images, self._at_once)
        self.settle()  # the sums over ranks of the step before travelled while the backbone ran
        features = [feature.to(self.dtype) for feature in features]
        if self.standardisations is not None:
            features = [own(feature) for own, feature in zip(self.standardisations, features, strict=True)]
        return features, final_BK.to(self.dtype)

    def _logits(self, heads: Stack, features: list[Tensor], final_BK: Tensor | None) -> Tensor:
        """Logits (m, L, B, K) of the chosen members' heads and, last, if given, of the backbone's own classifier."""
        logits_mLBK: Tensor = self.heads(features, final_BK, heads)
        return logits_mLBK

    def exit_logits(self, images: Tensor) -> Tensor:
        """Logits (M, L, B, K) of every member's weights as they would be kept now."""
        return self._logits(self.current()["heads"], *self._features(images))

    def _distilled(self, logits_mRBK: Tensor, final_BK: Tensor) -> Tensor | float:
        """What distillation adds to the loss of every head on every sample, (m, R, B) or 0."""
        weight = self.settings.distillation
        return weight * divergences(logits_mRBK, final_BK) if weight else 0.0

    def _update(
        self,
        part: str,
        parameters: Stack,
        loss_m: Tensor,
        members: Tensor | None,
        share: float,
        term: int,
        moving: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Steps the chosen members of `part`; who has a loss or gradient that is not finite stops where it is.

        Of a block only rows move whose entry of `moving` (R, m) is true, if it is given. Of several ranks the step is
        taken by `settle`.
        """
        self.settle()
        if share:
            slopes = torch.autograd.grad(loss_m, list(parameters.values()), self._slope(share).expand_as(loss_m))
        else:  # this rank has none of the samples, and the mean of nothing is not a number
            loss_m, slopes = torch.zeros_like(loss_m), tuple(map(torch.zeros_like, parameters.values()))
        gradients = dict(zip(parameters, slopes, strict=True))
        loss_m = loss_m.detach() if share == 1 else loss_m.detach() * share
        ranks_mW = self._not_finite_on(loss_m, gradients)
        receive = self.ranks.start_all_reduce([loss_m, ranks_mW, *gradients.values()])
        now_m3 = self.ranks.to_device(torch.tensor([[self.step_number, term, 0]]))
        rate_m = self._learning_rate(part, members)

        def finish() -> None:
            receive()
            alive_m = self.alive_M if members is None else self.alive_M[members]
            self._note_alive(alive_m, members, now_m3, ranks_mW)
            alive_m = alive_m & finite_members(loss_m, gradients)
            if members is None:
                self.alive_M = alive_m
            else:
                self.alive_M[members] = alive_m
            self.losses.add(loss_m, alive_m, members, term)
            self.optimizers[part].step(gradients, members, rate_m, alive_m, moving)

        self._finish_update = finish
        if self.ranks.world_size == 1:
            self.settle()

    def settle(self) -> None:
        """Takes the step whose sums over ranks are under way, if any; called before its weights are read."""
        if self._finish_update is not None:
            finish, self._finish_update = self._finish_update, None
            finish()

    def _slope(self, share: float) -> Tensor:
        """`share` as a tensor (1,) on the device, kept from step to step."""
        if share not in self._slopes:
            self._slopes = {share: torch.full((1,), share, dtype=self.dtype, device=self.ranks.device)}
        return self._slopes[share]

    def _learning_rate(self, part: str, members: Tensor | None) -> Tensor:
        """The rate (m,) of the next step of a part."""
        raise NotImplementedError

    def _not_finite_on(self, loss_m: Tensor, gradients: Stack) -> Tensor:
        """Ones (m, world size) where a member's loss or gradient is not finite on this rank; the sum tells which."""
        shape = (len(loss_m), self.ranks.world_size)
        ranks_mW = torch.zeros(shape, dtype=loss_m.dtype, device=loss_m.device)  # one message takes all of a type
        if self.ranks.world_size > 1:
            ranks_mW[:, self.ranks.global_rank] = ~finite_members(loss_m, gradients)
        return ranks_mW

    def _note_alive(self, alive_m: Tensor, members: Tensor | None, now_m3: Tensor, ranks_mW: Tensor) -> None:
        """Notes this step of who was alive before it: of a stopped member the step that stopped it."""
        if self.ranks.world_size > 1:
            rank_m = ranks_mW.argmax(1)
            now_m3 = torch.stack((*now_m3[0, :2, None].expand(2, len(rank_m)), rank_m), 1)
        noted_m3 = self.stopped_at_M if members is None else self.stopped_at_M[members]
        noted_m3 = torch.where(alive_m[:, None], now_m3, noted_m3)
        if members is None:
            self.stopped_at_M = noted_m3
        else:
            self.stopped_at_M[members] = noted_m3

    # ---- between epochs

    def end_epoch(self, epoch: int) -> None:
        """Evaluation, and what is kept."""
        raise NotImplementedError

    def current(self) -> dict[str, Stack]:
        """By part the blocks of weights that are evaluated and may be kept."""
        return {part: optimizer.stack for part, optimizer in self.optimizers.items()}

    def _keep_better(self, objective_M: Tensor, eligible_M: Tensor) -> None:
        """Keeps the current weights of eligible members whose `objective_M` (on the CPU) is the lowest so far."""
        better_M = (objective_M < self.best_objective_M) & eligible_M.cpu() & self.alive_M.cpu()
        self.best_objective_M = torch.where(better_M, objective_M, self.best_objective_M)
        self.improved_M = torch.where(eligible_M.cpu(), better_M, self.improved_M)
        for part, stack in self.current().items():
            copy_members(self.best[part], stack, better_M.to(self.ranks.device))

    def _report_stopped(self) -> None:
        for i in (~self.alive_M).nonzero().flatten().tolist():
            if i not in self.stopped:
                step, term, rank = self.stopped_at_M[i].tolist()
                self.stopped[i] = (
                    f"{self.members[i].name}: the {self.terms[term]} was not finite at step {step} on rank {rank}; the "
                    f"member was stopped and its last good state kept; lower {self.rate_key} or look at the data"
                )

    # ---- state

    def member_state(self, i: int) -> Stack:
        """Member i's parts as they are kept, without the member axis; its heads read features that are as they were."""
        parts = self.best if self.settings.keep == "best" else self.current()
        state = {
            f"{part}.{name}": value[i].clone()
            for part, stack in parts.items()
            for name, value in self.modules[part].by_name(stack).items()
        }
        for row, name in enumerate(self.heads.row_names if self.standardisations is not None else []):
            weight, bias = f"heads.{name}.0.weight", f"heads.{name}.0.bias"
            standardisation = self.standardisations[row // len(self.costs.head_types)]  # type: ignore[index]
            state[weight], state[bias] = standardisation.fold(state[weight], state[bias])
        return state

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.settle()
        tensors = {name: getattr(self, name) for name in self._plain_tensors} | {"loss_sums_2MT": self.losses.sums_2MT}
        tensors |= {f"{kind}.{name}": value for kind, stack in self._stacks().items() for name, value in stack.items()}
        facts = {
            "rows": self.rows,
            "stopped": {str(i): text for i, text in self.stopped.items()},
            "step_number": self.step_number,
        }
        return tensors, facts

    def stack(self, part: str) -> Stack:
        """The current weights of a part by parameter, (M, ...), sharing their memory."""
        return self.modules[part].by_name(self.optimizers[part].stack)

    def _stacks(self) -> dict[str, Stack]:
        stacks: dict[str, Stack] = {}
        for part, module in self.modules.items():
            stacks |= {part: self.stack(part), f"best.{part}": module.by_name(self.best[part])}
            states = {prefix: module.by_name(blocks) for prefix, blocks in self.optimizers[part].states.items()}
            momentum = {prefix + name: value for prefix, stack in states.items() for name, value in stack.items()}
            stacks[f"momentum.{part}"] = momentum
        return stacks

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        for name in self._plain_tensors:
            setattr(self, name, tensors[name].to(getattr(self, name).device))
        self.losses.sums_2MT.copy_(tensors.get("loss_sums_2MT", self.losses.sums_2MT))
        for kind, stack in self._stacks().items():
            for name, value in stack.items():
                value.copy_(tensors[f"{kind}.{name}"])
        self.rows = list(facts["rows"])
        self.stopped = {int(i): text for i, text in facts["stopped"].items()}
        self.step_number = facts["step_number"]
