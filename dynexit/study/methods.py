"""The methods that train exits: a table with a row per method, and the sections of a study that belong to one each.

A new method is a file in `dynexit/train` with its task and a row here; keys of its own also need a field of `Config`.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from dynexit.study.keys import Section, key, no_duplicates


class JeiDnnSettings(Section):
    ce_ic_tradeoff: float = key(
        0.7, "weight of the inference cost against the cross-entropy", "nats per full cost", ge=0
    )
    head_loss: Literal["reference", "paper", "single"] = key(
        "paper",
        "reference: uniform cross-entropy; paper: weighted by the exit probabilities; single: of the exit taken",
    )
    gate_objective: Literal["ce", "prob", "zero_one"] = key("ce", "prediction error in the gates' targets")
    positive_weight: Literal["reference", "cumulative", "none"] = key(
        "none", "class balance of each gate's loss: from exact counts (reference), from counts up to it, or none"
    )
    warm_up: Literal["sgd", "convex"] = key(
        "sgd",
        "how heads are trained before the gates: for max_warm_up_epochs, or to convergence on the plain training "
        "images, as method probe with its defaults does",
        omit_default=True,
    )
    max_warm_up_epochs: int = key(
        6,
        "most epochs of the heads' warm-up; half of train.num_epochs if those are not more",
        "epochs",
        ge=0,
    )
    warm_up_patience: int = key(
        2, "epochs without a better validation accuracy after which a head's warm-up ends", "epochs", ge=1
    )
    bilevel_batch_count: int = key(200, "batches per phase of the alternation of gates and heads", "batches", ge=1)
    alternation: Literal["continuous", "reference"] = key(
        "continuous", "phases run over the steps of training, or start with the gates again at every epoch (reference)"
    )

    def most_warm_up_epochs(self, num_epochs: int) -> int:
        """Returns the bound on the warm-up's epochs in a training of `num_epochs`."""
        return self.max_warm_up_epochs if self.max_warm_up_epochs < num_epochs else num_epochs // 2


class BoostedSettings(Section):
    shrinkage: float = key(0.5, "what of the logits of the exit before is added to an exit's own", ge=0, le=1)


class WeightedSettings(Section):
    meta_interval: int = key(100, "batches from one update of the weighting network to the next", "batches", ge=1)
    strength: float = key(0.3, "how unequal samples may weigh: their weights lie within twice this of 1", ge=0, le=1)
    hidden_width: int = key(500, "width of the weighting network", ge=1)
    learning_rate: float = key(1e-4, "learning rate of the weighting network (Adam)", gt=0)
    weight_decay: float = key(1e-4, "weight decay of the weighting network", ge=0)
    exit_ratio: float = key(
        0.75, "share of samples allotted to each exit over that of the exit before, when the network is judged", gt=0
    )


class DyceSettings(Section):
    loss: Literal["ce", "weighted", "distill"] = key(
        "ce",
        "ce: cross-entropy; weighted: scaled by 2 x (1 - confidence of the first exit) at all later ones; distill: "
        "divergence from the backbone's own classifier, no labels",
    )
    learning_rate: float = key(6.25e-4, "peak learning rate of AdamW, as published for batches of 512", gt=0)
    min_learning_rate: float = key(1e-6, "where the cosine ends", ge=0)
    weight_decay: float = key(0.05, "weight decay, decoupled", ge=0)
    num_warm_up_epochs: int = key(5, "epochs over which the learning rate rises", "epochs", ge=0)
    mixup: float = key(0.8, "alpha of mixup; 0 has none", ge=0)
    cutmix: float = key(1.0, "alpha of cutmix; 0 has none, with mixup each batch has one of the two", ge=0)
    label_smoothing: float = key(0.1, "label smoothing", ge=0, lt=1)
    ema_decay: float = key(
        0.9999, "decay of the moving average of the weights, reached gradually, that is kept; 0 has none", ge=0, lt=1
    )


