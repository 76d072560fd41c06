"""The sections of a study that belong to one method each."""

from typing import Literal

from dynexit.study.keys import Section, key

METHODS_WITH_SETTINGS = ("jei_dnn", "boosted", "weighted", "dyce")  # each in the section of its name
METHODS_WITH_GATES = ("jei_dnn",)
METHODS_WITH_ONE_HEAD_TYPE = ("jei_dnn", "boosted", "weighted")


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
    max_warm_up_epochs: int = key(6, "most epochs of the heads' warm-up", "epochs", ge=0)
    warm_up_patience: int = key(
        2, "epochs without a better validation accuracy after which a head's warm-up ends", "epochs", ge=1
    )
    bilevel_batch_count: int = key(200, "batches per phase of the alternation of gates and heads", "batches", ge=1)
    alternation: Literal["continuous", "reference"] = key(
        "continuous", "phases run over the steps of training, or start with the gates again at every epoch (reference)"
    )


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
