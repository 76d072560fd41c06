"""What a SLURM job does: its work in turn, stopped by a signal at the next safe moment.

Why it stopped goes into a file beside its logs. The job's script reads it when all ranks have ended and decides on a
requeue: no rank can, since one that is killed decides nothing.
"""

import contextlib
import dataclasses
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynexit.errors import Failure, Interrupted, UserError, unmasked_interrupts
from dynexit.jobs.finished import finished_jobs
from dynexit.run_dir import RunDir, write_json
from dynexit.study.stages import STAGES, stage_of
from launch.plan import Job
from launch.slurm.interruptions import Terminated, interruptible, watched
from launch.slurm.notes import CRASHED, FAILED_FOR_GOOD, OR_CRASHED, PARTLY_FAILED, PREEMPTED, TIMED_OUT, Notes, heading

if TYPE_CHECKING:
    from dynexit.dist import Ranks
    from dynexit.study.grid import Point

EARLY_SECONDS = 65  # SLURM looks at time limits about once a minute
STOPPED, _FAILED = 75, 1  # exit statuses
_ALONE = tuple(
    stage.name for stage in STAGES.values() if stage.ranks == "one"
)  # what the main rank does when the others have left
_IDS = {"report": "train"}  # of points, where the work has none of its own


@dataclasses.dataclass(frozen=True)
class ClusterTask:
    """The jobs of one task of an array, and when a signal means that its time is up."""

    jobs: tuple[Job, ...]
    time_limit_seconds: float
    signal_delay_seconds: float

    def __call__(self) -> list[str]:
        """Does the jobs; the sentences of what failed. SystemExit where the job was stopped or failed for good."""
        started = time.monotonic()
        notes = _join_ranks()
        try:
            with watched(notes), interruptible(), unmasked_interrupts():
                failures = self._run_all(notes)
        except Interrupted as stop:
            left = self.time_limit_seconds - (time.monotonic() - started)
            word = TIMED_OUT if left <= self.signal_delay_seconds + EARLY_SECONDS else PREEMPTED
            print(f"{stop} ({word})", flush=True)
            notes.end(word + OR_CRASHED * isinstance(stop, Terminated))
            sys.exit(STOPPED)
        except Exception:
            notes.end(CRASHED)
            raise
        if failures and self.jobs[0].stage == "prepare":  # nothing that waits for it can run
            notes.end(FAILED_FOR_GOOD)
            sys.exit(_FAILED)
        return failures

    def _run_all(self, notes: Notes) -> list[str]:
        from dynexit.dist import start_ranks, stop_ranks

        dist = self.jobs[0].points[0].config.dist
        needs_device = any(job.stage not in _ALONE for job in self.jobs)  # without, its node may have no GPU
        ranks = start_ranks(dist.device if needs_device else "cpu", dist.num_threads, dist.timeout_seconds)
        notes.wait_until_there()
        work = _Work(notes, ranks, self.jobs, dist.max_retries)
        work.take_up(ranks.broadcast(notes.given_up() if ranks.is_main else []))
        order = ranks.broadcast(notes.order(len(self.jobs), dist.max_retries) if ranks.is_main else [])
        alone = [i for i in order if self.jobs[i].stage in _ALONE]
        for i in (i for i in order if i not in alone):
            job, damage = ranks.broadcast(work.ready(i) if ranks.is_main else (self.jobs[i], {}))
            work.do(i, job, damage)
        stop_ranks()  # however long the main rank searches, nobody waits for it
        for i in alone if ranks.is_main else []:
            work.do(i, *work.ready(i))
        if ranks.is_main:
            work.end()
        if work.crash is not None:
            raise work.crash
        return [str(failure["reason"]) for failure in work.failures]


