"""What can be known to be wrong with a study before anything starts: files, models, another's folder."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dynexit.errors import UserError
from dynexit.files import check_weights_file
from dynexit.jobs.planning.missing import missing_jobs
from dynexit.run_dir import read_json, write_json
from dynexit.study.baselines import network_name
from dynexit.study.data.names import check_files
from dynexit.study.grid import Study, fixed_values
from dynexit.study.schema import Config
from dynexit.study.stages import POINT_STAGES
from dynexit.study.validation import sentences


def check_models(study: Study, *, dry_run: bool, data_is_here: bool = True) -> None:
    """Raises UserError for all missing files, if there are none for all models that do not fit, and for budgets of MACs
    below what the cheapest of them takes.

    Builds one model of every kind that is not trained yet, which imports torch. A plan needs neither data nor the files
    of weights; files of weights that are there must fit. With `data_is_here` false only other machines need the data.
    """
    kinds = _untrained_kinds(study)
    if not kinds:
        return
    cheapest: list[float] = []

    def check_fit(config: Config, reads_weights: bool) -> None:
        from dynexit.jobs.load import check_model

        is_there = Path(config.backbone.weights or "").is_file()
        cheapest.append(check_model(config, weights=reads_weights and (not dry_run or is_there)))

    def check_data(config: Config, _: bool) -> None:
        data = config.data
        check_files(data.name, data.dir, download=data.download, is_here=data_is_here)

    if not dry_run:
        _check(kinds, _check_weights, check_data)
    _check(kinds, check_fit)
    if not (study.directory / "train").is_dir():  # else what is trained already may attain them
        _check_attainable(study, min(cheapest))


def _check_attainable(study: Study, cheapest: float) -> None:
    """Raises UserError for budgets below the relative MACs of the cheapest configuration."""
    budgets = {value for point in study.points for value in point.config.search.relative_macs}
    low = [f"{value:g}" for value in sorted(budgets) if value < cheapest]
    if low:
        least = math.ceil(1e4 * cheapest) / 1e4
        raise UserError(
            f"search.relative_macs = {', '.join(low)}: the cheapest exit takes {least:.4f} of the backbone's MACs; ask "
            "for that or more, or set exits.positions to earlier blocks or exits.stem=true"
        )


def _check_weights(config: Config, reads_weights: bool) -> None:
    if reads_weights and config.backbone.weights not in (None, "pretrained"):
        check_weights_file(Path(str(config.backbone.weights)))


def _check(kinds: list[tuple[Config, bool, str]], *checks: Callable[[Config, bool], None]) -> None:
    """Raises one UserError with the messages of all checks that fail."""
    mistakes: dict[str, None] = {}
    for check in checks:
        for config, reads_weights, name in kinds:
            try:
                check(config, reads_weights)
            except UserError as error:
                mistakes[f"{name}{error}"] = None
    if mistakes:
        raise UserError("\n".join(mistakes))


def _untrained_kinds(study: Study) -> list[tuple[Config, bool, str]]:
    """A configuration for every kind of model that is not trained yet, whether its file of weights will be read, and
    for a static network its key.
    """
    kinds: dict[str, tuple[Config, bool, str]] = {}
    for stage in ("train", "prepare"):
        for point in (job.points[0] for job in missing_jobs(study, stage)):  # those of a pack have one kind of model
            config = point.config
            is_another = point.networks and point.ids["record"] != point.networks[-1]
            name = f"baselines.static {network_name(point)}: " if is_another else ""
            sections = (config.data, config.backbone, config.exits, config.record.topk, config.prepare.num_epochs > 0)
            kinds[repr(sections)] = (config, stage == "prepare", name)  # later stages read the prepared backbone
    return list(kinds.values())


def folders_elsewhere(study: Study) -> list[str]:
    """Returns a message for each data folder that this machine does not have; the nodes of a cluster may."""
    data = (point.config.data for point in study.points)
    folders = dict.fromkeys(one.dir for one in data if one.dir and not one.download)
    return [
        f"data.dir = {folder}: there is no such folder here; the jobs will look for it on their nodes"
        for folder in folders
        if not Path(folder).expanduser().is_dir()
    ]


def check_identity(study: Study) -> None:
    """Raises UserError if the study's run directory has results for another backbone; else notes this one there.

    Raises it too for a name, which a renamed folder gave, that could not be read again. With another fixed key of data,
    backbone or prepare nothing in the folder can be used again, which is a mistake more often than not. Other keys are
    covered by the points' ids.
    """
    try:
        Config(name=study.config.name)
    except ValidationError as error:
        raise UserError(f"{sentences(error)[0]}; rename the folder {study.directory}") from None
    path = study.directory / "study.json"
    values = fixed_values(study)
    before = values
    if any((study.directory / name).exists() for name in (*POINT_STAGES, "submitted")):
        with contextlib.suppress(FileNotFoundError):
            before = read_json(path, dict[str, Any])
    for name, value in values.items():
        if name in before and before[name] != value:
            raise UserError(
                f"{study.directory} was made by another configuration: {name} was {before[name]!r} there and is "
                f"{value!r} now; choose another folder with name=NAME, sweep the key, or move {study.directory} aside"
            )
    if before is values or before != values:
        write_json(path, values)
