"""What was submitted for a study and what became of it: a folder per submission, with its jobs' logs and attempts."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from dynexit.contents import LaunchedJobs
from dynexit.errors import Failure, UserError, counted
from dynexit.run_dir import folders_in_place, read_json
from dynexit.study.grid import Point, Study
from launch.slurm import cluster
from launch.slurm.cluster import QueuedJob
from launch.tasks.attempts import COMPLETED, FAILED, JOBS, Attempts, End, Work, packs_left, read_attempts


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A task of an array that was submitted: its array's stage, and the work of each of its packs."""

    job_id: str
    stage: str
    packs: tuple[Work, ...]
    folder: Path

    @property
    def work(self) -> set[tuple[str, str]]:
        """All that it does for points, as (stage, id)."""
        return {(stage, one) for pack in self.packs for stage, ids in pack.items() if stage != "report" for one in ids}

    @property
    def path(self) -> Path:
        """The beginning of the names of its files."""
        return self.folder / self.job_id

    @functools.cached_property
    def attempts(self) -> Attempts:
        """How often it was started, and how that ended."""
        return read_attempts(self.path)

    @property
    def is_cancelled(self) -> bool:
        return (self.folder / f"{self.job_id}.cancelled").exists()

    def pack_of(self, work: tuple[str, str]) -> int:
        """The number of the pack that does the work."""
        return next((i for i, pack in enumerate(self.packs) if work[1] in pack.get(work[0], ())), 0)

    def logs(self) -> list[Path]:
        """What its ranks printed: outputs first, then errors, by rank."""
        found = self.folder.glob(f"{self.job_id}_*_log.*")
        return sorted(found, key=lambda path: (path.suffix != ".out", len(path.name), path.name))


def newest_jobs(study_dir: Path, ids: set[str]) -> list[Submitted]:
    """The last job of each stage that did any of the work `ids`, or a report, on a cluster or as local processes."""
    jobs = [*all_submitted(study_dir, "submitted"), *all_submitted(study_dir)]
    jobs.sort(key=lambda job: (job.folder / JOBS).stat().st_mtime)
    return list(
        {job.stage: job for job in jobs if job.stage == "report" or ids & {one for _, one in job.work}}.values()
    )


def all_submitted(study_dir: Path, kind: str = "slurm") -> list[Submitted]:
    """Everything that was ever submitted for the study, oldest first; with `kind` submitted, what ran --on local."""
    return [
        Submitted(job_id, array["stage"], tuple(packs), path.parent)
        for path in _lists(study_dir, kind)
        for array in read_json(path, LaunchedJobs)["arrays"]
        for job_id, packs in array["tasks"].items()
    ]


def _lists(study_dir: Path, kind: str = "slurm") -> list[Path]:
    lists = [folder / JOBS for folder in folders_in_place(study_dir / kind)]
    return [path for path in lists if path.is_file()]


def last_site(study_dir: Path) -> Mapping[str, str] | None:
    """Where the site profile of the last submission was and its digest, or None. Raises UserError if none was made."""
    lists = _lists(study_dir)
    if not lists:
        raise UserError(f"{study_dir} was never submitted; `dynexit run STUDY.yaml --on slurm` does that")
    site: Mapping[str, str] | None = read_json(lists[-1], LaunchedJobs)["site"]
    return site


def live_jobs(study_dir: Path, queue: Mapping[str, QueuedJob] | None = None) -> list[tuple[Submitted, QueuedJob]]:
    """What waits or runs; one query, and none if nothing was ever submitted."""
    submitted = all_submitted(study_dir)
    if queue is None:
        queue = cluster.queue() if submitted and cluster.is_here() else {}
    pairs = ((job, queue.get(job.job_id)) for job in submitted)
    return [(job, entry) for job, entry in pairs if entry is not None and entry.is_live]


def cancel(jobs: Sequence[Submitted]) -> None:
    """Takes jobs out of the queue, and marks them, so that none is requeued by its script."""
    for job in jobs:
        (job.folder / f"{job.job_id}.cancelled").touch()
    cluster.cancel_jobs([job.job_id for job in jobs])


