"""How the backbone's weights are updated: rates by layer, and the step of a model that every rank holds whole."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynexit.dist import Ranks
from dynexit.errors import Failure, UserError
from dynexit.models.backbones import Backbone
from dynexit.study.schema import PrepareSettings

Groups = list[dict[str, Any]]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Updates(Protocol):
    """A model whose weights, gradients and optimizer states lie somewhere, and the steps that it takes."""

    layout: str  # how a checkpoint's optimizer states are laid out, and over how many ranks
    lockstep: bool  # whether all ranks must run the model equally often

    def logits(self, images: Tensor) -> Tensor:
        """(B, K), for training."""

    def evaluate(self, images: Tensor) -> Tensor:
        """(B, K) in float32, the model being in eval mode."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of a share of a batch's loss; `last` says that `step` follows."""

    def step(self, share: float, rate: float) -> None:
        """One step at `rate` times each group's factor, on the gradients of all ranks; this rank had that share."""

    def weights(self) -> dict[str, Tensor]:
        """The model's state, whole, on the main rank; called on all of them."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What else a resumed run needs: tensors, whole on the main rank, and facts; called on all ranks."""

    def restore(self, weights: dict[str, Tensor], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Puts back what `weights` and `state` gave."""


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


def parameter_groups(backbone: Backbone, settings: PrepareSettings) -> Groups:
    """The weights that are trained, by `factor` of the learning rate and `weight_decay`.

    Stem and blocks have factors of their own (JEI-DNN, section 5); from the tail to the stem each layer has
    `layer_decay` times the rate of the one behind it. Weight decay acts on matrices and kernels, or on everything.
    """
    layers, last = backbone.layers(), backbone.num_blocks + 1
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in backbone.model.named_parameters():
        if weight.requires_grad:
            layer = layers[name]
            own = settings.stem_rate if layer == 0 else settings.block_rate if layer < last else 1.0
            decay = settings.weight_decay if weight.dim() > 1 or settings.decay_all else 0.0
            groups.setdefault((own * settings.layer_decay ** (last - layer), decay), []).append(weight)
    return [{"params": params, "factor": factor, "weight_decay": decay} for (factor, decay), params in groups.items()]


def make_optimizer(groups: Groups, settings: PrepareSettings) -> torch.optim.Optimizer:
    """The optimizer that the settings name."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)


def set_rate(groups: Groups, rate: float) -> None:
    """The learning rate of the next step, each group's own share of it."""
    for group in groups:
        group["lr"] = rate * group["factor"]


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """What torch.compile cannot do, as one sentence instead of its own hundred lines."""
    try:
        yield
    except RuntimeError as error:  # looked at by name: importing the class takes seconds
        if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Failure(
            f"prepare.compile = true: torch.compile failed ({reason}); mend its compiler, empty its cache "
            "(TORCHINDUCTOR_CACHE_DIR), or set prepare.compile=false"
        ) from error


class WholeModel:
    """Every rank holds the model; gradients, and what batch norms have seen, are summed over ranks."""

    layout, lockstep = "whole", False

    def __init__(self, model: nn.Module, groups: Groups, settings: PrepareSettings, ranks: Ranks) -> None:
        self.model, self.settings, self.ranks = model, settings, ranks
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        self.parameters = [weight for group in groups for weight in group["params"]]
        self.optimizer = make_optimizer(groups, settings)
        self.norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.precision == "fp16")
        self.scaler.scale(torch.zeros(1, device=ranks.device))  # a rank without samples needs it started too
        self._run = torch.compile(model) if settings.compile else model

    def logits(self, images: Tensor) -> Tensor:
        if self.settings.channels_last:
            images = images.to(memory_format=torch.channels_last)
        dtype = _AUTOCAST.get(self.settings.precision)
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None), _compiling():
            logits: Tensor = self._run(images)
        return logits.float()

    def evaluate(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with _compiling():  # of the backward pass, which may be left until here
            torch.autograd.backward(self.scaler.scale(loss))

    def step(self, share: float, rate: float) -> None:
        if self.ranks.world_size > 1:
            self._sum_over_ranks(share)
        self.scaler.unscale_(self.optimizer)  # of the sums, so that all ranks agree on an overflow
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        set_rate(self.optimizer.param_groups, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _sum_over_ranks(self, share: float) -> None:
        used = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.int64, device=self.ranks.device)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        statistics = weigh_statistics(self.norms, share, self.ranks)
        self.ranks.all_reduce([used, *statistics, *(p.grad for p in self.parameters if p.grad is not None)])
        for parameter, count in zip(self.parameters, used.tolist(), strict=True):
            if not count:  # the model does not use it, and weight decay must not either
                parameter.grad = None

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        slots = self.optimizer.state_dict()["state"]
        tensors = {
            f"{i}.{name}": torch.as_tensor(value)
            for i, values in slots.items()
            for name, value in values.items()
            if value is not None
        }
        return tensors, {"scaler": self.scaler.state_dict()}

    def restore(self, weights: dict[str, Tensor], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.model.load_state_dict(weights)
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            i, slot = name.split(".", 1)
            slots.setdefault(int(i), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(facts["scaler"])


def weigh_statistics(norms: Iterable[nn.modules.batchnorm._BatchNorm], share: float, ranks: Ranks) -> list[Tensor]:
    """The running statistics of batch norms, so weighted that their sums over ranks are to replace them.

    A rank normalises by the statistics of what passes through it at once; what is kept for evaluation is the mean over
    ranks, each by its share of the batch, and so the same everywhere.
    """
    statistics: list[Tensor] = []
    for norm in norms:
        if not norm.training or norm.running_mean is None or norm.running_var is None:
            continue
        statistics += [norm.running_mean.mul_(share), norm.running_var.mul_(share)]
        if norm.num_batches_tracked is not None:
            statistics.append(norm.num_batches_tracked.mul_(int(ranks.is_main)))
    return statistics