class ProbeSettings(Section):
    l2: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1), AfterValidator(no_duplicates)] = key(
        lambda: [1e-2, 1e-3, 1e-4, 1e-5],
        "penalties on a linear head's squared weights, tried in this order, each from the fit of the one before; the "
        "lowest cross-entropy on validation is kept",
    )
    max_iterations: int = key(15, "most iterations of L-BFGS for a penalty", "iterations", ge=1)
    learning_rate: float = key(2e-3, "peak learning rate of AdamW for MLP heads, then a cosine to 0", gt=0)
    weight_decay: float = key(1e-4, "weight decay of MLP heads, decoupled", ge=0)
    global_batch_size: int = key(128, "samples per step of MLP heads, over all ranks", "samples", ge=1)
    num_epochs: int = key(20, "most epochs of MLP heads, over the kept features", "epochs", ge=1)
    patience: int = key(
        3, "epochs without a lower cross-entropy on validation after which an MLP head is done", "epochs", ge=1
    )


def _dyce_mistakes(settings: DyceSettings, num_epochs: int) -> Iterator[str]:
    if settings.num_warm_up_epochs >= num_epochs:
        yield (
            f"dyce.num_warm_up_epochs = {settings.num_warm_up_epochs}: should be less than train.num_epochs, "
            f"{num_epochs}"
        )


@dataclasses.dataclass(frozen=True)
class Method:
    """What the rest of the program needs to know of a method."""

    name: str
    task: str
    """`module:class` of its training, a subclass of `dynexit.train.pack.PackTask`: task(pack, settings)."""
    settings: type[Section] | None = None
    """Its own keys, in the section of its name."""
    has_gates: bool = False
    max_head_types: int | None = None
    """Most exit heads at a position; None for any number."""
    pack_keys: tuple[str, ...] = ()
    """Keys of its section that members of one pack may differ in (`seed` always may)."""
    is_additive: bool = False
    """Whether an exit's logits include `shrinkage` (a key of its section) times those of the exit before."""
    has_own_rates: bool = False
    """Whether learning_rate and min_learning_rate are keys of its section instead of `train`."""
    is_augmented: bool = True
    """Whether it trains on augmented images; those of others are plain."""
    mistakes: Callable[[Any, int], Iterator[str]] | None = None
    """Yields what is wrong with its settings for a number of epochs."""

    def task_class(self) -> Callable[..., Any]:
        """Returns the class of its training. Imports torch."""
        module, _, name = self.task.partition(":")
        task: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return task


METHODS: dict[str, Method] = {}
"""By the name that `train.method` takes."""


def register_method(method: Method) -> None:
    """Adds a method to the table. Raises ValueError where its name is taken."""
    if method.name in METHODS:
        raise ValueError(f"there is already a method {method.name!r}; choose another name")
    METHODS[method.name] = method


for _method in (
    Method(
        "jei_dnn",
        "dynexit.train.jei_dnn:JeiDnnTask",
        JeiDnnSettings,
        has_gates=True,
        max_head_types=1,
        pack_keys=("ce_ic_tradeoff",),
    ),
    Method("independent", "dynexit.train.independent:IndependentTask"),
    Method("boosted", "dynexit.train.independent:BoostedTask", BoostedSettings, max_head_types=1, is_additive=True),
    Method("weighted", "dynexit.train.weighted:WeightedTask", WeightedSettings, max_head_types=1),
    Method("probe", "dynexit.train.probe:ProbeTask", ProbeSettings, is_augmented=False),
    Method("dyce", "dynexit.train.dyce:DyceTask", DyceSettings, has_own_rates=True, mistakes=_dyce_mistakes),
):
    register_method(_method)


def known_method(name: str) -> str:
    """Returns `name`. Raises ValueError where no method has it."""
    if name not in METHODS:
        raise ValueError(f"should be one of {', '.join(METHODS)}")
    return name


def sections_of_methods() -> tuple[str, ...]:
    """Returns the names of the sections that belong to one method each."""
    return tuple(method.name for method in METHODS.values() if method.settings is not None)
