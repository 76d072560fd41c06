"""What was submitted for a study and what became of it: a folder per submission, with its jobs' logs and attempts."""

import contextlib
import dataclasses
import functools
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynexit.errors import Failure, UserError
from dynexit.run_dir import folders_in_place, read_json, write_json
from dynexit.study.grid import Point, Study
from launch.slurm import cluster
from launch.slurm.attempts import CRASHED, FAILED, Attempts, RankReason, read_attempts, read_reason
from launch.slurm.cluster import QueuedJob

_LIST = "jobs.json"

Work = Mapping[str, Sequence[str]]  # stage -> ids of what is done


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A job or array task that was submitted: its array's stage, and the work of each of its packs."""

    job_id: str
    stage: str
    packs: tuple[Work, ...]
    folder: Path

    @property
    def work(self) -> set[tuple[str, str]]:
        """All that it does, as (stage, id)."""
        return {(stage, one) for pack in self.packs for stage, ids in pack.items() for one in ids}

    @property
    def path(self) -> Path:
        """The beginning of the names of its files."""
        return self.folder / self.job_id

    @functools.cached_property
    def attempts(self) -> Attempts:
        """How often it was started, and how that ended."""
        return read_attempts(self.path)

    @functools.cached_property
    def main_reason(self) -> RankReason:
        """What the main rank of the last attempt says: the pack that it is at, and those that it finished."""
        restart = max((count for _, count, _ in self.attempts.starts), default=0)
        return read_reason(self.path, 0, restart) or RankReason(self.path)

    @property
    def is_cancelled(self) -> bool:
        return (self.folder / f"{self.job_id}.cancelled").exists()

    def logs(self) -> list[Path]:
        """What its ranks printed: outputs first, then errors, by rank."""
        return logs_by_job(self.folder).get(self.job_id, [])


def logs_by_job(folder: Path) -> dict[str, list[Path]]:
    """What the ranks of a submission's jobs printed, from one look at the folder: by job id, outputs first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*_log.*"), key=lambda path: (path.suffix != ".out", len(path.name), path.name)):
        found.setdefault(path.name.rsplit("_", 2)[0], []).append(path)  # 7_2_0_log.out: of the job 7_2 rank 0
    return found


class Submission:
    """A submission that is being made: keeps the list on disk as complete as the queue is."""

    def __init__(self, study: Study, site: Mapping[str, str] | None) -> None:
        """`site` is where the site profile is, and its digest."""
        root = study.directory / "slurm"
        root.mkdir(parents=True, exist_ok=True)
        self.folder = next(path for n in itertools.count(1) if not (path := root / f"{n:04d}").exists())
        self.folder.mkdir(mode=0o700)  # it holds what the jobs will run
        self._content: dict[str, Any] = {"site": site, "arrays": []}

    def add(self, job_ids: Sequence[str], stage: str, work: Sequence[Sequence[Work]]) -> None:
        """Notes the tasks of an array that was submitted."""
        self._content["arrays"].append({"stage": stage, "tasks": dict(zip(job_ids, work, strict=True))})
        write_json(self.folder / _LIST, self._content)

    def take_back(self) -> str:
        """Cancels what was submitted, and says what became of it; '' if nothing was."""
        if not self._content["arrays"]:
            shutil.rmtree(self.folder)
            return ""
        try:
            cancel(list(_jobs(self.folder / _LIST)))
        except Failure as failure:
            return f"; what was submitted before it stays in the queue ({failure})"
        return "; what was submitted before it is cancelled"


def all_submitted(study_dir: Path) -> list[Submitted]:
    """Everything that was ever submitted for the study, oldest first."""
    return [job for path in _lists(study_dir) for job in _jobs(path)]


def _jobs(path: Path) -> Iterator[Submitted]:
    for array in read_json(path)["arrays"]:
        for job_id, packs in array["tasks"].items():
            yield Submitted(job_id, array["stage"], tuple(p for p in packs if isinstance(p, dict)), path.parent)


def _lists(study_dir: Path) -> list[Path]:
    lists = [folder / _LIST for folder in folders_in_place(study_dir / "slurm")]
    return [path for path in lists if path.is_file()]


def last_site(study_dir: Path) -> Mapping[str, str] | None:
    """Where the site profile of the last submission was and its digest, or None. Raises UserError if none was made."""
    lists = _lists(study_dir)
    if not lists:
        raise UserError(f"{study_dir} was never submitted; `dynexit run STUDY.yaml --on slurm` does that")
    site: Mapping[str, str] | None = read_json(lists[-1])["site"]
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


def unlisted(study_dir: Path, queue: Mapping[str, QueuedJob]) -> str:
    """An error message if the queue has jobs of the study that none of its lists knows, or ''."""
    mine = {job.job_id for job in queue.values() if job.is_live and job.study == str(study_dir.absolute())}
    mine -= {job.job_id for job in all_submitted(study_dir)} if mine else set()
    found = " ".join(sorted({job_id.partition("_")[0] for job_id in mine}))
    return found and (
        f"jobs of {study_dir} are queued ({found}) that no list in that folder knows: its file system is unavailable, "
        f"or the launcher was killed while it submitted; make it available and run this again, or `scancel {found}`"
    )


def check_listed(study_dir: Path) -> None:
    """Raises UserError if the queue has jobs of the study that none of its lists knows."""
    with contextlib.suppress(Failure):  # with no queue to ask there is nothing to say
        if cluster.is_here() and (message := unlisted(study_dir, cluster.queue())):
            raise UserError(message)


def check_queue(study: Study) -> None:
    """Raises UserError if jobs of the study wait or run: nobody else may write what they write."""
    live = [job.job_id for job, _ in live_jobs(study.directory)]
    if live:
        names = " ".join(live[:5]) + " ..." * (len(live) > 5)
        raise UserError(
            f"{len(live)} jobs of {study.directory} are in the cluster's queue ({names}); wait for them, "
            "or cancel them with `dynexit cancel`"
        )


@dataclasses.dataclass(frozen=True)
class ClusterState:
    """What the cluster says of the job that does a point's next work."""

    state: str
    is_live: bool
    is_failed: bool
    reason: str
    attempts: int
    node: str
    log: Path


