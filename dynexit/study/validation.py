"""What is wrong with a study, in sentences: the dotted key, the value, what is allowed, the nearest known key."""

import difflib
import re
from collections.abc import Callable, Iterator

from pydantic import ValidationError

from dynexit.errors import shorten
from dynexit.study.methods import METHODS
from dynexit.study.schema import SECTIONS, Config, method_settings

ALIASES = {
    "arch": "backbone.name",
    "model": "backbone.name",
    "backbone": "backbone.name",
    "weights": "backbone.weights",
    "weights_path": "backbone.weights",
    "pretrained": "backbone.weights",
    "dataset": "data.name",
    "data_dir": "data.dir",
    "img_size": "data.image_size",
    "input_size": "data.image_size",
    "lr": "train.learning_rate",
    "b": "train.global_batch_size",
    "batch": "train.global_batch_size",
    "batch_size": "train.global_batch_size",
    "epoch": "train.num_epochs",
    "epochs": "train.num_epochs",
    "num_epoch": "train.num_epochs",
    "ce_ic_tradeoff": "jei_dnn.ce_ic_tradeoff",
}
"""Names of other programs, as JEI-DNN's, DyCE's and timm's options, and the keys that mean the same here."""


def all_keys() -> list[str]:
    """Every dotted key of the schema, in its order."""
    top = [name for name in Config.model_fields if name not in SECTIONS]
    return top + [f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields]


def changes_results(dotted: str) -> bool:
    """Whether results depend on that key of a section; so they do on every key outside the sections that is swept."""
    section, _, name = dotted.partition(".")
    extra = SECTIONS[section].model_fields[name].json_schema_extra if name else None
    return not isinstance(extra, dict) or bool(extra["changes_results"])


def unknown_key(dotted: str) -> str:
    """Returns that there is no such key, and which one may be meant."""
    known = all_keys()
    section, _, last = dotted.rpartition(".")
    alias = ALIASES.get(last.lower().replace("-", "_"))
    same_end = [name for name in known if name.rpartition(".")[2] == last]
    if alias is not None:
        here = f"{section}.{alias.rpartition('.')[2]}"
        near = [here if here in known else alias]
    else:
        near = same_end or difflib.get_close_matches(dotted, [*known, *SECTIONS, "sweep"], n=1, cutoff=0.6)
    if not near:
        by_end = {name.rpartition(".")[2]: name for name in known}
        near = [by_end[end] for end in difflib.get_close_matches(last, by_end, n=1)]
    hint = f"did you mean {near[0]}?" if near else "`dynexit config STUDY.yaml` lists all keys"
    return f"{shorten(dotted)} is not a key; {hint}"


def sentences(error: ValidationError, prefix: str = "", unknown_key: Callable[[str], str] = unknown_key) -> list[str]:
    """One sentence per key that pydantic found wrong; `prefix` goes before the keys."""
    found: dict[str, str] = {}
    for item in error.errors(include_url=False):
        # a union's branches (str, list[...], literal[...]) stand in the location too: they are no keys
        location = [part for part in item["loc"] if not re.search(r"[\[(]|^(str|int|float|bool|none)$", str(part))]
        dotted = prefix + ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            found.setdefault(dotted, unknown_key(dotted))
            continue
        text = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        text = text[0].lower() + text[1:]
        if dotted in found:
            found[dotted] += f", or {text}" if text not in found[dotted] else ""
        else:
            found[dotted] = f"{shorten(dotted)} = {shorten(repr(item['input']))}: {text}"
    # of a list with a wrong element, the branch that takes no list says nothing
    return [text for dotted, text in found.items() if not any(one.startswith(f"{dotted}.") for one in found)]


