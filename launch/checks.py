"""What can be known to be wrong before anything starts: mistakes of the study, and models that do not fit it."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynexit.study.grid import Study
    from dynexit.study.schema import Config


def find_misfits(kinds: "Iterable[tuple[Config, bool]]", *, with_data: bool = False) -> list[str]:
    """A sentence for each model that does not fit its configuration; whether weights are looked at comes with each.

    `with_data` also for a data.dir that must be set.
    """
    mistakes: list[str] = []
    for config, weights in kinds:
        from dynexit.data import check_dir
        from dynexit.errors import UserError
        from dynexit.jobs.load import check_model

        try:
            check_model(config, weights=weights)
            if with_data:
                check_dir(config.data)
        except UserError as error:
            mistakes.append(str(error))
    return list(dict.fromkeys(mistakes))


def checked_study(path: Path, overrides: Sequence[str], misfits: Callable[..., list[str]] = find_misfits) -> "Study":
    """The study, its points' keys checked. UserError with every mistake, those of the model's among them."""
    from dynexit.errors import UserError
    from dynexit.study.read import StudyError, load_study

    try:
        return load_study(path, overrides)
    except StudyError as mistakes:
        rest = [] if mistakes.config is None else [(mistakes.config, True)]
        raise UserError("\n".join([str(mistakes), *misfits(rest)])) from None


def check_models(study: "Study", *, dry_run: bool, misfits: Callable[..., list[str]] = find_misfits) -> None:
    """Builds one model of every kind that is not trained yet, for UserError where one does not fit.

    A plan can be made without the files of weights; where they are, they must fit.
    """
    from dynexit.errors import UserError
    from launch.plan import missing_jobs

    kinds: dict[str, tuple[Config, bool]] = {}
    keys: dict[tuple[Any, ...], str] = {}  # points share the sections that they do not differ in
    for stage in ("train", "prepare"):
        for config in (point.config for job in missing_jobs(study, stage) for point in job.points):
            sections = (config.data, config.backbone, config.exits)
            rest = (config.record.topk, config.prepare.num_epochs > 0)
            same = (*map(id, sections), *rest)
            if same not in keys:
                keys[same] = repr((sections, rest))
            kinds[keys[same]] = (config, stage == "prepare")  # the file of weights is read no more after that
    looked_at = [
        (config, first and (not dry_run or Path(config.backbone.weights or "").is_file()))
        for config, first in kinds.values()
    ]
    mistakes = misfits(looked_at, with_data=not dry_run)
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
