"""Study -> job arrays with dependencies: prepare -> train and record -> search -> report. Knows nothing of submitit.

All dependencies are afterany: a job checks its input in files. What is queued already is not submitted again, so no two
tasks ever write the same run directory.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynexit.errors import UserError
from dynexit.jobs.finished import is_recorded
from dynexit.run_dir import RunDir
from dynexit.study.grid import Point, Study
from launch.plan import Job, make_packs, missing_jobs, report_is_done, unfinished_packs
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
    prepare = [
        ((job,),) for job in missing_jobs(study, "prepare") if ("prepare", job.points[0].ids["prepare"]) not in live
    ]
    chains = [_trainings(study, stages, live) if "train" in stages else []]
    chains.append(_recordings(study, chains[0], live) if "record" in stages else [])
    chains.append(_searches(study, [*chains[0], *chains[1]], live) if "search" in stages else [])
    num_alone = int(stages[-1] == "report")
    costs = [1 + ("search" in stages)] * 2 + [1]  # jobs of a chain
    counts = _num_tasks(limits, len(prepare) + num_alone, [len(one) for one in chains], costs)
    arrays: list[Array] = []

    def add(stage: str, part: Sequence[Sequence[Pack]], after: tuple[int | str, ...]) -> None:
        """Adds an array that does the packs' jobs of its stage, after what is queued for the same work."""
        mine = TRAINING if stage in TRAINING else (stage,)
        tasks = tuple(tuple(tuple(job for job in pack if job.stage in mine) for pack in packs) for packs in part)
        ids = {(job.stage, p.ids[job.stage]) for packs in tasks for pack in packs for job in pack for p in job.points}
        queued = {(live.get(one) or ending[one]).partition("_")[0] for one in ids & {*live, *ending}}
        arrays.append(Array(stage, tasks, (*after, *sorted(queued - {*after}))))

    for part in _split(prepare, limits.array_size):
        add("prepare", part, ())
    after_prepare = (*range(len(arrays)), *_jobs_of(live, "prepare"))
    training = tuple(_jobs_of(live, *TRAINING))
    for stage, packs, count, after in zip(
        ("train", "record", "search"), chains, counts, (after_prepare, training, training), strict=True
    ):
        for part in _split(_group(packs, count), limits.array_size):
            add(stage, part, after)
            if "search" in stages and stage in TRAINING:
                add("search", part, (len(arrays) - 1,))
    return arrays + _report(study, arrays, live) if num_alone else arrays


def _trainings(study: Study, stages: Sequence[str], live: Live) -> list[Pack]:
    """(train, record, search) of every pack to train, so far as `stages` ask for it."""
    free = tuple(p for p in study.points if ("train", p.ids["train"]) not in live)
    packs = missing_jobs(dataclasses.replace(study, points=free), "train")
    rest = [stage for stage in ("record", "search") if stage in stages]
    return [(pack, *_jobs(rest, _points_of(study.points, pack.points))) for pack in packs]


def _recordings(study: Study, trainings: Sequence[Pack], live: Live) -> list[Pack]:
    """(record, search) of the packs that are trained, or being trained, and not recorded."""
    in_training = {point.id for pack in trainings for point in pack[0].points}
    left = [
        point
        for point in study.points
        if point.id not in in_training
        and ("record", point.ids["record"]) not in live
        and not is_recorded(point, check_sizes=True)
    ]
    firsts = list({point.id: point for point in reversed(left)}.values())[::-1]
    packs = make_packs(firsts, study.config.dist.members_per_pack, unfinished_packs(study))
    return [tuple(_jobs(("record", "search"), _points_of(left, pack))) for pack in packs]


def _searches(study: Study, others: Sequence[Pack], live: Live) -> list[Pack]:
    """(search,) of the points that only have to be searched."""
    covered = {point.id for pack in others for point in pack[-1].points}
    left = [
        point
        for point in study.points
        if point.id not in covered
        and ("search", point.ids["search"]) not in live
        and not RunDir(point, "search").is_done()
    ]
    return [tuple(_jobs(("search",), part)) for part in _split(left, study.config.dist.members_per_pack)]


def _points_of(points: Iterable[Point], trained: Sequence[Point]) -> list[Point]:
    """Those of the points with the trainings of `trained`; they may differ in what is recorded and searched."""
    ids = {point.id for point in trained}
    return [point for point in points if point.id in ids]


def _jobs(stages: Sequence[str], points: Sequence[Point]) -> list[Job]:
    return [Job(stage, tuple({point.ids[stage]: point for point in points}.values())) for stage in stages]


def _num_tasks(limits: Limits, fixed: int, lengths: Sequence[int], costs: Sequence[int]) -> list[int]:
    """How many tasks there may be of each kind of chain: one a chain, or fewer that do several in turn."""
    total = sum(length * cost for length, cost in zip(lengths, costs, strict=True))
    if limits.new_jobs is None or fixed + total <= limits.new_jobs:
        return list(lengths)
    least = sum(cost for length, cost in zip(lengths, costs, strict=True) if length)
    if limits.new_jobs < fixed + least:
        raise UserError(
            f"the queue has room for {max(limits.new_jobs, 0)} more jobs of yours and the study needs {fixed + least} "
            "at once; wait until others have ended, or have the limit raised"
        )
    share = (limits.new_jobs - fixed - least) / (total - least) if total > least else 0.0
    return [min(length, 1) + int(share * max(length - 1, 0)) for length in lengths]


def _group(chains: Sequence[Pack], num_tasks: int) -> list[Sequence[Pack]]:
    """The chains in turn for `num_tasks` tasks, as even as can be, none empty."""
    ends = [len(chains) * i // num_tasks for i in range(num_tasks + 1)] if num_tasks else [0]
    return [chains[start:end] for start, end in itertools.pairwise(ends)]


def _split(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _jobs_of(live: Live, *stages: str) -> list[str]:
    """The ids of the arrays that have work of these stages in the queue."""
    return sorted({job_id.partition("_")[0] for (name, _), job_id in live.items() if name in stages})


def _report(study: Study, arrays: Sequence[Array], live: Live) -> list[Array]:
    if not arrays and report_is_done(study):
        return []
    searches = [i for i, array in enumerate(arrays) if array.stage == "search"]
    return [Array("report", (((Job("report", study.points),),),), (*searches, *_jobs_of(live, "search")))]


def resolve(after: Iterable[int | str], job_ids: Sequence[str]) -> str:
    """Dependencies in sbatch's form; '' for none."""
    ids = [job_ids[which] if isinstance(which, int) else which for which in after]
    return ":".join(["afterany", *ids]) if ids else ""
