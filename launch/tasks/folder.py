"""The folder of a launch: the study as it was then, and a list of jobs with the work of each."""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dynexit.contents import LaunchedJobs
from dynexit.errors import Failure
from dynexit.jobs.planning.missing import Job
from dynexit.run_dir import STUDY, move_aside, read_json, write_json, write_text
from dynexit.study.grid import Point, Study
from dynexit.study.read import load_study, resolved_yaml
from dynexit.study.stages import INFER, STAGES
from launch.tasks.attempts import JOBS, Work


def new_folder(study: Study, kind: str, site: Mapping[str, str] | None = None) -> Path:
    """Makes the study's next folder of that kind, as runs/NAME/slurm/0001. `site` is the profile's path and digest."""
    root = study.directory / kind
    folder = next(path for n in itertools.count(1) if not (path := root / f"{n:04d}").exists())
    write_text(folder / STUDY, resolved_yaml(study, with_meanings=False))
    write_json(folder / JOBS, {"site": site, "arrays": []})
    return folder


def add_array(folder: Path, stage: str, tasks: Mapping[str, list[Work]]) -> None:
    """Adds an array to the list: by job id the packs of each of its tasks."""
    content: dict[str, Any] = read_json(folder / JOBS, LaunchedJobs)
    content["arrays"].append({"stage": stage, "tasks": tasks})
    write_json(folder / JOBS, content)


def work_of(pack: Iterable[Job]) -> Work:
    """The work of a pack, in the order of its jobs."""
    return {job.stage: [_identity(job.stage, point) for point in job.points] for job in pack}


def read_jobs(folder: Path, packs: Iterable[Work]) -> list[tuple[Job, ...]]:
    """The jobs of every pack, for the points of the folder's study.

    Raises Failure if the folder's list has work that its study has not.
    """
    points = load_study(folder / STUDY).all_points
    found: list[tuple[Job, ...]] = []
    by_id: dict[str, dict[str, Point]] = {}
    for pack in packs:
        for stage, ids in pack.items():
            if stage not in by_id:
                by_id[stage] = {_identity(stage, point): point for point in points if stage in (*STAGES, INFER.name)}
            for one in set(ids) - by_id[stage].keys():
                raise Failure(f"{folder / JOBS} is damaged (its study has no {stage} {one}); {move_aside(folder)}")
        found.append(tuple(Job(stage, tuple(by_id[stage][one] for one in ids)) for stage, ids in pack.items()))
    return found


def _identity(stage: str, point: Point) -> str:
    """The id of the stage's work; of a stage that leaves none for a point, as a report, that of its search."""
    return point.ids.get(stage, point.ids["search"])
