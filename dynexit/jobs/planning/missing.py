"""Study -> points -> packs -> jobs: what is missing, and what can be done together."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynexit.errors import Failure
from dynexit.jobs.finished import is_recorded, is_searched, unfinished_packs
from dynexit.run_dir import RunDir
from dynexit.study.dist import DistSettings
from dynexit.study.grid import Point, Study, canonical_json, digest
from dynexit.study.methods import METHODS
from dynexit.study.schema import method_settings
from dynexit.study.stages import BENCH, POINT_STAGES, inputs_of, stage_of


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
        if stage == "search":
            return is_searched(point, check_bytes=check_bytes)
        return RunDir(point, stage).is_done(check_bytes=check_bytes)

    begun = (study.directory / stage).is_dir()  # of a new sweep of thousands of points not each is asked for
    everything = study.points if stage == BENCH else study.all_points
    points = [point for point in everything if not begun or not is_finished(point)]
    if stage in ("prepare", BENCH):
        groups = list({point.ids[stage]: [point] for point in reversed(points)}.values())[::-1]
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


def split_by_input(job: Job) -> tuple[Job, list[str], list[str]]:
    """Splits off the points whose input is not complete: the job for the rest, error messages for damaged and missing.

    Files decide, not the state of another job in the queue.
    """
    if job.stage not in POINT_STAGES:  # a report shows what there is
        return job, [], []
    ready, damaged, missing = [], [], []
    for point in job.points:
        try:
            inputs = inputs_of(job.stage, by_time=point.is_by_time)
            undone = [one for one in inputs if not RunDir(point, one).is_done()]
            missing += [f"{job.stage} {point.label}: its {one} is not done" for one in undone[:1]]
            ready += [] if undone else [point]
        except Failure as failure:
            damaged.append(str(failure))
    return dataclasses.replace(job, points=tuple(ready)), list(dict.fromkeys(damaged)), missing
