"""Heads fitted to convergence on features that are kept in memory: no learning rate for linear ones, seconds an exit.

The backbone runs once over the plain training and validation images. Linear heads are multinomial logistic regressions
by L-BFGS on standardised features, from a strong penalty to a weak one; the penalty with the lowest cross-entropy on
validation is kept. MLP heads are trained by AdamW with early stopping. Each rank keeps its share of the samples, and
gradients are summed. Shapes: M members, P positions, n samples of this rank, B batch, D features, K classes.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dynexit.core.cost import place_name
from dynexit.core.losses import cross_entropies
from dynexit.core.regression import Regression, fit_regression
from dynexit.core.standardisation import Standardisation
from dynexit.data import Split, epoch_batches
from dynexit.errors import counted
from dynexit.models.standardised import empty_moments, standardisation_by
from dynexit.progress import Progress
from dynexit.study.methods import ProbeSettings
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.evaluate import finite_or_none
from dynexit.train.loop import session_of
from dynexit.train.optimizers import MemberAdam, Stack, clone, copy_members, cosine_rate, leaves
from dynexit.train.pack import Pack, PackTask

_CHUNK = 4096  # samples whose logits are held at once
_NUM_WARM_UP_STEPS = 100  # of AdamW


@dataclasses.dataclass(frozen=True)
class KeptFeatures:
    """What the exits read of this rank's samples of a split, on the CPU."""

    reads_P: list[Tensor]
    """(n, d_p) what is read at each position itself; features that are concatenated are put together when needed."""
    labels: Tensor
    """(n,)"""
    row_N: Tensor
    """The row of each sample of the split on this rank, -1 for those of other ranks."""
    num_base_correct: int
    """Samples of all ranks that the backbone gets right."""

    @property
    def num_samples(self) -> int:
        """The samples of all ranks."""
        return len(self.row_N)

    @property
    def num_bytes(self) -> int:
        return sum(read.numel() * read.element_size() for read in self.reads_P)


def keep_features(task: PackTask, split: Split) -> KeptFeatures:
    """Runs the backbone once over this rank's samples of `split`."""
    num_rows = sum(len(batch) for batch in task.ranks.share(task.plain_batches(split)))
    reads_P = [torch.empty(num_rows, width) for width in task.model.own_dims]
    labels, row_N = torch.empty(num_rows, dtype=torch.int64), torch.full((len(split),), -1)
    correct = torch.zeros((), dtype=torch.int64, device=task.ranks.device)
    start = 0
    for index_B, features, final_BK, labels_B in task.plain_features(split):
        rows = torch.arange(start, start + len(index_B))
        for read, feature in zip(reads_P, features, strict=True):
            read[rows] = feature[:, feature.shape[1] - read.shape[1] :].to("cpu", torch.float32)
        labels[rows], row_N[index_B] = labels_B.cpu(), rows
        correct += (final_BK.argmax(1) == labels_B).sum()
        start += len(rows)
    task.ranks.all_reduce([correct])
    return KeptFeatures(reads_P, labels, row_N, int(correct))


