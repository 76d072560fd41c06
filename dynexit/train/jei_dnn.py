"""JEI-DNN: exit heads and gates of many members, trained jointly on one stream of batches.

Source: JEI-DNN (arXiv 2310.09163), sections 4 and 5. Members that share a seed share the warm-up, which does not depend
on ce_ic_tradeoff: one of them, the group's leader, is trained, and hands its heads and momentum to the others.

Shapes: M members of the pack, m chosen members, L exits, G = L-1 gates, P = G positions, B batch, K classes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from dynexit.config import JeiDnn, Train
from dynexit.core.confidence import gate_features
from dynexit.core.cost import ExitCosts
from dynexit.core.losses import gate_loss, gate_targets, head_loss, positive_weights, prediction_errors, warm_up_loss
from dynexit.data import Batch, Split
from dynexit.dist import Ranks
from dynexit.models.heads import StackedGates, StackedHeads
from dynexit.models.multi_exit import MultiExit
from dynexit.train.evaluate import Evaluation, evaluate
from dynexit.train.members import MemberSGD, Stack, copy_members, finite_members, leaves, stack_of
from dynexit.train.schedule import JOINT, TERMS, WARM_UP, Group, make_groups


@dataclasses.dataclass(frozen=True)
class Member:
    """What is a member's own: the seed of its heads and gates, its tradeoff, and a name for messages."""

    seed: int
    ce_ic_tradeoff: float
    name: str


