"""Models put together from configurations and run directories."""

from collections.abc import Sequence

from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import Configuration, configuration_macs_L
from dynexit.data import DataSets, check_class_order, check_colours, describe_data, load_data, workers_of
from dynexit.deploy.assembly import HeadStack, attach_exits, costs_of, exit_positions
from dynexit.deploy.optimize import with_quick_pooling
from dynexit.dist import Ranks, start_ranks
from dynexit.errors import UserError
from dynexit.jobs.finished import stored_classes
from dynexit.models.backbones import Backbone, build_backbone
from dynexit.models.cut.own import OwnModule
from dynexit.models.heads import StackedGates, StackedHeads
from dynexit.models.multi_exit import MultiExit
from dynexit.models.precision import check_precision, set_precision
from dynexit.run_dir import BACKBONE, HEADS, RunDir
from dynexit.study.grid import Point
from dynexit.study.schema import Config, ExitsSettings

_MOST_WHITENING_BYTES = 10**9  # of the covariances of all exits, in float64; eleven thousand features at one exit


def check_model(config: Config, *, weights: bool) -> float:
    """Raises UserError where backbone, head types, exit positions and record.topk do not fit; builds the model to see.
    Returns the relative MACs of its cheapest configuration, in which everybody leaves at the first exit.

    With `weights` the file of backbone.weights must fit too; what is on a hub is not fetched for that.
    """
    backbone = build_model(config, weights=weights and config.backbone.weights != "pretrained")
    if config.backbone.weights == "pretrained" and config.prepare.num_epochs == 0:
        check_colours(config.data, vars(backbone.model)["default_cfg"])
    if config.prepare.num_epochs == 0:
        check_class_order(config.data)
    model = attach_exits(backbone, exit_positions(backbone, config.exits), config.exits)
    standardises = config.exits.standardise or config.exits.whiten or config.train.method == "probe"
    if model.reads_two and standardises:
        raise UserError(
            f"exits.head_types = {config.exits.head_types}: linear and MLP heads read different features of "
            f"{backbone.name} where they are standardised together; set exits.reader, as token or tokens_average_std"
        )
    if config.exits.whiten:
        _check_whitening(model)
    if (config.record.topk or 1) > backbone.num_classes:
        raise UserError(f"record.topk = {config.record.topk}: should be at most the classes, {backbone.num_classes}")
    costs = costs_of(backbone, config)
    others = ((-1, 1.0),) * (len(costs.positions) - 1)
    leave_first = [Configuration(((head, -1.0), *others)) for head in range(len(costs.head_types))]
    return min(int(configuration_macs_L(one, costs)[0]) for one in leave_first) / costs.full_macs


def _check_whitening(model: MultiExit) -> None:
    widest, num_bytes = max(model.feature_dims), sum(8 * width**2 for width in model.feature_dims)
    if num_bytes > _MOST_WHITENING_BYTES:
        raise UserError(
            f"exits.whiten = true: exits of {model.backbone.name} read up to {widest:,} features, whose covariances "
            f"take {num_bytes / 1e9:.1f} GB; at most {_MOST_WHITENING_BYTES / 1e9:.1f} GB are allowed, since "
            "time rises with the cube of the width: set exits.whiten=false (and exits.standardise=true), "
            "exits.concatenate=false, fewer exits.positions, or another exits.reader"
        )


def build_model(config: Config, *, weights: bool) -> Backbone:
    """The backbone that the configuration names, at the data set's classes and size; with its own weights or random."""
    num_classes, channels = describe_data(config.data)
    if config.backbone.module is not None:
        settings, size = config.backbone, config.data.image_size
        own = OwnModule(config.backbone.module, settings.arguments, settings.at, settings.feature)
        return own.build((channels, size, size), num_classes, settings.weights if weights else None)
    return build_backbone(
        config.backbone.name,
        arguments=config.backbone.arguments,
        num_classes=num_classes,
        image_size=config.data.image_size,
        in_channels=channels,
        weights=config.backbone.weights if weights else None,
        classifier_is_trained=config.prepare.num_epochs > 0,
    )


def ranks_of(config: Config) -> Ranks:
    """The ranks that do a job together, joined as the section `dist` says."""
    return start_ranks(config.dist.device, config.dist.num_threads)