class _Work:
    """A task's jobs as they are done: one that fails stops no other."""

    def __init__(self, notes: Notes, ranks: "Ranks", jobs: Sequence[Job], max_retries: int) -> None:
        self.notes, self.ranks = notes, ranks
        self.failures: list[dict[str, object]] = []
        self.crash: Exception | None = None
        self._given_up: list[dict[str, object]] = []
        self._jobs, self._max_retries = jobs, max_retries

    def take_up(self, given_up: list[dict[str, object]]) -> None:
        """Goes on where the last run of the task gave these up."""
        self.failures, self._given_up = [*given_up], given_up

    def ready(self, i: int) -> tuple[Job, dict[str, str]]:
        """What `_ready` says of a task's job `i` when the file system is there."""
        self.notes.wait_until_there()
        return _ready(self._jobs[i])

    def do(self, i: int, job: Job, damage: dict[str, str]) -> None:
        """Does a task's job `i`, but for what is damaged: by the id of the work a sentence on it.

        Raises what crashes one of several ranks, and SystemExit where one failed alone: the others wait for that one,
        so the program ends; it is tried again for the jobs that are left.
        """
        for identity, reason in damage.items():
            self._fail(i, job, [identity], reason, is_told=self.ranks.is_main)
        if not job.points:
            return
        work = [p.ids[_IDS.get(job.stage, job.stage)] for p in job.points]
        if len(self._jobs) > 1:
            print(heading(i), file=sys.stderr, flush=True)
            if self.ranks.is_main:
                is_last_try = self.notes.crashes().count(i) >= self._max_retries
                self.notes.begin(i, work, is_last=is_last_try and not self.is_anything_left(beside=i))
        others_wait = self.ranks.world_size > 1 and job.stage not in _ALONE
        stop, num_failures = None, len(self.failures)
        try:
            stop = _run(job)
            while self._was_lost(job, stop, others_wait):
                stop = _run(job)
        except Exception as error:
            if others_wait:
                raise
            traceback.print_exc()
            self.crash = error
            self._fail(i, job, work, f"{type(error).__name__}: {error}", is_told=False)
            if len(self._jobs) > 1:
                self.notes.crash(i)
        failed_alone = others_wait and stop is not None and not stop.on_all_ranks
        if stop is not None:
            self._given_up.append(self._fail(i, job, work, str(stop), is_told=self.ranks.is_main or failed_alone))
        if failed_alone:
            self._end_alone()
        if self.ranks.is_main:
            with contextlib.suppress(Failure):  # on a full disk another try says it again
                self.notes.give_up(self._given_up)
            self.notes.through(is_trained=job.stage == "train" and len(self.failures) == num_failures)

    def _was_lost(self, job: Job, stop: Failure | UserError | None, others_wait: bool) -> bool:
        """Whether a job did not come through since the file system was lost, and that is back.

        Raises the failure of one rank alone, as a crash: the others wait for it, and another try finds its files.
        """
        was_lost = self.notes.wait_until_there()
        if others_wait and stop is not None and not stop.on_all_ranks:
            if was_lost:
                raise stop
            return False
        if others_wait:
            was_lost = self.ranks.any([was_lost])[0]
        if was_lost and stop is None:  # what it wrote may lie beneath what is back
            was_lost = self.ranks.broadcast(_is_left(job)) if others_wait else _is_left(job)
        if was_lost and self.ranks.is_main:
            said = "" if stop is None else f"{stop}; "
            print(f"{said}{self.notes.folder} was gone and is back: again", file=sys.stderr, flush=True)
        return was_lost

    def _fail(self, i: int, job: Job, work: Sequence[str], reason: str, *, is_told: bool) -> dict[str, object]:
        if is_told:
            print(reason, file=sys.stderr, flush=True)
        failure: dict[str, object] = {"job": i, "stage": job.stage, "work": list(work), "reason": reason}
        self.failures.append(failure)
        return failure

    def _end_alone(self) -> None:
        """Ends the program, and with it the ranks that wait for this one."""
        self.notes.give_up(self._given_up)
        if self.is_anything_left():
            self.notes.end(PARTLY_FAILED)
        else:
            self._write_failures()
            self.notes.end(FAILED_FOR_GOOD)
        sys.exit(_FAILED)

    def is_anything_left(self, beside: int = -1) -> bool:
        """Whether another try of the task would find something to do, but for the job `beside`."""
        order = self.notes.order(len(self._jobs), self._max_retries)
        jobs = (_ready(self._jobs[i])[0] for i in reversed(order) if i != beside)
        return any(map(_is_left, jobs))

    def end(self) -> None:
        """Leaves the sentences of what failed, if this is the end of the task."""
        if self.crash is not None:
            if self.is_anything_left():
                return
            self.notes.end_tries()
        self._write_failures()

    def _write_failures(self) -> None:
        write_json(self.notes.file("failures.json"), self.failures)
        self.notes.file("given-up.json").unlink(missing_ok=True)


def _is_left(job: Job) -> bool:
    """Whether a job of points has not left all its results."""
    return any(job.stage not in finished_jobs(point) for point in job.points)


def _run(job: Job) -> Failure | UserError | None:
    """Runs a job; the failure that another try would not mend, or None."""
    try:
        with unmasked_interrupts():
            stage_of(job.stage).runner()(job.points)
    except (Failure, UserError) as failure:
        return failure
    return None


def _ready(job: Job) -> tuple[Job, dict[str, str]]:
    """The job for the points whose earlier work is there; by the id of what of that is damaged, a sentence on it.

    The main rank's view holds for all.
    """
    needed = STAGES[job.stage].needs if job.stage in ("record", "search") else None
    points: Sequence[Point] = job.points
    damage: dict[str, str] = {}

    def has(stage: str, point: "Point") -> bool:
        try:
            return RunDir(point, stage).is_done()
        except Failure as failure:
            damage[point.ids[job.stage]] = str(failure)
            return False

    if needed is not None:
        points = [point for point in points if has(needed, point)]
    elif job.stage == "train" and all(has("train", point) for point in points):
        points = ()  # of a pack that is not through, the job itself knows what is left
    return dataclasses.replace(job, points=tuple(points)), damage if needed else {}


def _join_ranks() -> Notes:
    """Announces this rank to torch; what the job leaves beside its logs."""
    import submitit

    environment = submitit.JobEnvironment()
    if environment.num_tasks > 1:
        # a port that the job's last run left may be taken for a minute
        number = int(environment.raw_job_id) * 7 + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        os.environ["MASTER_PORT"] = str(20000 + number % 12000)  # below the ports that Linux gives to others
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    folder, job_id = environment.paths.folder, environment.job_id
    return Notes(folder, job_id, mark=folder / f"{job_id}_submitted.pkl")  # from which submitit loaded this task