class JeiDnnTask:
    """The training of a pack, as the loop's Task."""

    def __init__(
        self,
        model: MultiExit,
        costs: ExitCosts,
        members: Sequence[Member],
        settings: Train,
        method: JeiDnn,
        validation: Split,
        ranks: Ranks,
    ) -> None:
        self.model, self.members, self.settings, self.method = model, list(members), settings, method
        self.validation, self.ranks = validation, ranks
        dtype = {"float32": torch.float32, "float64": torch.float64}[settings.precision]
        seeds = [member.seed for member in members]
        self.heads = StackedHeads(
            model.feature_dims, model.positions, costs.head_types, model.backbone.num_classes, seeds
        ).to(ranks.device, dtype)
        self.gates = StackedGates(len(model.positions), seeds).to(ranks.device, dtype)
        rows = {str(position): exit_number for exit_number, position in enumerate(model.positions)}
        self.exit_of = {name: rows[name.partition(".")[0]] for name, _ in self.heads.named_parameters()}
        self.macs_L = torch.from_numpy(costs.macs_L()).to(ranks.device)
        self.full_macs = costs.full_macs
        self.cost_L = torch.from_numpy(costs.relative_cost_L()).to(ranks.device, dtype)
        self.tradeoff_M = torch.tensor([member.ce_ic_tradeoff for member in members], dtype=dtype, device=ranks.device)
        num_gates, num_members = len(model.positions), len(members)
        self.positive_weight_MG = torch.ones(num_members, num_gates, dtype=dtype, device=ranks.device)
        self.optimizers = {
            "heads": MemberSGD(stack_of(self.heads), settings.momentum, settings.weight_decay),
            "gates": MemberSGD(stack_of(self.gates), settings.momentum, settings.weight_decay),
        }
        self.best = {part: _clone(optimizer.stack) for part, optimizer in self.optimizers.items()}
        self.best_objective_M = torch.full((num_members,), math.inf, dtype=torch.float64)
        self.alive_M = torch.ones(num_members, dtype=torch.bool, device=ranks.device)
        self.stopped_at_M = torch.full((num_members, 2), -1, dtype=torch.int64, device=ranks.device)  # step, term
        self.stopped: dict[int, str] = {}
        self.rows: list[dict[str, Any]] = []
        self.step_number = 0
        self.groups = make_groups(seeds, num_gates, method)
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
                figures[TERMS[term]] = loss_m.detach().nanmean()
        for group in self.groups:
            group.phase_step += group.stage == JOINT
        self.step_number += 1
        return figures

    def _choose(self, term: int) -> tuple[list[int], Tensor | None]:
        """The members whose next step is of that kind (None stands for all); of a group in warm-up, its leader."""
        groups = [group for group in self.groups if group.term(self.method) == term]
        chosen = sorted(i for group in groups for i in ([group.leader] if term == 0 else group.members))
        if self._chosen.get(term, (None,))[0] != chosen:
            everyone = len(chosen) == len(self.members)
            self._chosen[term] = (chosen, None if everyone else torch.tensor(chosen, device=self.ranks.device))
        return self._chosen[term]

    def _logits(self, heads: Stack, features: list[Tensor], final_BK: Tensor) -> Tensor:
        """Logits (m, L, B, K) of the chosen members' heads and, last, of the backbone's own classifier."""
        logits_mPBK = functional_call(self.heads, heads, (features,))
        final_m1BK = final_BK.expand(len(logits_mPBK), 1, *final_BK.shape)
        return torch.cat((logits_mPBK, final_m1BK), 1)

    def _gate_logits(self, gates: Stack, logits_mLBK: Tensor) -> Tensor:
        logits_mGB: Tensor = functional_call(self.gates, gates, (gate_features(logits_mLBK[:, :-1].detach()),))
        return logits_mGB

    def _features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        features, final_BK = self.model.features(images)
        return [feature.to(self.cost_L.dtype) for feature in features], final_BK.to(self.cost_L.dtype)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (M, L, B, K), gate outputs (M, G, B)) of every member's current weights."""
        logits_MLBK = self._logits(self.optimizers["heads"].stack, *self._features(images))
        return logits_MLBK, self._gate_logits(self.optimizers["gates"].stack, logits_MLBK).sigmoid()

    def _warm_up_step(
        self, features: list[Tensor], final_BK: Tensor, labels_B: Tensor, members: Tensor | None, share: float
    ) -> Tensor:
        heads = leaves(self.optimizers["heads"].stack, members)
        loss_m = warm_up_loss(self._logits(heads, features, final_BK), labels_B)
        frozen_mG = torch.tensor([g.frozen for g in self.groups if g.stage == WARM_UP], device=self.ranks.device)
        moving = {name: ~frozen_mG[:, self.exit_of[name]] for name in heads}
        self._update("heads", heads, loss_m, members, share, 0, moving)
        return loss_m

    def _gate_step(
        self, features: list[Tensor], final_BK: Tensor, labels_B: Tensor, members: Tensor | None, share: float
    ) -> Tensor:
        with torch.no_grad():
            logits_mLBK = self._logits(_part(self.optimizers["heads"].stack, members), features, final_BK)
            errors_mLB = prediction_errors(logits_mLBK, labels_B, self.method.gate_objective)
            target_mB = gate_targets(errors_mLB, self.cost_L, _pick(self.tradeoff_M, members))
        gates = leaves(self.optimizers["gates"].stack, members)
        loss_m = gate_loss(self._gate_logits(gates, logits_mLBK), target_mB, _pick(self.positive_weight_MG, members))
        self._update("gates", gates, loss_m, members, share, 1)
        return loss_m

    def _head_step(
        self, features: list[Tensor], final_BK: Tensor, labels_B: Tensor, members: Tensor | None, share: float
    ) -> Tensor:
        heads = leaves(self.optimizers["heads"].stack, members)
        logits_mLBK = self._logits(heads, features, final_BK)
        with torch.no_grad():
            gates_mGB = self._gate_logits(_part(self.optimizers["gates"].stack, members), logits_mLBK).sigmoid()
        loss_m = head_loss(logits_mLBK, labels_B, gates_mGB, self.method.head_loss)
        self._update("heads", heads, loss_m, members, share, 2)
        return loss_m

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
        """Steps the chosen members of `part`; who has a loss or gradient that is not finite stops where it is."""
        total = (loss_m * share).sum() if share else loss_m.nansum() * 0
        gradients = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
        loss_m = loss_m.detach() * share
        self.ranks.sum_([loss_m, *gradients.values()])
        alive_m = _pick(self.alive_M, members)
        finite_m = finite_members(loss_m, gradients)
        self._note_stopped(alive_m & ~finite_m, members, term)
        alive_m = alive_m & finite_m
        if members is None:
            self.alive_M = alive_m
        else:
            self.alive_M[members] = alive_m
        active = {name: alive_m if moving is None else alive_m & moving[name] for name in parameters}
        self.optimizers[part].step(gradients, members, self._learning_rate(members), active)

    def _note_stopped(self, stopping_m: Tensor, members: Tensor | None, term: int) -> None:
        now_m2 = self.stopped_at_M.new_tensor([self.step_number, term]).expand(len(stopping_m), 2)
        noted_m2 = torch.where(stopping_m[:, None], now_m2, _pick(self.stopped_at_M, members))
        if members is None:
            self.stopped_at_M = noted_m2
        else:
            self.stopped_at_M[members] = noted_m2

    def _learning_rate(self, members: Tensor | None) -> Tensor:
        rates = {i: group.learning_rate(self.settings) for group in self.groups for i in group.members}
        rates_M = torch.tensor([rates[i] for i in range(len(rates))], dtype=self.cost_L.dtype, device=self.ranks.device)
        return _pick(rates_M, members)

    # ---- between epochs

    def end_epoch(self, epoch: int) -> None:
        """Evaluates on validation; ends warm-ups, sets the positive weights, keeps the best."""
        evaluation = self.evaluate()
        for group in self.groups:
            was = group.stage
            if was == WARM_UP:
                self._end_warm_up_epoch(group, evaluation)
            else:
                self._end_joint_epoch(group, evaluation)
            self.rows += [self._row(epoch, was, i, group.leader, evaluation) for i in group.members]
        self._report_stopped()

    def evaluate(self) -> Evaluation:
        """What every member's current weights do on the validation split."""
        return evaluate(self, self.validation)

    def _end_warm_up_epoch(self, group: Group, evaluation: Evaluation) -> None:
        """Per exit: a strictly better validation accuracy is kept; too many epochs without one end its warm-up."""
        leader = group.leader
        stack, best = self.optimizers["heads"].stack, self.best["heads"]
        group.warm_up_epochs += 1
        at_the_cap = group.warm_up_epochs >= self.method.max_warm_up_epochs
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
        optimizer = self.optimizers["heads"]
        for tensors in (optimizer.stack, optimizer.buffers):
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
        better_M = (objective_M < self.best_objective_M) & self._mask(chosen).cpu() & self.alive_M.cpu()
        self.best_objective_M = torch.where(better_M, objective_M, self.best_objective_M)
        for part, optimizer in self.optimizers.items():
            copy_members(self.best[part], optimizer.stack, better_M.to(self.ranks.device))

    def _mask(self, members: list[int]) -> Tensor:
        mask_M = torch.zeros(len(self.members), dtype=torch.bool, device=self.ranks.device)
        mask_M[members] = True
        return mask_M

    def _row(self, epoch: int, stage: str, member: int, leader: int, evaluation: Evaluation) -> dict[str, Any]:
        source = leader if stage == WARM_UP else member
        return {"member": member, "epoch": epoch, "stage": stage, **evaluation.figures(source, stage == JOINT)}

    def _report_stopped(self) -> None:
        for i in (~self.alive_M).nonzero().flatten().tolist():
            if i not in self.stopped:
                step, term = self.stopped_at_M[i].tolist()
                self.stopped[i] = (
                    f"{self.members[i].name}: the {TERMS[term]} was not finite at step {step}; the member was stopped "
                    "and its last good state kept; lower train.learning_rate or look at the data"
                )

    # ---- state

    def member_state(self, i: int) -> Stack:
        """Heads and gates of member i as they are kept, without the member axis."""
        part = self.best if self.settings.keep == "best" else {k: o.stack for k, o in self.optimizers.items()}
        copy_to = {"heads": self.heads, "gates": self.gates}
        for name, module in copy_to.items():
            for key, parameter in module.named_parameters():
                parameter.data.copy_(part[name][key])
        return {**self.heads.member_state(i), **self.gates.member_state(i)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {
            "positive_weight_MG": self.positive_weight_MG,
            "best_objective_M": self.best_objective_M,
            "alive_M": self.alive_M,
            "stopped_at_M": self.stopped_at_M,
            **{f"{kind}.{name}": value for kind, stack in self._stacks().items() for name, value in stack.items()},
        }
        facts = {
            "groups": [dataclasses.asdict(group) for group in self.groups],
            "rows": self.rows,
            "stopped": {str(i): text for i, text in self.stopped.items()},
            "step_number": self.step_number,
        }
        return tensors, facts

    def _stacks(self) -> dict[str, Stack]:
        stacks: dict[str, Stack] = {}
        for part, optimizer in self.optimizers.items():
            stacks |= {part: optimizer.stack, f"momentum.{part}": optimizer.buffers, f"best.{part}": self.best[part]}
        return stacks

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        for name in ("positive_weight_MG", "best_objective_M", "alive_M", "stopped_at_M"):
            setattr(self, name, tensors[name].to(getattr(self, name).device))
        for kind, stack in self._stacks().items():
            for name, value in stack.items():
                value.copy_(tensors[f"{kind}.{name}"])
        self.groups = [Group(**group) for group in facts["groups"]]
        self.rows = list(facts["rows"])
        self.stopped = {int(i): text for i, text in facts["stopped"].items()}
        self.step_number = facts["step_number"]


def _clone(stack: Stack) -> Stack:
    return {name: value.clone() for name, value in stack.items()}


def _pick(tensor: Tensor, members: Tensor | None) -> Tensor:
    return tensor if members is None else tensor[members]


def _part(stack: Stack, members: Tensor | None) -> Stack:
    return stack if members is None else {name: value[members] for name, value in stack.items()}
