"""What can be known to be wrong with a study before anything starts: missing files, and models that do not fit it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynexit.errors import UserError
from dynexit.study.baselines import network_name
from dynexit.study.grid import Study
from dynexit.study.keys import DATA_SETS
from dynexit.study.schema import Config
from launch.plan import missing_jobs


def check_models(study: Study, *, dry_run: bool, data_is_here: bool = True) -> None:
    """Raises UserError for all missing files, and if there are none for all models that do not fit.

    Builds one model of every kind that is not trained yet, which imports torch. A plan needs neither data nor the files
    of weights; files of weights that are there must fit. With `data_is_here` false only other machines need the data.
    """
    kinds = _untrained_kinds(study)
    mistakes: list[str] = []
    for config, reads_weights, _ in [] if dry_run else kinds:
        mistakes += _missing_weights(config) if reads_weights else []
        mistakes += _missing_data(config, data_is_here)
    if not mistakes:
        mistakes = _misfits(kinds, dry_run=dry_run)
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))


def _untrained_kinds(study: Study) -> list[tuple[Config, bool, str]]:
    """A configuration for every kind of model that is not trained yet, whether its file of weights will be read, and
    the key of a static network.
    """
    kinds: dict[str, tuple[Config, bool, str]] = {}
    keys: dict[tuple[Any, ...], str] = {}  # points share the sections that they do not differ in
    for stage in ("train", "prepare"):
        for point in (point for job in missing_jobs(study, stage) for point in job.points):
            config = point.config
            sections = (config.data, config.backbone, config.exits)
            rest = (config.record.topk, config.prepare.num_epochs > 0)
            same = (*map(id, sections), *rest)
            if same not in keys:
                keys[same] = repr((sections, rest))
            is_another = point.networks and point.ids["record"] != point.networks[-1]
            name = f"baselines.static {network_name(point)}: " if is_another else ""
            kinds[keys[same]] = (config, stage == "prepare", name)  # later stages read the prepared backbone
    return list(kinds.values())


def _missing_weights(config: Config) -> Iterator[str]:
    weights = config.backbone.weights
    if weights not in (None, "pretrained") and not Path(weights).is_file():
        fault = "is no file" if Path(weights).exists() else "does not exist"
        yield f"weights file {weights!r} {fault}: give the path of a .safetensors or .pth file, or 'pretrained'"


def _missing_data(config: Config, is_here: bool) -> Iterator[str]:
    data = config.data
    if data.name == "digits" or data.name not in DATA_SETS:
        return  # part of scikit-learn; a data set of timm is looked for by timm
    if data.name == "fashion_mnist":
        yield from _missing_fashion_mnist(config) if is_here else ()
    elif data.dir is None:
        yield f"data.dir is not set; {data.name} needs it: the folder with its files"
    elif is_here and not data.download and not Path(data.dir).expanduser().is_dir():
        yield f"data.dir = {data.dir}: there is no such folder; it should be the folder with the files of {data.name}"


def _missing_fashion_mnist(config: Config) -> Iterator[str]:
    from dynexit.data.fashion_mnist import find_fashion_mnist

    try:
        find_fashion_mnist(config.data)
    except UserError as error:
        yield str(error)


def _misfits(kinds: Sequence[tuple[Config, bool, str]], *, dry_run: bool) -> list[str]:
    mistakes = []
    for config, reads_weights, name in kinds:
        from dynexit.jobs.load import check_model

        is_there = Path(config.backbone.weights or "").is_file()
        try:
            check_model(config, weights=reads_weights and (not dry_run or is_there))
        except UserError as error:
            mistakes.append(name + str(error))
    return mistakes


def folders_elsewhere(study: Study) -> list[str]:
    """Returns a message for each data folder that this machine does not have; the nodes of a cluster may."""
    data = (point.config.data for point in study.points)
    folders = dict.fromkeys(one.dir for one in data if one.dir and not one.download)
    return [
        f"data.dir = {folder}: there is no such folder here; the jobs will look for it on their nodes"
        for folder in folders
        if not Path(folder).expanduser().is_dir()
    ]
