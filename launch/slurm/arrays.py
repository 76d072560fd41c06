"""Study -> job arrays with dependencies: prepare -> train -> record and search -> report. Knows nothing of submitit.

What is in the queue already is not submitted again, so no two tasks ever write the same run directory.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dynexit.errors import UserError
from dynexit.jobs.finished import is_recorded
from dynexit.run_dir import RunDir
from dynexit.study.grid import Point, Study
from launch.plan import Job, make_packs, missing_jobs, report_is_done, unfinished_packs
from launch.slurm.cluster import Limits

Live = Mapping[tuple[str, str], str]  # (stage, id of the work) -> job id, of what waits or runs
ID_OF = {"prepare": "prepare", "train": "train", "record": "search"}


@dataclasses.dataclass(frozen=True)
class Array:
    """One submission: a task per entry of `tasks`, each doing its jobs in turn.

    `after` are dependencies: sbatch's kind, and either the position of an earlier array or the id of a queued job.
    """

    stage: str
    tasks: tuple[tuple[Job, ...], ...]
    after: tuple[tuple[str, int | str], ...] = ()

    def work(self) -> list[list[str]]:
        """The ids of what each task does."""
        return [work_ids(self.stage, jobs) for jobs in self.tasks]


def work_ids(stage: str, jobs: Iterable[Job]) -> list[str]:
    """The ids of what jobs of a stage do: of backbones, trainings, searches; none for a report."""
    if stage == "report":
        return []
    return list(dict.fromkeys(point.ids[ID_OF[stage]] for job in jobs for point in job.points))


def plan_arrays(study: Study, stages: Sequence[str], limits: Limits, live: Live) -> list[Array]:
    """The arrays that do what of `stages` is neither done nor in the queue, in the order of submission.

    Raises UserError where the cluster's limits leave no room for them.
    """
    prepare = [job for job in missing_jobs(study, "prepare") if ("prepare", job.points[0].ids["prepare"]) not in live]
    chains = _chains(study, live) if "train" in stages else []
    recording = _unrecorded(study, chains, live) if "record" in stages else []
    alone = 1 if stages[-1] == "report" else 0
    per_chain = 2 if "record" in stages else 1
    num_tasks = _num_tasks(limits, len(prepare) + alone, per_chain * len(chains), len(recording))
    arrays = [Array("prepare", tuple((job,) for job in part)) for part in _split(prepare, limits.array_size)]
    after_prepare = _after_prepare(study, arrays, live)
    share = num_tasks / max(per_chain * len(chains) + len(recording), 1)
    for part in _split(_group(chains, int(share * len(chains))), limits.array_size):
        arrays.append(Array("train", tuple(tuple(chain[0] for chain in task) for task in part), after_prepare))
        if "record" in stages:
            tasks = tuple(tuple(job for chain in task for job in chain[1:]) for task in part)
            arrays.append(Array("record", tasks, (("aftercorr", len(arrays) - 1),)))
    trainings = tuple(("afterany", job_id) for job_id in _arrays_of(live, "train"))
    for part in _split(_group(recording, int(share * len(recording))), limits.array_size):
        arrays.append(Array("record", tuple(tuple(job for chain in task for job in chain) for task in part), trainings))
    return arrays + _report(study, arrays, live) if alone else arrays


def _chains(study: Study, live: Live) -> list[tuple[Job, ...]]:
    """(train, record, search) of every pack to train."""
    free = tuple(p for p in study.points if ("train", p.ids["train"]) not in live)
    points_of: dict[str, list[Point]] = {}
    for point in study.points:
        points_of.setdefault(point.id, []).append(point)
    return [
        (pack, *_recording([point for one in pack.points for point in points_of[one.id]], study))
        for pack in missing_jobs(dataclasses.replace(study, points=free), "train")
    ]


def _unrecorded(study: Study, chains: Sequence[tuple[Job, ...]], live: Live) -> list[tuple[Job, ...]]:
    """(record, search) of the packs that are trained, or being trained, and not wholly recorded and searched."""
    in_chains = {point.id for chain in chains for point in chain[0].points}
    left: dict[str, list[Point]] = {}
    for point in study.points:  # a point of a chain was not trained, so it was not recorded either
        if point.id not in in_chains and ("record", point.ids["search"]) not in live and not _is_searched(point):
            left.setdefault(point.id, []).append(point)
    firsts = [points[0] for points in left.values()]
    packs = make_packs(firsts, study.config.dist.members_per_pack, unfinished_packs(study))
    return [_recording([point for one in pack for point in left[one.id]], study) for pack in packs]


def _is_searched(point: Point) -> bool:
    return RunDir(point, "search").is_done() and is_recorded(point, check_sizes=True)


def _recording(points: Sequence[Point], study: Study) -> tuple[Job, ...]:
    return tuple(
        Job(stage, tuple({point.ids[stage]: point for point in points}.values())) for stage in ("record", "search")
    )


def _num_tasks(limits: Limits, fixed: int, in_chains: int, recording: int) -> int:
    """How many tasks there may be of what can be done in turn: chains, and what only has to be recorded."""
    wanted = in_chains + recording
    if limits.new_jobs is None or fixed + wanted <= limits.new_jobs:
        return wanted
    least = fixed + min(in_chains, 2) + min(recording, 1)  # train, its record, a record of what was trained before
    if limits.new_jobs < least:
        raise UserError(
            f"the queue has room for {max(limits.new_jobs, 0)} more jobs of yours and the study needs {least} at once; "
            "wait until others have ended, or have the limit raised"
        )
    both = in_chains > 0 and recording > 0
    return limits.new_jobs - fixed - both  # shares are rounded down, and up to one where they would be none


def _group(chains: Sequence[Any], num_tasks: int) -> list[list[Any]]:
    """The chains in turn for `num_tasks` tasks (at least one), as even as can be, none empty."""
    num_tasks = min(max(num_tasks, 1), len(chains))
    ends = [len(chains) * i // num_tasks for i in range(num_tasks + 1)] if num_tasks else [0]
    return [list(chains[start:end]) for start, end in itertools.pairwise(ends)]


def _split(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _after_prepare(study: Study, arrays: Sequence[Array], live: Live) -> tuple[tuple[str, int | str], ...]:
    """What training waits for. Of several backbones one may fail without stopping the others' trainings."""
    queued = _arrays_of(live, "prepare")
    num_backbones = len(queued) + sum(len(array.tasks) for array in arrays)
    kind = "afterok" if num_backbones == 1 else "afterany"
    return (*((kind, i) for i in range(len(arrays))), *((kind, job_id) for job_id in queued))


def _arrays_of(live: Live, stage: str) -> list[str]:
    """The job ids of the arrays that have tasks of a stage in the queue."""
    return sorted({job_id.partition("_")[0] for (name, _), job_id in live.items() if name == stage})


def _report(study: Study, arrays: Sequence[Array], live: Live) -> list[Array]:
    recordings = [i for i, array in enumerate(arrays) if array.stage == "record"]
    if not arrays and report_is_done(study):
        return []
    queued = _arrays_of(live, "record")
    after: tuple[tuple[str, int | str], ...] = (
        *(("afterany", i) for i in recordings),
        *(("afterany", job_id) for job_id in queued),
    )
    return [Array("report", ((Job("report", study.points),),), after)]


def resolve(after: Iterable[tuple[str, int | str]], job_ids: Sequence[str], is_array: Callable[[int], bool]) -> str:
    """Dependencies as sbatch takes them; '' for none. aftercorr on a job of one task is afterok."""
    words = []
    for kind, which in after:
        if isinstance(which, int):
            kind = "afterok" if kind == "aftercorr" and not is_array(which) else kind
            words.append(f"{kind}:{job_ids[which]}")
        else:
            words.append(f"{kind}:{which}")
    return ",".join(words)