def check_queue(study: Study) -> None:
    """Raises UserError if jobs of the study wait or run: nobody else may write what they write."""
    live = [job.job_id for job, _ in live_jobs(study.directory)]
    if live:
        names = " ".join(live[:5]) + " ..." * (len(live) > 5)
        raise UserError(
            f"the cluster's queue has {counted(len(live), 'job')} of {study.directory} ({names}); wait for them, or "
            "cancel them with `dynexit cancel`"
        )


@dataclasses.dataclass(frozen=True)
class ClusterState:
    """The state of the job that does a point's next work; `reason` says why that failed, '' if it did not."""

    state: str
    is_live: bool
    reason: str
    attempts: int
    node: str
    log: Path


class QueueView:
    """The jobs of every piece of work of a study, and the queue as one query showed it."""

    def __init__(self, study_dir: Path) -> None:
        self._jobs: dict[tuple[str, str], list[Submitted]] = collections.defaultdict(list)  # the newest last
        for job in all_submitted(study_dir):
            for one in job.work or {("report", "")}:
                self._jobs[one].append(job)
        self._queue: Mapping[str, QueuedJob] | None = None
        self.unanswered = ""  # why there is no queue to look at; the files have what they can say
        if self._jobs:
            try:
                self._queue = cluster.queue()
            except Failure as failure:
                self.unanswered = str(failure)

    def of(self, point: Point, stage: str) -> ClusterState | None:
        """The state of the job that does this stage for the point, or the report; None if none was submitted."""
        work = (stage, point.ids.get(stage, ""))
        if work not in self._jobs:
            return None
        jobs, job = self._jobs[work], self._jobs[work][-1]
        entry = (self._queue or {}).get(job.job_id)
        pack = job.pack_of(work)
        last = next((end for end in reversed(job.attempts.ends) if end.pack in (pack, None)), None)
        state = _state(job, last, stage, entry)
        left = packs_left(job.attempts.ends, len(job.packs), point.config.dist.max_retries)
        is_over = last is not None and last.reason != COMPLETED and pack not in left
        is_live = entry is not None and entry.is_live
        has_failed = is_over or not (is_live or self._queue is None or state == "cancelled")
        reason = _failure(job, last, entry, is_noted=is_over or job.attempts.has_ended) if has_failed else ""
        node = next((one.attempts.node for one in reversed(jobs) if one.attempts.node), "")
        logs = [job.folder / f"{job.job_id}_0_log.{kind}" for kind in (("err", "out") if reason else ("out", "err"))]
        log = next((path for path in logs if path.is_file() and path.stat().st_size), logs[-1])
        tries = sum(len(one.attempts.starts) for one in jobs)
        return ClusterState(state, is_live, reason, tries, (entry.node if entry else "") or node, log)


def _state(job: Submitted, last: End | None, stage: str, entry: QueuedJob | None) -> str:
    """What the job does for a pack that ended as `last` before."""
    if entry is None or not entry.is_live:
        is_cancelled = job.is_cancelled or (entry is not None and entry.state == "CANCELLED")
        return "cancelled" if is_cancelled else "submitted" + (f", {last.reason} before" if last else "")
    if entry.state == "RUNNING":
        return f"{stage} running"
    if last is not None:
        return f"{last.reason}, waits to resume"
    if entry.state == "COMPLETING":
        return f"{stage} ending"
    return "waiting" if entry.reason == "None" else f"waiting ({entry.reason})"


def _failure(job: Submitted, last: End | None, entry: QueuedJob | None, *, is_noted: bool) -> str:
    """Why a pack failed: by its last end if the last attempt noted it (`is_noted`), else by the job's state."""
    if last is not None and last.reason == FAILED and last.error:
        return last.error
    if last is not None and is_noted:
        return str(last)
    if entry is None:
        return f"{job.stage} job {job.job_id} ended without an error message"
    if entry.state == "COMPLETED":
        return f"{job.stage} job {job.job_id} completed, but its outputs are missing"
    return f"{job.stage} job {job.job_id} ended as {entry.state}"
