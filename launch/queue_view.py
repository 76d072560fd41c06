"""What the cluster says of a study's points: the queue, how often a job was tried, and why it failed."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dynexit.errors import Failure
from dynexit.sweep import Point
from launch import cluster
from launch.arrays import ID_OF
from launch.cluster import QueuedJob
from launch.notes import IN_NOTED, crashed_parts, section
from launch.submissions import Submitted, all_submitted, logs_by_job
from launch.task import CANCELLED, CRASHED, PARTLY_FAILED, PREEMPTED, TIMED_OUT

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


class _Parts:
    """A task's several jobs by the ids of their work: their numbers, how often each was begun, what is being done."""

    def __init__(self, job: Submitted) -> None:
        self.number: dict[str, str] = {}
        self.tries: collections.Counter[str] = collections.Counter()
        self.now: list[str] = []
        for number, *work in job.parts:
            self.number.update(dict.fromkeys(work, number))
            self.tries.update(work)
            self.now = work
        self.are_known = bool(self.number)
        if not job.is_at_a_part:
            self.now = []


class QueueView:
    """The newest job of every piece of work of a study, and the queue as one squeue call showed it."""

    def __init__(self, study_dir: Path) -> None:
        self._newest: dict[tuple[str, str], Submitted] = {}
        for job in all_submitted(study_dir):
            self._newest.update({(job.stage, identity): job for identity in job.work or ("",)})  # a report has no ids
        self._queue: dict[str, QueuedJob] | None = None
        self.unanswered = ""  # why there is no queue to look at; the files say what they can
        if self._newest:
            try:
                self._queue = cluster.queue()
            except Failure as failure:
                self.unanswered = str(failure)
        self._states: dict[tuple[str, str], ClusterState] = {}
        self._logs: dict[Path, dict[str, list[Path]]] = {}
        self._parts: dict[str, _Parts] = {}

    def of(self, point: Point, missing: str) -> ClusterState | None:
        """Of the job that does the point's work `missing`, or the report; None where none was submitted."""
        stage = "record" if missing == "search" else missing
        job = self._newest.get((stage, "" if stage == "report" else point.ids[ID_OF[stage]]))
        if job is None:
            return None
        if (job.job_id, point.id) not in self._states:
            self._states[job.job_id, point.id] = self._describe(job, point, missing)
        return self._states[job.job_id, point.id]

    def _describe(self, job: Submitted, point: Point, missing: str) -> ClusterState:
        parts, identity = self._parts_of(job), point.ids.get(missing, "")
        number = parts.number.get(identity, "" if parts.are_known else None)
        ends = _ends(job.ends, parts, number)
        last = ends[-1].partition(" ")[0] if ends else ""
        entry = None if self._queue is None else self._queue.get(job.job_id)
        live = entry is not None and entry.is_live
        crashes = [end for end in ends if number in crashed_parts(end)]
        is_given_up = len(crashes) > point.config.dist.max_retries
        state, reason, failed = "submitted" if not last else f"submitted, {last} before", "", False
        if entry is not None and live:
            is_another = parts.are_known and identity not in parts.now
            state = live_state(entry, missing, last, is_another=is_another)
            failed = is_given_up  # the task goes on with others
        elif last == CANCELLED or (entry is not None and entry.state == "CANCELLED"):
            state = "cancelled"
        elif self._queue is not None:
            failed = True
        if failed:
            reason = _why(job, point, entry, self._logs_of(job), number, crashes if is_given_up else ends)
        log = next(iter(self._logs_of(job)), job.folder)
        attempts, node = _tries(job, parts, identity)
        return ClusterState(state, live, failed, reason, attempts, (entry.node if entry else "") or node, log)

    def _logs_of(self, job: Submitted) -> Sequence[Path]:
        if job.folder not in self._logs:
            self._logs[job.folder] = logs_by_job(job.folder)
        return self._logs[job.folder].get(job.job_id, ())

    def tries(self, point: Point) -> tuple[int, str] | None:
        """How often the job that trained the point was started, and where it was last; None where there is none."""
        job = self._newest.get(("train", point.ids["train"]))
        return None if job is None else _tries(job, self._parts_of(job), point.ids["train"])

    def _parts_of(self, job: Submitted) -> _Parts:
        if job.job_id not in self._parts:
            self._parts[job.job_id] = _Parts(job)
        return self._parts[job.job_id]


def _ends(ends: list[str], parts: _Parts, number: str | None) -> list[str]:
    """A job's ends without its crashes at other work than that of `number`."""
    if not parts.are_known:
        return ends
    return [end for end in ends if number in crashed_parts(end) or not (crashed_parts(end) or end.endswith(IN_NOTED))]


def _tries(job: Submitted, parts: _Parts, identity: str) -> tuple[int, str]:
    """How often the work was begun, and where its job was last."""
    starts = job.starts
    count = parts.tries[identity] if parts.are_known else len(starts)
    return count, starts[-1].rpartition(" ")[2] if starts else ""


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
    return f"waiting ({entry.reason})"


def _why(
    job: Submitted, point: Point, entry: QueuedJob | None, logs: Sequence[Path], number: str | None, lines: list[str]
) -> str:
    """Why a job that is over did not do the point's work, its part `number` that ended as `lines` say."""
    for failure in job.failures():
        if set(point.ids.values()) & set(failure.get("work", ())):
            return str(failure["reason"])
    said = last_error(logs, number)
    ends = lines[-1] if lines else ""
    if entry is not None and not ends:
        ends = f"{job.stage} job {job.job_id} ended as {entry.state}"
    return "; ".join(part for part in (said, ends) if part) or f"{job.stage} job {job.job_id} left no word"


def _errors(logs: Iterable[Path], part: str | None) -> list[str]:
    """The last error in each of the logs that have one, of several jobs in turn that of `part`."""
    found = []
    for path in logs:
        text = path.read_text(encoding="utf-8", errors="replace")
        text = text if part is None else section(text, part)
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
