"""What can be known to be wrong before anything starts: mistakes of the study, and models that do not fit it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dynexit.config import Config
    from dynexit.sweep import Study


def checked_study(path: Path, overrides: Sequence[str]) -> "Study":
    """The study, its points' keys checked. UserError with every mistake, those of the model's among them."""
    from dynexit.config_io import StudyError, load_study
    from dynexit.errors import UserError

    try:
        return load_study(path, overrides)
    except StudyError as mistakes:
        rest = [] if mistakes.config is None else [(mistakes.config, True)]
        raise UserError("\n".join([str(mistakes), *_misfits(rest)])) from None


def check_models(study: "Study", *, dry_run: bool) -> None:
    """Builds one model of every kind that is not trained yet, for UserError where one does not fit.

    A plan can be made without the files of weights; where they are, they must fit.
    """
    from dynexit.errors import UserError
    from launch.plan import missing_jobs

    kinds: dict[str, tuple[Config, bool]] = {}
    for stage in ("train", "prepare"):
        for job in missing_jobs(study, stage):
            for point in job.points:
                config = point.config
                fitted = config.prepare.num_epochs > 0
                key = repr((config.data, config.backbone, config.exits, config.record.topk, fitted))
                weights = not dry_run or Path(config.backbone.weights or "").is_file()
                kinds[key] = (config, weights and stage == "prepare")  # the file is read no more after that
    mistakes = _misfits(kinds.values(), with_data=not dry_run)
    if mistakes:
        raise UserError("\n".join(mistakes))


def folders_elsewhere(study: "Study") -> list[str]:
    """A sentence for each data folder that this machine does not have; the nodes of a cluster may."""
    data = (point.config.data for point in study.points)
    folders = dict.fromkeys(one.dir for one in data if one.dir and not one.download)
    return [
        f"data.dir = {folder}: there is no such folder here; the jobs will look for it on their nodes"
        for folder in folders
        if not Path(folder).expanduser().is_dir()
    ]


def _misfits(kinds: "Iterable[tuple[Config, bool]]", *, with_data: bool = False) -> list[str]:
    """A sentence for each model that does not fit its configuration; whether weights are looked at comes with each."""
    mistakes: list[str] = []
    for config, weights in kinds:
        from dynexit.assemble import check_model
        from dynexit.data import check_dir
        from dynexit.errors import UserError

        try:
            check_model(config, weights=weights)
            if with_data:
                check_dir(config.data)
        except UserError as error:
            mistakes.append(str(error))
    return list(dict.fromkeys(mistakes))
