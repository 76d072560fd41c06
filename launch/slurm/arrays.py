"""Study -> job arrays with dependencies: prepare -> train and record, bench -> search -> report; without submitit.

All dependencies are afterany: a job checks its input in files. What is queued already is not submitted again, so no two
tasks ever write the same run directory.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynexit.errors import UserError
from dynexit.jobs.finished import is_recorded, report_is_done, unfinished_packs
from dynexit.jobs.planning.missing import Job, make_packs, missing_jobs
from dynexit.study.grid import Point, Study
from dynexit.study.stages import BENCH, POINT_STAGES, inputs_of
from launch.slurm.cluster import Limits
from launch.tasks.attempts import Work
from launch.tasks.folder import work_of

Live = Mapping[tuple[str, str], str]  # (stage, id of the work) -> job id, of what waits or runs
Pack = tuple[Job, ...]
TRAINING = ("train", "record")  # the stages of arrays that train or record


@dataclasses.dataclass(frozen=True)
class Array:
    """One submission: a task per entry of `tasks`, each with its packs in turn.

    `after` are the positions of earlier arrays, or ids of queued jobs, that must have ended.
    """

    stage: str
    tasks: tuple[tuple[Pack, ...], ...]
    after: tuple[int | str, ...] = ()

    def work(self) -> list[list[Work]]:
        """The work of each task and pack."""
        return [[work_of(pack) for pack in packs] for packs in self.tasks]


def plan_arrays(study: Study, stages: Sequence[str], limits: Limits, live: Live, ending: Live) -> list[Array]:
    """The arrays that do what of `stages` is neither done nor queued, in the order of submission.

    `ending` are cancelled jobs that have not ended: their work is submitted again, to start when they have.
    Raises UserError if the cluster's limits leave no room.
    """
    arrays: list[Array] = []
    who: dict[tuple[str, str], int | str] = {work: job.partition("_")[0] for work, job in {**ending, **live}.items()}

    def add(tasks: Sequence[Sequence[Pack]]) -> None:
        """Adds arrays that start after those that do the same work, or the work that they need."""
        for part in _split(tasks, limits.array_size):
            jobs = [job for packs in part for pack in packs for job in pack]
            own = {(job.stage, p.ids[job.stage]) for job in jobs if job.stage in POINT_STAGES for p in job.points}
            # a report reads the results of static networks too, and the search of one the records of all of them
            reads = [
                (job.stage, p) for job in jobs for p in (study.all_points if job.stage == "report" else job.points)
            ]
            needed = {(one, p.ids[one]) for stage, p in reads for one in inputs_of(stage, by_time=p.is_by_time)}
            needed |= {("record", identity) for stage, p in reads if stage == "search" for identity in p.networks}
            after = {who[one] for one in own | (needed - own) if one in who}
            tuples = tuple(map(tuple, part))
            arrays.append(Array(jobs[0].stage, tuples, tuple(sorted(after, key=lambda one: (str(one) == one, one)))))
            who.update(dict.fromkeys(own, len(arrays) - 1))

    def alone(stage: str) -> list[Sequence[Pack]]:
        """A task for each of the stage's jobs."""
        jobs = missing_jobs(study, stage) if stage in stages else []
        return [[(job,)] for job in jobs if (stage, job.points[0].ids[stage]) not in live]

    prepare, bench = alone("prepare"), alone(BENCH)
    packs = _trainings(study, "record" in stages, live) if "train" in stages else []
    packs += _recordings(study, packs, live) if "record" in stages else []
    searches = [_job("search", study.points, pack) for pack in packs] if "search" in stages else []
    searches = [job for job in searches if job.points]  # those of static networks wait for all of these
    others = _searches(study, searches, live) if "search" in stages else []
    has_report = stages[-1] == "report"
    fixed = len(prepare) + len(bench) + has_report
    counts = _num_tasks(limits, fixed, len(packs), 1 + ("search" in stages), len(others))
    add(prepare)
    add(bench)
    add(_group(packs, counts[0]))
    add(_group([(job,) for job in searches], min(counts[0], len(searches))))
    add(_group(others, counts[1]))
    if has_report and (arrays or not report_is_done(study.points)):
        add([[(Job("report", study.points),)]])
    return arrays


def _trainings(study: Study, records: bool, live: Live) -> list[Pack]:
    """(train, record) of every pack to train, or (train,)."""
    free = study.only([("train", p.ids["train"]) not in live for p in study.all_points])
    jobs = missing_jobs(free, "train")
    return [(job, _job("record", study.all_points, (job,))) if records else (job,) for job in jobs]


def _recordings(study: Study, trainings: Sequence[Pack], live: Live) -> list[Pack]:
    """(record,) of the packs that are trained, or being trained, and not recorded."""
    in_training = {point.id for pack in trainings for point in pack[0].points}
    left = [
        point
        for point in study.all_points
        if point.id not in in_training
        and ("record", point.ids["record"]) not in live
        and not is_recorded(point, check_sizes=True)
    ]
    firsts = list({point.id: point for point in reversed(left)}.values())[::-1]
    packs = make_packs(firsts, study.config.dist.members_per_pack, unfinished_packs(study.directory))
    return [(_job("record", left, (Job("train", tuple(pack)),)),) for pack in packs]


def _searches(study: Study, others: Sequence[Job], live: Live) -> list[Pack]:
    """(search,) of the points that only have to be searched."""
    covered = {point.ids["search"] for job in others for point in job.points}
    covered |= {identity for stage, identity in live if stage == "search"}
    jobs = missing_jobs(study.only([point.ids["search"] not in covered for point in study.all_points]), "search")
    left = [point for job in jobs for point in job.points]
    return [(Job("search", tuple(part)),) for part in _split(left, study.config.dist.members_per_pack)]


def _job(stage: str, points: Iterable[Point], pack: Pack) -> Job:
    """The job of a stage for those of the points with the pack's trainings; they may differ in later sections."""
    ids = {point.id for point in pack[0].points}
    return Job(stage, tuple({point.ids[stage]: point for point in points if point.id in ids}.values()))


def _num_tasks(limits: Limits, fixed: int, num_packs: int, cost: int, num_alone: int) -> tuple[int, int]:
    """Numbers of tasks for packs, each with `cost` jobs, and for searches alone: one each, or fewer that do several."""
    if limits.new_jobs is None:
        return num_packs, num_alone
    room = limits.new_jobs - fixed
    for_packs = min(num_packs, (room - min(num_alone, 1)) // cost)
    for_alone = min(num_alone, room - cost * for_packs)
    least = cost * min(num_packs, 1) + min(num_alone, 1)
    if room < least:
        raise UserError(
            f"the queue has room for {max(limits.new_jobs, 0)} more jobs of yours and the study needs {fixed + least} "
            "at once; wait until others have ended, or have the limit raised"
        )
    return for_packs, for_alone


def _group(packs: Sequence[Pack], num_tasks: int) -> list[Sequence[Pack]]:
    """The packs in turn for `num_tasks` tasks, as even as can be, none empty."""
    ends = [len(packs) * i // num_tasks for i in range(num_tasks + 1)] if num_tasks else [0]
    return [packs[start:end] for start, end in itertools.pairwise(ends)]


def _split(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def resolve(after: Iterable[int | str], job_ids: Sequence[str]) -> str:
    """Dependencies in sbatch's form; '' for none."""
    ids = [job_ids[which] if isinstance(which, int) else which for which in after]
    return ":".join(["afterany", *ids]) if ids else ""
