"""The schema of a study: every key with its default, its unit and its meaning in one line.

A key marked `changes_results=False` says where or how fast something is done, never what comes out, so it is no part
of an id. Everything else is: two studies with the same values of the sections a job depends on share that job's work.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dynexit.study.data.settings import DataSettings as DataSettings
from dynexit.study.dist import DistSettings
from dynexit.study.keys import (
    Budgeted,
    ConfidenceName,
    FunctionName,
    HeadType,
    Position,
    SearchMethodName,
    Section,
    Weight,
    key,
    known_weights,
    no_duplicates,
    none_as_null,
)
from dynexit.study.methods import (
    BoostedSettings,
    DyceSettings,
    JeiDnnSettings,
    ProbeSettings,
    WeightedSettings,
    known_method,
)
from dynexit.study.outcomes import BaselinesSettings, BenchSettings, InferSettings, ReportSettings


class BackboneSettings(Section):
    name: str = key("resnet18", "model: a timm name of a supported family, or t2t_vit_7 and its like")
    arguments: dict[str, Any] = key(dict, "arguments of the model's constructor, as timm names them")
    weights: str | None = key(
        None, "weights to start from: a .safetensors or .pth file, 'pretrained' (timm's hub), or null"
    )
    module: FunctionName | None = key(
        None,
        "function package.module:function that returns the model, an nn.Module, in place of name; arguments are its "
        "own; needs --allow-code package.module",
        omit_default=True,
    )
    at: Literal["auto"] | Annotated[list[str], Field(min_length=1), AfterValidator(no_duplicates)] = key(
        "auto",
        "sub-modules of backbone.module at whose ends exits may sit, in order, as `dynexit cut` lists them; auto: the "
        "ends of the blocks that repeat",
        omit_default=True,
    )
    feature: Literal["channels_first", "channels_last", "tokens", "class_token"] | None = key(
        None,
        "what exits read of backbone.module: the mean over a map with its channels first or last, over tokens, or the "
        "class token; null infers it from the shapes",
        omit_default=True,
    )
    precision: Literal["float32", "tf32", "bf16"] = key(
        "float32",
        "arithmetic of the frozen backbone (exits and losses are float32): bf16 is fastest on a GPU, tf32 needs one",
        omit_default=True,
    )
    channels_last: Literal["auto"] | bool = key(
        "auto",
        "whether the frozen backbone's maps lie channels last in memory, which changes its rounding; auto: on a GPU "
        "in bf16 or tf32",
        changes_results=False,
    )
    compile: bool = key(
        False,
        "whether torch.compile makes the frozen backbone's passes faster in training and recording, which changes its "
        "rounding; takes up to minutes at the start of a job, and a C++ compiler on a CPU",
        changes_results=False,
    )


class PrepareSettings(Section):
    num_epochs: int = key(20, "epochs of fitting the backbone to the data set; 0 takes it as it is", "epochs", ge=0)
    optimizer: Literal["sgd", "adamw"] = key("sgd", "optimizer of the backbone")
    learning_rate: float = key(0.1, "peak learning rate of its head, reached after the warm-up, then a cosine", gt=0)
    min_learning_rate: float = key(0.0, "where the head's cosine ends", ge=0)
    stem_rate: float = key(1.0, "learning rate of the stem, all before the first block", "of the head's", ge=0)
    block_rate: float = key(1.0, "learning rate of the blocks", "of the head's", ge=0)
    layer_decay: float = key(
        1.0, "factor on the rate from the head to the last block, from block to block, and to the stem", gt=0, le=1
    )
    frozen: list[str] = key(list, "weights and modules of the model that stay as they are, as norm or cls_token")
    momentum: float = key(0.9, "momentum of sgd", ge=0, lt=1)
    weight_decay: float = key(5e-4, "weight decay", ge=0)
    decay_all: bool = key(False, "whether weight decay acts on biases and norms too")
    clip_norm: float | None = key(None, "norm that the whole batch's gradient is clipped to; null clips none", gt=0)
    num_warm_up_epochs: int = key(1, "epochs over which the learning rate rises", "epochs", ge=0)
    label_smoothing: float = key(0.0, "label smoothing of the cross-entropy", ge=0, lt=1)
    global_batch_size: int = key(64, "images per step over all ranks", "images", ge=1)
    micro_batch_size: int | None = key(
        None, "images that pass through the model of a rank at once, gradients adding up; null: all", "images", ge=1
    )
    precision: Literal["float32", "bf16", "fp16"] = key(
        "float32", "arithmetic of the model's products; weights and losses are float32, fp16's gradients scaled"
    )
    channels_last: bool = key(False, "whether images lie channels last in memory", changes_results=False)
    compile: bool = key(False, "whether torch.compile makes the training's passes faster", changes_results=False)


class ExitsSettings(Section):
    positions: (
        Literal["all", "last"] | Annotated[list[Position], Field(min_length=1), AfterValidator(no_duplicates)]
    ) = key("all", "indices of the blocks after which an exit sits; all = every block but the last; last = it alone")
    head_types: Annotated[list[HeadType], Field(min_length=1), AfterValidator(no_duplicates)] = key(
        lambda: ["linear"], "exit heads at every position: linear, or mlp{n}x{w} (n linear layers, hidden width w)"
    )
    reader: Literal["average", "average_max_std", "token", "tokens_average_std", "grid2", "grid4"] | None = key(
        None,
        "what exits read: average, with maximum and standard deviation (best for maps), on a grid of 2x2 or 4x4; of "
        "tokens: class token, average, or both and standard deviation (best for tokens); null: token, else average",
        omit_default=True,
    )
    concatenate: bool = key(False, "whether an exit reads what all exits before it read too", omit_default=True)
    stem: bool = key(False, "whether an exit sits before the first block too (position -2 in files)", omit_default=True)
    standardise: bool = key(
        False,
        "whether features are brought to mean 0 and deviation 1 on the training split for training (probe always does)",
        omit_default=True,
    )
    whiten: bool = key(False, "whether they are decorrelated too, with 1e-3 added to each variance", omit_default=True)


class TrainSettings(Section):
    method: Annotated[str, AfterValidator(known_method)] = key(
        "jei_dnn", "how exits are trained; a method's own keys stand in the section of its name, if it has any"
    )
    num_epochs: int = key(15, "epochs, the warm-up's included", "epochs", ge=1)
    global_batch_size: int = key(64, "images per step over all ranks", "images", ge=1)
    micro_batch_size: int | None = key(
        None,
        "images that pass through the backbone of a rank at once; null: its share of a batch. Takes less of a GPU's "
        "memory, and a batch means the same",
        "images",
        changes_results=False,
        ge=1,
    )
    learning_rate: float = key(
        0.01, "peak learning rate of heads and gates (dyce has its own), then a cosine after any warm-up", gt=0
    )
    min_learning_rate: float = key(2e-4, "where the cosine ends", ge=0)
    momentum: float = key(0.9, "momentum of the stochastic gradient descent", ge=0, lt=1)
    weight_decay: float = key(5e-4, "weight decay of heads and gates", ge=0)
    keep: Literal["last", "best"] = key(
        "best",
        "weights kept: the last, or those with the lowest validation cross-entropy + tradeoff x cost of the exit taken "
        "(without gates: with the lowest mean cross-entropy of the exits)",
    )
    distillation: float = key(
        0.0, "weight of the exits' divergence from the backbone's own classifier, added to their cross-entropy", ge=0
    )
    precision: Literal["float32", "float64"] = key("float32", "arithmetic of heads and gates")
    features: Literal["fresh", "kept"] = key(
        "fresh",
        "fresh: the backbone runs in every epoch; kept: once for each image, and what exits read is stored in "
        "runs_dir/features, for all epochs, points, methods and studies that share it",
        omit_default=True,
    )
    kept_views: int = key(
        0,
        "augmented views kept of each training image, epoch e trains on view e modulo their number; 0: plain images",
        "views",
        ge=0,
        omit_default=True,
    )
    kept_precision: Literal["float32", "bf16"] = key(
        "float32", "numbers that kept features are stored in; bf16 takes half the room", omit_default=True
    )
    max_feature_gb: float = key(
        16.0, "most disk space of the features that one training reads", "GB", changes_results=False, gt=0
    )


class RecordSettings(Section):
    topk: int | None = key(
        None, "most probable classes kept per exit; null: all of at most 10, else 1", "classes", ge=1
    )
    batch_size: int = key(256, "images per forward pass", "images", ge=1)
    samples_per_shard: int = key(65536, "most samples in one shard", "samples", ge=1)
    train: bool = key(False, "whether the training split is recorded too, its images not augmented (for search.risk)")


class SearchSettings(Section):
    accuracy_weights: Annotated[str | list[Weight], AfterValidator(known_weights)] = key(
        "0.4:1:0.01", "preferences searched: weights of accuracy against MACs, as LO:HI:STEP (HI included) or a list"
    )
    confidence: ConfidenceName = key("max_probability", "what is compared with an exit's threshold")
    method: SearchMethodName = key(
        "exact", "how an accuracy weight's configuration is found: exactly, or one of DyCE's ways with exact thresholds"
    )
    normalize: bool = key(False, "whether accuracy and MACs are mapped to [0, 1] first, as DyCE does")
    refine: bool = key(True, "whether thresholds lie between any two samples, or between bins of samples alone")
    num_random_starts: int = key(4, "random starts of the search beside the neighbours' answers", "starts", ge=0)
    relative_macs: list[Budgeted] = key(
        list, "budgets: best accuracy within this share of the backbone's MACs; each adds a configuration"
    )
    relative_latency: list[Budgeted] = key(list, "budgets: the same of the backbone's time; needs search.latency")
    latency_ms: list[Budgeted] = key(
        list, "budgets: the same of a batch's mean time; needs search.latency=measured", "ms", omit_default=True
    )
    latency_batch_size: int | None = key(
        None,
        "batch size of budgets of measured time; null takes the smallest of bench.batch_sizes",
        "images",
        ge=1,
        omit_default=True,
    )
    min_accuracy: list[Weight] = key(list, "budgets: least cost with at least this accuracy on validation")
    max_accuracy_drop: list[Weight] = key(list, "budgets: least cost that loses at most this accuracy on validation")
    latency: Annotated[Literal["measured"] | dict[str, Any] | None, BeforeValidator(none_as_null)] = key(
        None,
        "measured: configurations chosen by the times of stage bench, for each of its batch sizes, are added to those "
        "chosen by MACs; a table (stage_seconds, head_seconds and maybe gate_seconds) is searched instead of MACs; "
        "null or none: MACs alone",
    )
    risk: float | None = key(
        None,
        "certified: least cost where the backbone is right and the exits wrong for at most this share; needs "
        "record.train",
        "of all samples",
        gt=0,
        lt=1,
    )
    risk_confidence: float = key(0.95, "confidence of that certificate", gt=0, lt=1)
    calibration_share: float = key(0.0, "share of validation kept from the search to calibrate on", ge=0, lt=1)
    workers: int = key(1, "processes that search points at the same time", changes_results=False, ge=1)


class Config(Section):
    """One setting of everything: a study's base, or a point of it."""

    name: str = Field(
        "study",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="folder of the study in runs_dir; default: the file's name",
    )
    runs_dir: str = key("runs", "folder for the results, relative to the working directory", changes_results=False)
    seed: int = key(0, "initialisation of exit heads and gates", ge=0, lt=2**31)
    data: DataSettings = Field(default_factory=DataSettings)
    backbone: BackboneSettings = Field(default_factory=BackboneSettings)
    prepare: PrepareSettings = Field(default_factory=PrepareSettings)
    exits: ExitsSettings = Field(default_factory=ExitsSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    jei_dnn: JeiDnnSettings = Field(default_factory=JeiDnnSettings)
    boosted: BoostedSettings = Field(default_factory=BoostedSettings)
    weighted: WeightedSettings = Field(default_factory=WeightedSettings)
    probe: ProbeSettings = Field(default_factory=ProbeSettings)
    dyce: DyceSettings = Field(default_factory=DyceSettings)
    record: RecordSettings = Field(default_factory=RecordSettings)
    bench: BenchSettings = Field(default_factory=BenchSettings)
    search: SearchSettings = Field(default_factory=SearchSettings)
    baselines: BaselinesSettings = Field(default_factory=BaselinesSettings)
    report: ReportSettings = Field(default_factory=ReportSettings)
    infer: InferSettings = Field(default_factory=InferSettings)
    dist: DistSettings = Field(default_factory=DistSettings)

    @property
    def study_dir(self) -> Path:
        """The study's folder."""
        return Path(self.runs_dir) / self.name

    @property
    def is_by_time(self) -> bool:
        """Whether the search reads the times that stage bench measures."""
        return self.search.latency == "measured"


def method_settings(config: Config) -> Any:
    """Returns the section of the configuration's method, None where it has none."""
    return getattr(config, config.train.method, None)


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