class Prober:
    """Fits the heads of a task, one position after the other, on kept features."""

    def __init__(self, task: PackTask, settings: ProbeSettings) -> None:
        assert task.plain_train is not None
        self.task, self.settings, self.ranks = task, settings, task.ranks
        began, dims = time.monotonic(), task.model.feature_dims
        self.train, self.validation = keep_features(task, task.plain_train), keep_features(task, task.validation)
        size, seconds = self.train.num_bytes + self.validation.num_bytes, time.monotonic() - began
        task.progress.say(
            f"keeps the features of {self.train.num_samples} training images, {size / 1e9:.3f} GB, {seconds:.1f} s"
        )
        self._check_classes()
        self.standardisations = task.standardisations or [self._standardisation(p) for p in range(len(dims))]

    def _check_classes(self) -> None:
        num_classes = self.task.model.backbone.num_classes
        counts_K = torch.bincount(self.train.labels, minlength=num_classes).to(self.ranks.device)
        self.ranks.all_reduce([counts_K])
        absent = (counts_K == 0).nonzero().flatten().tolist()
        if absent:
            shown = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
            self.task.progress.say(f"no training image is of class {shown}; no exit will predict it")

    def fit(self, p: int) -> list[dict[str, Any]]:
        """Fits all heads at position number p, for every member, and returns what is known of each."""
        task, where = self.task, place_name(self.task.model.positions[p])
        began = time.monotonic()
        parts = [_HeldSplit(self._standardised(kept, p), kept) for kept in (self.train, self.validation)]
        seconds = time.monotonic() - began
        found = []
        num_types = len(task.costs.head_types)
        for name in task.heads.row_names[p * num_types : (p + 1) * num_types]:
            began = time.monotonic()
            stack = {key: value for key, value in task.stack("heads").items() if key.startswith(f"{name}.")}
            linear = len(stack) == 2
            facts, text = self._fit_linear(stack, *parts) if linear else self._fit_mlp(stack, *parts)
            correct_M, cross_entropy_M = self._judge(stack, parts[1])
            accuracy_M = correct_M / self.validation.num_samples
            seconds += time.monotonic() - began
            task.progress.say(
                f"exit after {where}, {name.partition('.')[2]}: validation accuracy {accuracy_M.mean():.4f}, "
                f"cross-entropy {cross_entropy_M.mean():.4f}; {text}, {seconds:.1f} s"
            )
            found.append({"accuracy": accuracy_M.tolist(), "cross_entropy": cross_entropy_M.tolist(), **facts})
            seconds = 0.0
        return found

    def _standardisation(self, p: int) -> Standardisation:
        task = self.task
        moments = empty_moments(task.model, p, self.ranks, whiten=task.exits.whiten)
        for rows in self._chunks(self.train):
            moments.add(self._read(self.train, p, rows).to(self.ranks.device))
        return standardisation_by(moments, task.model, p, self.ranks, task.progress.say)

    def _read(self, kept: KeptFeatures, p: int, rows: slice) -> Tensor:
        concatenate = self.task.model.reading.concatenate
        return torch.cat([read[rows] for read in kept.reads_P[: p + 1]], 1) if concatenate else kept.reads_P[p][rows]

    def _chunks(self, kept: KeptFeatures) -> Iterator[slice]:
        return (slice(i, i + _CHUNK) for i in range(0, len(kept.labels), _CHUNK))

    def _standardised(self, kept: KeptFeatures, p: int) -> Tensor:
        z = torch.empty(len(kept.labels), self.task.model.feature_dims[p], dtype=self.task.dtype)
        for rows in self._chunks(kept):
            x = self._read(kept, p, rows).to(self.ranks.device, self.task.dtype)
            z[rows] = self.standardisations[p](x).cpu()
        return z

    def _loaded(self, part: "_HeldSplit", rows: Any) -> tuple[Tensor, Tensor]:
        return part.z[rows].to(self.ranks.device), part.kept.labels[rows].to(self.ranks.device)

    # ---- linear heads

    def _fit_linear(self, stack: Stack, train: "_HeldSplit", validation: "_HeldSplit") -> tuple[dict[str, Any], str]:
        weight, bias = stack.values()
        best: tuple[float, float, Regression] | None = None
        start = torch.zeros_like(weight[0]), torch.zeros_like(bias[0])
        num_iterations = 0
        for l2 in self.settings.l2:
            fitted = fit_regression(
                lambda: (self._loaded(train, rows) for rows in self._chunks(self.train)),
                self.train.num_samples,
                start,
                l2,
                self.settings.max_iterations,
                self.ranks.all_reduce,
            )
            start = fitted.weight_KD, fitted.bias_K
            num_iterations += fitted.num_iterations
            weight[:], bias[:] = fitted.weight_KD.to(weight.dtype), fitted.bias_K.to(bias.dtype)
            cross_entropy = self._judge({name: value[:1] for name, value in stack.items()}, validation)[1].item()
            if best is None or cross_entropy < best[0]:
                best = cross_entropy, l2, fitted
        assert best is not None
        _, l2, kept = best
        weight[:], bias[:] = kept.weight_KD.to(weight.dtype), kept.bias_K.to(bias.dtype)
        everyones = {"l2": l2, "gradient_norm": kept.gradient_norm, "num_iterations": num_iterations}
        facts = {name: [value] * len(weight) for name, value in everyones.items()}
        state = "converged" if kept.converged else "found no better step, its best iterate is kept"
        if not kept.converged and kept.num_iterations >= self.settings.max_iterations:
            state = f"stopped as set by probe.max_iterations={kept.num_iterations}, its best iterate is kept"
        return facts, f"L2 {l2:g} {state} (gradient norm {kept.gradient_norm:.1e}), {num_iterations} iterations in all"

    # ---- MLP heads

    def _fit_mlp(self, stack: Stack, train: "_HeldSplit", validation: "_HeldSplit") -> tuple[dict[str, Any], str]:
        task, settings = self.task, self.settings
        blocks = {name: value[None] for name, value in stack.items()}
        optimizer = MemberAdam(blocks, settings.weight_decay, decoupled=True)
        num_members = len(task.members)
        best, best_M = clone(blocks), torch.full((num_members,), math.inf, dtype=torch.float64)
        impatience_M, epoch_M = torch.zeros_like(best_M), torch.full_like(best_M, -1)
        num_epochs = settings.num_epochs
        num_steps = num_epochs * -(-train.kept.num_samples // settings.global_batch_size)
        num_warm_up_steps, step = min(_NUM_WARM_UP_STEPS, num_steps // 10), 0
        for epoch in range(num_epochs):
            active_M = impatience_M < settings.patience
            for batch in epoch_batches(train.kept.num_samples, settings.global_batch_size, task.seed, epoch):
                rate = cosine_rate(step, num_steps, settings.learning_rate, 0.0, num_warm_up_steps)
                self._mlp_step(optimizer, train, batch, rate, active_M.to(self.ranks.device))
                step += 1
            cross_entropy_M = self._judge(stack, validation)[1]
            better_M = active_M & (cross_entropy_M < best_M)
            best_M, epoch_M = torch.where(better_M, cross_entropy_M, best_M), epoch_M.masked_fill(better_M, epoch)
            impatience_M = torch.where(better_M, 0, impatience_M + 1)
            copy_members(best, blocks, better_M.to(self.ranks.device))
            if not (impatience_M < settings.patience).any():
                break
        for name, value in blocks.items():
            value.copy_(best[name])
        for i in best_M.isinf().nonzero().flatten().tolist():
            task.stopped[i] = f"{task.members[i].name}: an MLP head's loss was not finite; lower probe.learning_rate"
        return {"best_epoch": epoch_M.tolist()}, f"best of {counted(epoch + 1, 'epoch')}: {epoch_M.mean():g}"

    def _mlp_step(
        self, optimizer: MemberAdam, train: "_HeldSplit", batch: list[int], rate: float, active_M: Tensor
    ) -> None:
        rows = train.kept.row_N[batch]
        z_BD, labels_B = self._loaded(train, rows[rows >= 0])
        parameters = leaves(optimizer.stack, None)
        loss = cross_entropies(
            _logits({name: block[0] for name, block in parameters.items()}, z_BD), labels_B
        ).sum() / len(batch)
        slopes = torch.autograd.grad(loss, list(parameters.values()))
        self.ranks.all_reduce(slopes)
        rate_M = torch.full((len(active_M),), rate, dtype=self.task.dtype, device=self.ranks.device)
        gradients = dict(zip(parameters, slopes, strict=True))
        optimizer.step(gradients, None, rate_M, active_M)

    @torch.no_grad()
    def _judge(self, stack: Stack, part: "_HeldSplit") -> tuple[Tensor, Tensor]:
        """(Correct samples, mean cross-entropy) of every member's head on a split, (M,) float64 on the CPU."""
        num_members = len(next(iter(stack.values())))
        sums_2M = torch.zeros(2, num_members, dtype=torch.float64, device=self.ranks.device)
        for rows in self._chunks(part.kept):
            z_BD, labels_B = self._loaded(part, rows)
            logits_MBK = _logits(stack, z_BD)
            sums_2M[0] += (logits_MBK.max(-1).indices == labels_B).sum(-1)
            sums_2M[1] += cross_entropies(logits_MBK, labels_B).sum(-1, dtype=torch.float64)
        self.ranks.all_reduce([sums_2M])
        return sums_2M[0].cpu(), sums_2M[1].cpu() / part.kept.num_samples


@dataclasses.dataclass(frozen=True)
class _HeldSplit:
    """A split's standardised features (n, D) at one position."""

    z: Tensor
    kept: KeptFeatures


def _logits(stack: Mapping[str, Tensor], z_BD: Tensor) -> Tensor:
    """Logits (M, B, K) of every member's head; `stack` holds weight and bias of its layers in order."""
    values = list(stack.values())
    x = z_BD.expand(len(values[0]), *z_BD.shape)
    for i in range(0, len(values), 2):
        x = torch.baddbmm(values[i + 1][:, None], x.relu() if i else x, values[i].transpose(1, 2))
    return x


class ProbeTask(PackTask):
    """The fit of a pack's heads, as the session's Task; a linear head is the same for all members."""

    def __init__(self, pack: Pack, method: ProbeSettings) -> None:
        super().__init__(pack)
        self.method = method
        self._add("heads", self.heads)
        self.results: list[list[dict[str, Any]]] = []  # by position and head type

    def train(self, split: Split, checkpoints: Checkpoints, progress: Progress) -> None:
        """Fits the heads of one position after the other; the images of `split` are not augmented for it."""
        self.progress = progress
        positions = self.model.positions
        with session_of(self, self.ranks, checkpoints, progress) as session:
            if session.resumed:
                progress.say(f"resuming after {session.position} of {len(positions)} exits")
            prober = Prober(self, self.method)
            progress.start(len(positions), session.position)
            self.standardisations = prober.standardisations
            for p in range(session.position, len(positions)):
                self.results.append(prober.fit(p))
                self.step_number += 1
                progress.advance(prober.train.num_samples, {})
                session.save_if_asked(f"after exit {p}", 0, p + 1)
            self._keep(prober.validation)

    def _keep(self, validation: KeptFeatures) -> None:
        for name, value in self.optimizers["heads"].stack.items():
            self.best["heads"][name].copy_(value)
        flat = [head for heads in self.results for head in heads]
        names = ("l2", "gradient_norm", "num_iterations", "best_epoch")
        for i in range(len(self.members)):
            accuracy_L = [head["accuracy"][i] for head in flat]
            cross_entropy = finite_or_none(sum(head["cross_entropy"][i] for head in flat) / len(flat))
            row: dict[str, Any] = {"member": i, "epoch": 0}
            row["exit_accuracy"] = [*accuracy_L, validation.num_base_correct / validation.num_samples]
            row["validation_mean_cross_entropy"] = cross_entropy
            row |= {name: [head[name][i] if name in head else None for head in flat] for name in names}
            self.rows.append(row)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        return tensors, {**facts, "results": self.results}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().restore(tensors, facts)
        self.results = facts["results"]
