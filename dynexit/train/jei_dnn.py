"""JEI-DNN: exit heads and gates of many members, trained jointly on one stream of batches.

Source: JEI-DNN (arXiv 2310.09163), sections 4 and 5. Members that share a seed share the warm-up, which does not depend
on ce_ic_tradeoff: one of them, the group's leader, is trained, and hands its heads and momentum to the others.

Shapes: M members of the pack, m chosen members, L exits, G = L-1 gates, P = G positions, B batch, K classes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from dynexit.core.confidence import gate_features_and_softmax
from dynexit.core.losses import gate_loss, gate_targets, head_loss, positive_weights, prediction_errors, warm_up_loss
from dynexit.data import Batch
from dynexit.models.heads import StackedGates
from dynexit.study.methods import JeiDnnSettings, ProbeSettings
from dynexit.study.schema import TrainSettings
from dynexit.train.evaluate import Evaluation, evaluate_gates
from dynexit.train.optimizers import Stack, clone, copy_members, cosine_rate, leaves, pick
from dynexit.train.pack import Pack, PackTask
from dynexit.train.probe import Prober

WARM_UP, JOINT = "warm-up", "joint"
TERMS = ("warm-up loss", "gate loss", "head loss")


@dataclasses.dataclass
class Group:
    """Members of one seed; its first member, the leader, is the one that is trained during the warm-up."""

    members: list[int]
    stage: str
    warm_up_epochs: int = 0
    joint_epochs: int = 0
    phase_step: int = 0  # joint batches since the alternation began
    best_accuracy: list[float] = dataclasses.field(default_factory=list)  # per exit, on validation, of the warm-up
    impatience: list[int] = dataclasses.field(default_factory=list)  # epochs without a better one
    frozen: list[bool] = dataclasses.field(default_factory=list)  # exits whose warm-up has ended

    @property
    def leader(self) -> int:
        return self.members[0]

    def term(self, method: JeiDnnSettings) -> int:
        """Index into TERMS of the loss that the next batch brings down."""
        if self.stage == WARM_UP:
            return 0
        return 1 + self.phase_step // method.bilevel_batch_count % 2

    def learning_rate(self, settings: TrainSettings) -> float:
        """Constant in the warm-up, then a cosine over num_epochs, stepped once per joint epoch only."""
        return cosine_rate(self.joint_epochs, settings.num_epochs, settings.learning_rate, settings.min_learning_rate)


def make_groups(seeds: Sequence[int], num_gates: int, *, warm_up: bool) -> list[Group]:
    """One group per seed, in order of their first members."""
    stage = WARM_UP if warm_up else JOINT
    return [
        Group(
            members=[i for i, other in enumerate(seeds) if other == seed],
            stage=stage,
            best_accuracy=[-1.0] * num_gates,
            impatience=[0] * num_gates,
            frozen=[False] * num_gates,
        )
        for seed in dict.fromkeys(seeds)
    ]


class JeiDnnTask(PackTask):
    """The training of a pack, as the loop's Task."""

    terms = TERMS
    _plain_tensors = ("positive_weight_MG", *PackTask._plain_tensors)

    def __init__(self, pack: Pack, method: JeiDnnSettings) -> None:
        super().__init__(pack)
        self.method = method
        model, device = pack.model, pack.ranks.device
        num_gates, num_members = len(model.positions), len(self.members)
        self.gates = StackedGates(num_gates, self.seeds)
        self._add("heads", self.heads)
        self._add("gates", self.gates)
        rows = {str(position): exit_number for exit_number, position in enumerate(model.positions)}
        self.exit_of = {name: rows[name.partition(".")[0]] for name in self.stack("heads")}
        self.cost_L = torch.from_numpy(self.costs.relative_cost_L()).to(device, self.dtype)
        tradeoffs = [member.settings.ce_ic_tradeoff for member in self.members]
        self.tradeoff_M = torch.tensor(tradeoffs, dtype=self.dtype, device=device)
        self.positive_weight_MG = torch.ones(num_members, num_gates, dtype=self.dtype, device=device)
        self.most_warm_up_epochs = method.most_warm_up_epochs(self.settings.num_epochs)
        warm_up = method.warm_up == "sgd" and self.most_warm_up_epochs > 0
        self.groups = make_groups(self.seeds, num_gates, warm_up=warm_up)
        self._chosen: dict[int, tuple[list[int], Tensor | None]] = {}

    # ---- one batch

    def train_step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        """One update of every member in its own phase, from one pass of the backbone."""
        _, images, labels_B = batch
        features, final_BK = self._features(images)
        figures: dict[str, Tensor] = {}
        for term, step in ((0, self._warm_up_step), (1, self._gate_step), (2, self._head_step)):
            chosen, members = self._choose(term)
            if chosen:
                loss_m = step(features, final_BK, labels_B, members, share)
                figures[TERMS[term]] = loss_m.detach()
        for group in self.groups:
            group.phase_step += group.stage == JOINT
        self.step_number += 1
        return figures

    def begin(self) -> None:
        """With a convex warm-up, fits every member's heads as method probe does."""
        if self.method.warm_up != "convex":
            return
        prober = Prober(self, ProbeSettings())
        stack = self.stack("heads")
        for p, position in enumerate(self.model.positions):
            prober.fit(p)
            if self.standardisations is None:  # training continues on features as they are
                name = f"{position}.{self.costs.head_types[0]}.0"
                weight, bias = stack[f"{name}.weight"], stack[f"{name}.bias"]
                for i in range(len(self.members)):
                    weight[i], bias[i] = prober.standardisations[p].fold(weight[i], bias[i])
        self.best["heads"] = clone(self.optimizers["heads"].stack)

    def _choose(self, term: int) -> tuple[list[int], Tensor | None]:
        """The members whose next step is of that kind (None stands for all); of a group in warm-up, its leader."""
        groups = [group for group in self.groups if group.term(self.method) == term]
        chosen = sorted(i for group in groups for i in ([group.leader] if term == 0 else group.members))
        if self._chosen.get(term, (None,))[0] != chosen:
            everyone = len(chosen) == len(self.members)
            self._chosen[term] = (chosen, None if everyone else self.ranks.to_device(torch.tensor(chosen)))
        return self._chosen[term]

    def _gate_logits(self, gates: Stack, u_mGB4: Tensor) -> Tensor:
        logits_mGB: Tensor = functional_call(self.gates, self.gates.by_name(gates), (u_mGB4,))
        return logits_mGB

    def _features_and_targets(
        self, logits_mGBK: Tensor, final_BK: Tensor, labels_B: Tensor, members: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the gates read (m, G, B, 4), and the exit that each sample should leave at (m, B)."""
        u_mGB4, softmax = gate_features_and_softmax(logits_mGBK)
        errors_mGB = prediction_errors(logits_mGBK, labels_B, self.method.gate_objective, softmax)
        last_1B = prediction_errors(final_BK[None], labels_B, self.method.gate_objective)  # the same for all members
        errors_mLB = torch.cat((errors_mGB, last_1B.expand(len(errors_mGB), 1, -1)), 1)
        return u_mGB4, gate_targets(errors_mLB, self.cost_L, _chosen(self.tradeoff_M, members))

    def _gating(self, images: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, final_BK = self._features(images)
        logits_MLBK = self._logits(self.current()["heads"], features, final_BK)
        u_MGB4, target_MB = self._features_and_targets(logits_MLBK[:, :-1], final_BK, labels_B, None)
        return logits_MLBK, self._gate_logits(self.optimizers["gates"].stack, u_MGB4).sigmoid(), target_MB

    def _warm_up_step(
        self, features: list[Tensor], final_BK: Tensor, labels_B: Tensor, members: Tensor | None, share: float
    ) -> Tensor:
        heads = leaves(self.optimizers["heads"].stack, members)
        logits_mLBK = self._logits(heads, features, final_BK)
        loss_m = warm_up_loss(logits_mLBK, labels_B) + self._warm_up_distillation(logits_mLBK[:, :-1], final_BK)
        self._update("heads", heads, loss_m, members, share, 0, self._warming(heads))
        return loss_m

    def _warming(self, heads: Stack) -> Stack:
        """Of every block the rows (R, m) whose exit is still in its warm-up."""
        frozen_mG = [group.frozen for group in self.groups if group.stage == WARM_UP]
        moving = {
            name: [[not frozen_G[g] for frozen_G in frozen_mG] for g in self.heads.exits_of(name)] for name in heads
        }
        return {name: self.ranks.to_device(torch.tensor(rows)) for name, rows in moving.items()}

    def _warm_up_distillation(self, logits_mGBK: Tensor, final_BK: Tensor) -> Tensor | float:
        """Exits weighed as in the warm-up loss."""
        added_mGB = self._distilled(logits_mGBK, final_BK)
        if isinstance(added_mGB, float):
            return added_mGB
        num_gates = added_mGB.shape[1]
        return added_mGB.mean(-1) @ torch.arange(num_gates + 1, 1, -1, dtype=self.dtype, device=self.ranks.device)

    def _gate_step(
        self, features: list[Tensor], final_BK: Tensor, labels_B: Tensor, members: Tensor | None, share: float
    ) -> Tensor:
        with torch.no_grad():
            logits_mGBK = self._logits(_part(self.optimizers["heads"].stack, members), features, None)
            u_mGB4, target_mB = self._features_and_targets(logits_mGBK, final_BK, labels_B, members)
        gates = leaves(self.optimizers["gates"].stack, members)
        logits_mGB = self._gate_logits(gates, u_mGB4)
        loss_m = gate_loss(logits_mGB, target_mB, _chosen(self.positive_weight_MG, members))
        self._update("gates", gates, loss_m, members, share, 1)
        return loss_m

    def _head_step(
        self, features: list[Tensor], final_BK: Tensor, labels_B: Tensor, members: Tensor | None, share: float
    ) -> Tensor:
        heads = leaves(self.optimizers["heads"].stack, members)
        needs_last = self.method.head_loss == "single"
        logits_mLBK = self._logits(heads, features, final_BK if needs_last else None)
        gates = _part(self.optimizers["gates"].stack, members)
        logits_mGBK = logits_mLBK[:, : len(features)]
        with torch.no_grad():
            u_mGB4, softmax = gate_features_and_softmax(logits_mGBK)
            gates_mGB = self._gate_logits(gates, u_mGB4).sigmoid()
        known = None if needs_last else softmax
        loss_m = head_loss(logits_mLBK, labels_B, gates_mGB, self.method.head_loss, known)
        added_mGB = self._distilled(logits_mGBK, final_BK)
        loss_m = loss_m if isinstance(added_mGB, float) else loss_m + added_mGB.mean((-2, -1))
        self._update("heads", heads, loss_m, members, share, 2)
        return loss_m

    def _learning_rate(self, part: str, members: Tensor | None) -> Tensor:
        rates: dict[int, float] = {}
        for group in self.groups:
            rates |= dict.fromkeys(group.members, group.learning_rate(self.settings))
        rates_M = torch.tensor([rates[i] for i in range(len(rates))], dtype=self.dtype)
        return _chosen(self.ranks.to_device(rates_M), members)

    # ---- between epochs

    def end_epoch(self, epoch: int) -> None:
        """Evaluates on validation; ends warm-ups, sets the positive weights, keeps the best."""
        self.settle()
        evaluation, losses = self.evaluate(), self.losses.take()
        for group in self.groups:
            was = group.stage
            if was == WARM_UP:
                self._end_warm_up_epoch(group, evaluation)
            else:
                self._end_joint_epoch(group, evaluation)
            self.rows += [self._row(epoch, was, i, group.leader, evaluation, losses) for i in group.members]
        self._report_stopped()

    def evaluate(self) -> Evaluation:
        """What every member's current weights do on the validation split."""
        return evaluate_gates(self, self.validation, self._gating, self.cost_L)

    def _end_warm_up_epoch(self, group: Group, evaluation: Evaluation) -> None:
        """Per exit: a strictly better validation accuracy is kept; too many epochs without one end its warm-up."""
        leader = group.leader
        stack, best = self.stack("heads"), self.heads.by_name(self.best["heads"])
        group.warm_up_epochs += 1
        at_the_cap = group.warm_up_epochs >= self.most_warm_up_epochs
        for exit_number, accuracy in enumerate(evaluation.exit_accuracy_ML[leader, :-1].tolist()):
            if group.frozen[exit_number]:
                continue
            mine = [name for name in stack if self.exit_of[name] == exit_number]
            if accuracy > group.best_accuracy[exit_number]:
                group.best_accuracy[exit_number], group.impatience[exit_number] = accuracy, 0
                for name in mine:
                    best[name][leader] = stack[name][leader]
            else:
                group.impatience[exit_number] += 1
            if at_the_cap or group.impatience[exit_number] >= self.method.warm_up_patience:
                group.frozen[exit_number] = True
                for name in mine:
                    stack[name][leader] = best[name][leader]
        if all(group.frozen):
            self._leave_warm_up(group)

    def _leave_warm_up(self, group: Group) -> None:
        """The leader's heads and momentum become those of every member of its group; the momentum survives."""
        group.stage = JOINT
        leader = group.leader
        stacks = self._stacks()
        for tensors in (stacks["heads"], stacks["momentum.heads"]):
            for value in tensors.values():
                value[group.members] = value[leader].clone()
        self.alive_M[group.members] = self.alive_M[leader].clone()
        self.stopped_at_M[group.members] = self.stopped_at_M[leader].clone()
        for part in self.best:
            copy_members(self.best[part], self.optimizers[part].stack, self._mask(group.members))

    def _end_joint_epoch(self, group: Group, evaluation: Evaluation) -> None:
        group.joint_epochs += 1
        if self.method.alternation == "reference":
            group.phase_step = 0
        chosen = group.members
        weights_mG = positive_weights(evaluation.target_counts_ML[chosen], self.method.positive_weight)
        self.positive_weight_MG[chosen] = weights_mG.to(self.positive_weight_MG)
        tradeoff_M = self.tradeoff_M.cpu().to(torch.float64)
        objective_M = evaluation.cross_entropy_M + tradeoff_M * evaluation.relative_cost_M
        self._keep_better(objective_M, self._mask(chosen))

    def _mask(self, members: list[int]) -> Tensor:
        mask_M = torch.zeros(len(self.members), dtype=torch.bool, device=self.ranks.device)
        mask_M[members] = True
        return mask_M

    def _row(
        self,
        epoch: int,
        stage: str,
        member: int,
        leader: int,
        evaluation: Evaluation,
        losses: Sequence[dict[str, float]],
    ) -> dict[str, Any]:
        source = leader if stage == WARM_UP else member
        row: dict[str, Any] = {"member": member, "epoch": epoch, "stage": stage, **losses[source]}
        row |= evaluation.figures(source, stage == JOINT)
        return row | ({"improved": bool(self.improved_M[member])} if stage == JOINT else {})

    # ---- state

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        return tensors, {**facts, "groups": [dataclasses.asdict(group) for group in self.groups]}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().restore(tensors, facts)
        self.groups = [Group(**group) for group in facts["groups"]]


def _chosen(values_M: Tensor, members: Tensor | None) -> Tensor:
    return values_M if members is None else values_M[members]


def _part(stack: Stack, members: Tensor | None) -> Stack:
    return {name: pick(value, members) for name, value in stack.items()}
