"""What the cluster says of a study's points: the queue, how often a job was tried, and why it failed."""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dynexit.errors import Failure
from dynexit.study.grid import Point
from launch.slurm import cluster
from launch.slurm.arrays import ID_OF
from launch.slurm.cluster import QueuedJob
from launch.slurm.notes import (
    CANCELLED,
    CRASHED,
    IN_NOTED,
    PARTLY_FAILED,
    PREEMPTED,
    TIMED_OUT,
    crashed_parts,
    sections,
)
from launch.slurm.submissions import Submitted, all_submitted, away, logs_by_job

_AGAIN = (PREEMPTED, TIMED_OUT, CRASHED, PARTLY_FAILED)


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


class _Left:
    """What a job left beside its logs, read once for all of its points.

    Of a task that does several jobs, `number` tells which does the work of an id, `tries` how often that was begun,
    `now` what is being done.
    """

    def __init__(self, job: Submitted) -> None:
        self.number: dict[str, str] = {}
        self.tries: collections.Counter[str] = collections.Counter()
        self.now: list[str] = []
        for number, *work in job.parts:
            self.number.update(dict.fromkeys(work, number))
            self.tries.update(work)
            self.now = work
        self.are_parts = bool(self.number)
        if not job.is_at_a_part:
            self.now = []
        self.starts = job.starts
        # what killed its script left no word, and the last one is on an end before
        self.is_ended = not job.starts or not job.ends or _time(job.ends[-1], 1) >= _time(job.starts[-1], 0)
        given_up = job.given_up()
        self.reasons = _by_id(given_up or job.failures())
        self.given_up = self.reasons if given_up else {}
        self._ends: dict[str | None, list[tuple[int, str]]] = {}
        for i, end in enumerate(job.ends):
            for part in crashed_parts(end) if self.are_parts else [None]:
                self._ends.setdefault(part, []).append((i, end))
            if self.are_parts and not (crashed_parts(end) or end.endswith(IN_NOTED)):
                self._ends.setdefault(None, []).append((i, end))

    def ends(self, number: str | None) -> list[str]:
        """The ends of the job but for its crashes at other work than that of `number`."""
        found = {*self._ends.get(None, ()), *self._ends.get(number, ())}
        return [end for _, end in sorted(found)]

    def crashes(self, number: str | None) -> list[str]:
        """The crashes at the work of `number`."""
        return [] if number is None else [end for _, end in self._ends.get(number, ())]

    def tries_of(self, identity: str) -> tuple[int, str]:
        """How often the work was begun, and where its job was last."""
        count = self.tries[identity] if self.are_parts else len(self.starts)
        return count, self.starts[-1].rpartition(" ")[2] if self.starts else ""


def _time(line: str, place: int) -> str:
    return [*line.split(), "", ""][place]


def _by_id(failures: Iterable[dict[str, Any]]) -> dict[str, str]:
    return {identity: str(failure["reason"]) for failure in failures for identity in failure.get("work", ())}


