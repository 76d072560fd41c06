"""Study -> points -> packs -> jobs: what is missing, and what can be done together."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynexit.errors import UserError
from dynexit.jobs.finished import is_recorded, report_is_done, unfinished_packs
from dynexit.run_dir import RunDir, read_json, write_json
from dynexit.study.dist import DistSettings
from dynexit.study.grid import Point, Study, canonical_json, digest, fixed_values
from dynexit.study.methods import METHODS
from dynexit.study.schema import method_settings
from dynexit.study.stages import POINT_STAGES, stage_of


@dataclasses.dataclass(frozen=True)
class Job:
    """Work for one process (or one group of ranks): the stage and the points it is done for."""

    stage: str
    points: tuple[Point, ...]

    @property
    def study_dir(self) -> Path:
        """The folder of the points' study."""
        return self.points[0].study_dir

    @property
    def name(self) -> str:
        return (
            f"{self.stage} {len(self.points)} points"
            if len(self.points) > 1
            else f"{self.stage} {self.points[0].label}"
        )


def done_together(stage: str, dist: DistSettings) -> bool:
    """Whether all ranks that the study asks for do a job of this stage; what is not is work for one process."""
    ranks = stage_of(stage).ranks
    return ranks == "all" or (ranks == "study" and (dist.prepare_on_all_ranks or dist.deepspeed_stage is not None))


def missing_jobs(study: Study, stage: str, *, check_bytes: bool = False) -> list[Job]:
    """The jobs of a stage (not report) that are not done yet, in order.

    Raises Failure, naming the file, where something finished was damaged.
    """

    def is_finished(point: Point) -> bool:
        if stage == "record":
            return is_recorded(point, check_bytes=check_bytes)
        return RunDir(point, stage).is_done(check_bytes=check_bytes)

    begun = (study.directory / stage).is_dir()  # of a new sweep of thousands of points not each is asked for
    points = [point for point in study.all_points if not begun or not is_finished(point)]
    if stage == "prepare":
        groups = list({point.ids["prepare"]: [point] for point in reversed(points)}.values())[::-1]
    elif stage == "search":
        groups = [points] if points else []
    else:
        everyone = study.all_points if stage == "train" else points
        groups = make_packs(points, study.config.dist.members_per_pack, unfinished_packs(study.directory), everyone)
    return [Job(stage, tuple(group)) for group in groups]


def make_packs(
    points: Sequence[Point],
    members_per_pack: int,
    unfinished: Sequence[Sequence[str]] = (),
    everyone: Sequence[Point] = (),
) -> list[list[Point]]:
    """Puts points that differ only in seed and in their method's pack_keys together, at most `members_per_pack` in one.

    Packs that were begun before (`unfinished`: lists of ids) stay as they were, so that their checkpoints serve and the
    bits do not change: with those of `everyone` that a pack had finished when it was killed.
    """
    by_id = {point.id: point for point in points}
    free = {point.id: point for point in everyone} | by_id
    packs = []
    for ids in unfinished:
        if not by_id.keys().isdisjoint(ids) and free.keys() >= set(ids):
            packs.append([free.pop(identity) for identity in ids])
            for identity in ids:
                by_id.pop(identity, None)
    groups: dict[str, list[Point]] = {}
    keys: dict[tuple[Any, ...], str] = {}  # points share the sections that they do not differ in
    for point in by_id.values():
        config = point.config
        same = (point.ids["prepare"], *map(id, (config.exits, config.train, config.record, method_settings(config))))
        if same not in keys:
            keys[same] = _pack_key(point)
        groups.setdefault(keys[same], []).append(point)
    for group in groups.values():
        packs += [group[i : i + members_per_pack] for i in range(0, len(group), members_per_pack)]
    return packs


def _pack_key(point: Point) -> str:
    config = point.config
    settings = json.loads(canonical_json(method_settings(config))) or {}
    for name in METHODS[config.train.method].pack_keys:
        del settings[name]
    sections = (config.exits, config.train, config.record)
    return digest([point.ids["prepare"], settings, *(canonical_json(section) for section in sections)])


def check_identity(study: Study) -> None:
    """Raises UserError if the study's run directory has results for another backbone; else notes this one there.

    With another fixed key of data, backbone or prepare nothing in the folder can be used again, which is a mistake more
    often than not. Other keys are covered by the points' ids.
    """
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


def describe_plan(study: Study, stages: Sequence[str], where: str) -> str:
    """Points, packs, ids and resources of what would be done, as text."""
    dist = study.config.dist
    lines = [f"study {study.config.name}: {len(study.points)} points in {study.directory}"]
    lines += [f"  point {point.id}  {point.label}" for point in study.points]
    lines += [f"  baseline {point.id}  {point.label}" for point in study.static]
    left = study
    for stage in stages:
        if stage == "report":
            lines.append("report: " + ("done" if report_is_done(study.points) else "1 job"))
            continue
        jobs = missing_jobs(left, stage)
        lines.append(f"{stage}: {len(jobs)} jobs" if jobs else f"{stage}: done")
        lines += [f"  {_job_line(job)}" for job in jobs]
    threads = dist.num_threads or os.cpu_count()
    lines.append(
        f"resources: --on {where}, device {dist.device}, {threads} threads a process, {dist.num_workers} loading "
        f"processes, at most {dist.members_per_pack} points a pack"
    )
    return "\n".join(lines)


def _job_line(job: Job) -> str:
    ids = list(dict.fromkeys(point.ids[job.stage] for point in job.points))
    shown = " ".join(ids[:4]) + (f" ... {ids[-1]}" if len(ids) > 5 else "" if len(ids) < 5 else f" {ids[4]}")
    return f"{job.name}: {shown}"