def contradictions(config: Config) -> Iterator[str]:
    """Mistakes that only several keys together make."""
    method, settings = METHODS[config.train.method], method_settings(config)
    rates, section = ("train", config.train) if not method.has_own_rates else (method.name, settings)
    if section.min_learning_rate > section.learning_rate:
        yield (
            f"{rates}.min_learning_rate = {section.min_learning_rate}: should be at most {rates}.learning_rate, "
            f"{section.learning_rate}"
        )
    if method.mistakes is not None:
        yield from method.mistakes(settings, config.train.num_epochs)
    if method.max_head_types is not None and len(config.exits.head_types) > method.max_head_types:
        several = sorted(other.name for other in METHODS.values() if other.max_head_types is None)
        yield (
            f"exits.head_types = {config.exits.head_types}: should be one head type where train.method is "
            f"{method.name}; {', '.join(several[:-1])} and {several[-1]} take several"
        )
    if not method.has_gates and config.search.confidence == "gate":
        yield (
            f"search.confidence = 'gate': should be another where train.method is {method.name}, which trains no gates"
        )
    search = config.search
    if search.risk is not None and not config.record.train:
        yield (
            f"search.risk = {search.risk}: needs record.train = true, since what is certified on validation must be "
            "chosen on other samples"
        )
    if search.relative_latency and search.latency is None:
        yield f"search.relative_latency = {search.relative_latency}: needs the measured times in search.latency"
    if isinstance(search.latency, dict) and search.relative_macs:
        yield (
            f"search.relative_macs = {search.relative_macs}: the cost is time where search.latency is given; use "
            "search.relative_latency"
        )
    if search.latency_ms and not config.is_by_time:
        yield f"search.latency_ms = {search.latency_ms}: needs search.latency=measured, the times of stage bench"
    size = search.latency_batch_size
    if config.is_by_time and size is not None and size not in config.bench.batch_sizes:
        yield f"search.latency_batch_size = {size}: should be one of bench.batch_sizes, {config.bench.batch_sizes}"
    yield from _contradictions_of_backbone(config)
    yield from _contradictions_of_features(config)
    yield from _contradictions_of_prepare(config)
    yield from _contradictions_of_baselines(config)
    yield from too_many_ranks(config, config.dist.nodes * config.dist.tasks_per_node)
    if config.prepare.num_epochs and config.prepare.num_warm_up_epochs > config.prepare.num_epochs:
        yield (
            f"prepare.num_warm_up_epochs = {config.prepare.num_warm_up_epochs}: should be at most prepare.num_epochs, "
            f"{config.prepare.num_epochs}"
        )


def too_many_ranks(config: Config, num_ranks: int) -> Iterator[str]:
    """A message if some ranks would have no image of any batch."""
    size = config.train.global_batch_size
    if num_ranks > size:
        yield (
            f"train.global_batch_size = {size}: should be at least {num_ranks}, the number of ranks (dist.nodes x "
            "dist.tasks_per_node, or those that a launcher started), which divide each batch; raise it or start fewer "
            "ranks"
        )


def _contradictions_of_backbone(config: Config) -> Iterator[str]:
    backbone = config.backbone
    for name, value, default in (("at", backbone.at, "auto"), ("feature", backbone.feature, None)):
        if backbone.module is None and value != default:
            yield f"backbone.{name} = {value!r}: needs backbone.module; timm's families have their own places"
    if backbone.module is not None and backbone.weights == "pretrained":
        yield "backbone.weights = 'pretrained': should be a file or null where backbone.module makes the model"


def _contradictions_of_features(config: Config) -> Iterator[str]:
    train, dyce = config.train, config.dyce
    if train.features == "fresh" and train.kept_views:
        yield f"train.kept_views = {train.kept_views}: should be 0 where train.features is fresh; set it to kept"
    if train.features == "fresh" and train.kept_precision != "float32":
        yield f"train.kept_precision = {train.kept_precision!r}: needs train.features=kept"
    if train.features == "kept" and train.method == "dyce" and (dyce.mixup or dyce.cutmix):
        yield (
            f"train.features = 'kept': should be fresh where dyce.mixup = {dyce.mixup:g} and dyce.cutmix = "
            f"{dyce.cutmix:g} mix images; or set both to 0"
        )


def _contradictions_of_prepare(config: Config) -> Iterator[str]:
    prepare, stage = config.prepare, config.dist.deepspeed_stage
    if prepare.min_learning_rate > prepare.learning_rate:
        yield (
            f"prepare.min_learning_rate = {prepare.min_learning_rate}: should be at most prepare.learning_rate, "
            f"{prepare.learning_rate}"
        )
    if stage is not None and prepare.precision == "fp16":
        yield f"dist.deepspeed_stage = {stage}: should be null where prepare.precision is fp16; bf16 needs no scaling"
    if stage is not None and prepare.compile:
        yield f"dist.deepspeed_stage = {stage}: should be null where prepare.compile is true"


def _contradictions_of_baselines(config: Config) -> Iterator[str]:
    baselines = config.baselines
    if baselines.static and config.prepare.num_epochs == 0:
        yield (
            "baselines.static: needs prepare.num_epochs of at least 1, since static networks are fitted from random "
            "weights; remove it or fit the backbone too"
        )
    if {} in baselines.static:
        yield "baselines.static: {} is the backbone itself; give arguments that differ from backbone.arguments"
    if baselines.cascade and not baselines.static:
        yield (
            "baselines.cascade = true: needs baselines.static, the networks that run before the backbone, as "
            "[{channels: [8, 12, 16, 24]}]"
        )