class QueueView:
    """The jobs of every piece of work of a study, and the queue as one query showed it."""

    def __init__(self, study_dir: Path) -> None:
        self._jobs: dict[tuple[str, str], list[Submitted]] = {}  # of every piece of work, the newest last
        for job in all_submitted(study_dir):
            for one in job.work or {("report", "")}:
                self._jobs.setdefault(one, []).append(job)
        self._queue: dict[str, QueuedJob] | None = None
        self.unanswered = ""  # why there is no queue to look at; the files say what they can
        if self._jobs or cluster.is_here():
            try:
                self._queue = cluster.queue()
            except Failure as failure:
                self.unanswered = str(failure) if self._jobs else ""
        self.unlisted = unlisted(study_dir, self._queue or {})
        self._logs = functools.cache(logs_by_job)

    def of(self, point: Point, missing: str) -> ClusterState | None:
        """Of the job that does the point's work `missing`, or the report; None if none was submitted."""
        work = (missing, "" if missing == "report" else point.ids[missing])
        jobs = self._jobs.get(work)
        return None if jobs is None else self._describe(jobs, work, point.config.dist.max_retries)

    def _describe(self, jobs: Sequence[Submitted], work: tuple[str, str], max_retries: int) -> ClusterState:
        job, pack = jobs[-1], _pack_of(jobs[-1], work)
        entry = None if self._queue is None else self._queue.get(job.job_id)
        live = entry is not None and entry.is_live
        ends = [end for end in job.attempts.ends if end.pack == pack]
        is_over = any(end.reason == FAILED for end in ends) or sum(end.reason == CRASHED for end in ends) > max_retries
        now = next((one for one in job.main_reason.finished if one["pack"] == pack and one["reason"] == FAILED), None)
        last = job.attempts.last(pack)
        state, failed = "submitted" + (f", {last.reason} before" if last else ""), False
        if entry is not None and live:
            is_another = len(job.packs) > 1 and job.main_reason.pack != pack
            state = live_state(entry, work[0], last.reason if last else "", is_another=is_another)
            failed = is_over or now is not None  # the job continues with its other packs
        elif job.is_cancelled or (entry is not None and entry.state == "CANCELLED"):
            state = "cancelled"
        elif self._queue is not None:
            failed = True
        reason = ""
        if failed:
            noted = last if job.attempts.has_ended or is_over else None
            reason = now["error"] if now else noted.error if noted and noted.reason == FAILED else str(noted or "")
            reason = reason or _unnoted_end(job, entry)
        attempts, node = self._tries(jobs, work)
        logs = self._logs(job.folder).get(job.job_id, [])
        printed = [path for path in logs if failed and path.suffix == ".err" and path.stat().st_size]
        log = next(iter([*printed, *logs]), job.folder)
        return ClusterState(state, live, failed, reason, attempts, (entry.node if entry else "") or node, log)

    def tries(self, point: Point) -> tuple[int, str] | None:
        """How often the point's training was tried, and where it was last; None if no job did it."""
        work = ("train", point.ids["train"])
        return self._tries(self._jobs[work], work) if work in self._jobs else None

    def _tries(self, jobs: Sequence[Submitted], work: tuple[str, str]) -> tuple[int, str]:
        counts = [_num_tries(job, _pack_of(job, work)) for job in jobs]
        return sum(counts), next((job.attempts.node for job in reversed(jobs) if job.attempts.node), "")


def _pack_of(job: Submitted, work: tuple[str, str]) -> int:
    return next((i for i, pack in enumerate(job.packs) if work[1] in pack.get(work[0], ())), 0)


def _num_tries(job: Submitted, pack: int) -> int:
    """How often a pack was begun: of one alone whenever the job started, of several as its ends and the ranks say."""
    if len(job.packs) <= 1:
        return len(job.attempts.starts)
    is_at_it = job.main_reason.pack == pack or any(one["pack"] == pack for one in job.main_reason.finished)
    return sum(end.pack == pack for end in job.attempts.ends) + int(is_at_it and not job.attempts.has_ended)


def live_state(entry: QueuedJob, missing: str, last: str, *, is_another: bool = False) -> str:
    """What a job that is not over does for the work `missing`, unless it does another pack's (`is_another`).

    `last` is why it ended the last time, '' for never.
    """
    if entry.state == "RUNNING" and not (is_another and last == CRASHED):
        return f"{missing} {'waits for its turn' if is_another else 'running'}"
    if last:
        return f"{last}, waits to resume"
    if entry.state == "COMPLETING":
        return f"{missing} ending"
    return "waiting" if entry.reason == "None" else f"waiting ({entry.reason})"


def _unnoted_end(job: Submitted, entry: QueuedJob | None) -> str:
    if entry is None:
        return f"{job.stage} job {job.job_id} ended without an error message"
    if entry.state == "COMPLETED":
        return f"{job.stage} job {job.job_id} completed, but its outputs are missing"
    return f"{job.stage} job {job.job_id} ended as {entry.state}"