class QueueView:
    """The jobs of every piece of work of a study, and the queue as one squeue call showed it."""

    def __init__(self, study_dir: Path) -> None:
        self._jobs: dict[tuple[str, str], list[Submitted]] = {}  # of every piece of work, the newest last
        for job in all_submitted(study_dir):
            for identity in job.work or ("",):  # a report has no ids
                self._jobs.setdefault((job.stage, identity), []).append(job)
        self._queue: dict[str, QueuedJob] | None = None
        self.unanswered = ""  # why there is no queue to look at; the files say what they can
        if self._jobs or cluster.is_here():
            try:
                self._queue = cluster.queue()
            except Failure as failure:
                self.unanswered = str(failure) if self._jobs else ""
        self.away = away(study_dir, self._queue or {})
        self._states: dict[tuple[str, str], ClusterState] = {}
        self._logs: dict[Path, dict[str, list[Path]]] = {}
        self._left: dict[str, _Left] = {}

    def of(self, point: Point, missing: str) -> ClusterState | None:
        """Of the job that does the point's work `missing`, or the report; None where none was submitted."""
        stage = "record" if missing == "search" else missing
        jobs = self._jobs.get((stage, "" if stage == "report" else point.ids[ID_OF[stage]]))
        if jobs is None:
            return None
        if (jobs[-1].job_id, point.id) not in self._states:
            self._states[jobs[-1].job_id, point.id] = self._describe(jobs, point, missing)
        return self._states[jobs[-1].job_id, point.id]

    def _describe(self, jobs: Sequence[Submitted], point: Point, missing: str) -> ClusterState:
        job = jobs[-1]
        left, identity = self._left_by(job), point.ids.get(missing, "")
        number = left.number.get(identity, "" if left.are_parts else None)
        crashes = left.crashes(number)
        is_given_up = len(crashes) > point.config.dist.max_retries
        ends = crashes if is_given_up else left.ends(number)
        last = ends[-1].partition(" ")[0] if ends else ""
        entry = None if self._queue is None else self._queue.get(job.job_id)
        live = entry is not None and entry.is_live
        state, failed = "submitted" if not last else f"submitted, {last} before", False
        if entry is not None and live:
            is_another = left.are_parts and identity not in left.now
            state = live_state(entry, missing, last, is_another=is_another)
            failed = is_given_up or not left.given_up.keys().isdisjoint(point.ids.values())  # others go on
        elif last == CANCELLED or (entry is not None and entry.state == "CANCELLED"):
            state = "cancelled"
        elif self._queue is not None:
            failed = True
        logs = self._logs_of(job)
        reason = ""
        if failed:
            told = (left.reasons[one] for one in point.ids.values() if one in left.reasons)
            end = ends[-1] if ends and (is_given_up or left.is_ended) else ""
            reason = next(told, "") or _why(job, entry, last_error(logs, number), end)
        attempts, node = self._tries(jobs, identity)
        printed = [path for path in logs if failed and path.suffix == ".err" and path.stat().st_size]
        log = next(iter([*printed, *logs]), job.folder)  # what failed is told among the errors
        return ClusterState(state, live, failed, reason, attempts, (entry.node if entry else "") or node, log)

    def _logs_of(self, job: Submitted) -> Sequence[Path]:
        if job.folder not in self._logs:
            self._logs[job.folder] = logs_by_job(job.folder)
        return self._logs[job.folder].get(job.job_id, ())

    def tries(self, point: Point) -> tuple[int, str] | None:
        """How often the point's training was started, and where it was last; None where no job did it."""
        jobs = self._jobs.get(("train", point.ids["train"]))
        return None if jobs is None else self._tries(jobs, point.ids["train"])

    def _tries(self, jobs: Sequence[Submitted], identity: str) -> tuple[int, str]:
        tries = [self._left_by(job).tries_of(identity) for job in jobs]
        return sum(count for count, _ in tries), next((node for _, node in reversed(tries) if node), "")

    def _left_by(self, job: Submitted) -> _Left:
        if job.job_id not in self._left:
            self._left[job.job_id] = _Left(job)
        return self._left[job.job_id]


def live_state(entry: QueuedJob, missing: str, last: str, *, is_another: bool = False) -> str:
    """What a job that is not over does for the work `missing`, if it does not do other work in turn (`is_another`).

    `last` is why it ended the last time, '' for never.
    """
    if entry.state == "RUNNING" and not (is_another and last == CRASHED):
        return f"{missing} {'waits for its turn' if is_another else 'running'}"
    if last in _AGAIN:
        return f"{last}, waits to go on"
    if entry.state == "COMPLETING":  # told to end, and not gone yet
        return f"{missing} ending"
    return "waiting" if entry.reason == "None" else f"waiting ({entry.reason})"


def _why(job: Submitted, entry: QueuedJob | None, said: str, end: str) -> str:
    """Why a job that is over did not do a point's work, by what its program `said` and how it came to its `end`."""
    if entry is not None and not end:
        end = f"{job.stage} job {job.job_id} ended as {entry.state}"
        if entry.state == "COMPLETED":
            end = f"{job.stage} job {job.job_id} is through, but what it should have left is not there"
    return "; ".join(part for part in (said, end) if part) or f"{job.stage} job {job.job_id} left no word"


@functools.lru_cache(maxsize=256)
def _printed(path: Path, modified_ns: int) -> tuple[str, dict[str, str]]:
    """A log's text, and what of it each job of several printed; kept for the points that share it."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return text, sections(text)


def _errors(logs: Iterable[Path], part: str | None) -> list[str]:
    """The last error in each of the logs that have one, of several jobs in turn that of `part`."""
    found = []
    for path in logs:
        text, by_part = _printed(path, path.stat().st_mtime_ns)
        text = text if part is None else by_part.get(part, "")
        lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in text.splitlines()]  # torch puts it before each
        kinds = r"\S*(Error|Exception|Interrupted|error|Killed)\b|\[Errno \d+\]"
        errors = [line for line in lines if re.match(kinds, line)]
        found += errors[-1:]
    return found


def last_error(logs: Sequence[Path], part: str | None = None) -> str:
    """The last error that a rank printed, rather than what the others said of its end; '' where none did.

    Of a task that does several jobs in turn, at the last try of its `part`.
    """
    found = _errors((path for path in logs if path.suffix == ".err"), part)
    # where its errors had no room on the disk, submitit's words may have come through
    found = found or _errors((path for path in logs if path.suffix == ".out"), part)
    silent = [line for line in found if "Connection" not in line]
    own = [line for line in silent if "gloo" not in line.lower()]
    return (own or silent or found or [""])[0]