def load_on_ranks(config: Config, ranks: Ranks, *, checked: bool = False) -> DataSets:
    """The data set on every rank; see `load_data`.

    Folders of images are read by the main rank first: the others take what it has stored of them.
    """
    is_stored = config.data.name in ("image_folder", "imagenet")

    def load() -> DataSets:
        return load_data(config.data, workers_of(config.dist, ranks.device), checked=checked)

    with ranks.failing_together():
        data = None if is_stored and not ranks.is_main else load()
    with ranks.failing_together():
        return load() if data is None else data


def begin(point: Point) -> tuple[Ranks, DataSets, MultiExit, ExitCosts]:
    """What every job on a prepared backbone begins with: its ranks, the data that is there, and load_model's two."""
    config = point.config
    ranks = ranks_of(config)
    with ranks.failing_together():
        check_precision(config.backbone.precision, ranks.device)
    data = load_on_ranks(config, ranks, checked=True)
    ranks.once(lambda: check_images(point, data))
    model, costs = load_model(point, ranks)
    return ranks, data, model, costs


def load_model(point: Point, ranks: Ranks) -> tuple[MultiExit, ExitCosts]:
    """The prepared backbone with the point's exit positions, frozen, in its precision, and what everything costs.

    All ranks call it: the main rank alone checks the bytes and counts the MACs.
    """
    config, directory = point.config, RunDir(point, "prepare")
    with ranks.failing_together():
        if ranks.is_main and not directory.is_done(check_bytes=True):
            raise UserError(
                f"the backbone {directory.identity} is not prepared; run `dynexit prepare` on the study first"
            )
        backbone = build_model(config, weights=False)
        backbone.model.load_state_dict(directory.load_tensors(BACKBONE))
    costs = ranks.once(lambda: costs_of(backbone, config))
    model = attach_exits(backbone, costs.positions, config.exits).to(ranks.device)
    set_precision(backbone, config.backbone.precision)
    return model, costs


def quickened(model: MultiExit, exits: ExitsSettings) -> MultiExit:
    """The model as stage bench and infer run it: on a CPU with quick max pooling, which gives the same bits."""
    if next(model.parameters()).device.type != "cpu":
        return model
    return attach_exits(with_quick_pooling(model.backbone), model.positions, exits)


def describe_images(data: DataSets) -> dict[str, tuple[int, str]]:
    """By split what `check_images` compares."""
    return {name: data.split(name).describe() for name in ("train", "validation", "test")}


def check_images(point: Point, data: DataSets) -> None:
    """Raises UserError unless classes and splits are those that the point's backbone was prepared with.

    An image more or less changes which images are in which split, and test images would be some that the backbone was
    fitted to. Folders of versions that stored less are checked by less.
    """
    stored = stored_classes(point)
    if stored is None:
        return
    _check_classes(stored["names"], data)
    before = stored.get("images")
    if before is not None and before != (now := describe_images(data)):
        counts = " and ".join(str(sum(count for count, _ in one.values())) for one in (before, now))
        raise UserError(
            f"the data set's images, or the classes of some, changed since the backbone was prepared ({counts} images "
            "then and now), and with them the splits; restore them, or start a new study with name=NAME"
        )


def _check_classes(names: list[str], data: DataSets) -> None:
    pairs = zip(names, data.class_names, strict=False)
    differing = next(((i, before, now) for i, (before, now) in enumerate(pairs) if before != now), None)
    if differing:
        label, before, now = differing
        raise UserError(
            f"class {label} was {before!r} when the backbone was prepared and is {now!r} now; restore the data set's "
            "folders (or the file of data.class_order), or start a new study with name=NAME"
        )


def load_heads(points: Sequence[Point], model: MultiExit) -> tuple[StackedHeads, StackedGates | None]:
    """The trained heads and gates of `points`, stacked in that order; no gates where the method has none."""
    heads, gates = HeadStack.of(points[0].config).build(model, [point.config.seed for point in points])
    modules = [heads] if gates is None else [heads, gates]
    for i, point in enumerate(points):
        directory = RunDir(point, "train")
        if not directory.is_done(check_bytes=True):
            raise UserError(f"the point {point.label} is not trained; run `dynexit train` on the study first")
        state = directory.load_tensors(HEADS)
        for module in modules:
            module.load_member(i, state)
    return heads, gates
