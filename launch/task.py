"""What a SLURM job does: its work in turn, stopped by a signal at the next safe moment.

Why it stopped goes into a file beside its logs. The job's script reads it when all ranks have ended and decides on a
requeue: no rank can, since one that is killed decides nothing.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from dynexit.errors import Failure, Interrupted, UserError
from dynexit.run_dir import is_done, job_dir, write_json
from launch.plan import Job

PREEMPTED, TIMED_OUT, FAILED_FOR_GOOD, CRASHED, CANCELLED = "preempted", "timed-out", "failed", "crashed", "cancelled"
_EARLY_SECONDS = 65  # SLURM looks at time limits about once a minute
_STOPPED, _FAILED = 75, 1  # exit statuses


@dataclasses.dataclass(frozen=True)
class ClusterTask:
    """The jobs of one task of an array, and when a signal means that its time is up."""

    jobs: tuple[Job, ...]
    time_limit_seconds: float
    signal_delay_seconds: float

    def __call__(self) -> list[str]:
        """Does the jobs; the sentences of what failed. SystemExit where the job was stopped or failed for good."""
        started = time.monotonic()
        folder, job_id = _join_ranks()
        try:
            with _interruptible():
                failures = self._run_all(folder, job_id)
        except Interrupted as stop:
            left = self.time_limit_seconds - (time.monotonic() - started)
            word = TIMED_OUT if left <= self.signal_delay_seconds + _EARLY_SECONDS else PREEMPTED
            print(f"{stop} ({word})", flush=True)
            _note(folder, job_id, word)
            sys.exit(_STOPPED)
        if failures and self.jobs[0].stage == "prepare":  # nothing that waits for it can run
            _note(folder, job_id, FAILED_FOR_GOOD)
            sys.exit(_FAILED)
        return failures

    def _run_all(self, folder: Path, job_id: str) -> list[str]:
        from dynexit.dist import start_ranks, stop_ranks

        dist = self.jobs[0].points[0].config.dist
        ranks = start_ranks(dist.device, dist.num_threads, dist.timeout_seconds)
        failures: list[dict[str, object]] = []
        crash: Exception | None = None
        for job in self.jobs:
            ready = ranks.agree(_ready(job) if ranks.is_main else None)
            if ready is None or not ready.points or (job.stage in ("search", "report") and not ranks.is_main):
                continue
            try:
                reason = _run(ready)
            except Exception as error:
                if ranks.world_size > 1:
                    raise  # the other ranks wait for this one
                traceback.print_exc()
                reason, crash = f"{type(error).__name__}: {error}", error
            if reason:
                if ranks.is_main:
                    print(reason, file=sys.stderr, flush=True)
                failures.append({"stage": job.stage, "points": [p.id for p in ready.points], "reason": reason})
        if ranks.is_main:
            write_json(folder / f"{job_id}.failures.json", failures)
        if crash is not None:
            raise crash
        stop_ranks()
        return [str(failure["reason"]) for failure in failures]


def _run(job: Job) -> str:
    """Runs a job; the sentence of a failure that another try would not mend, or ''."""
    from dynexit import jobs

    try:
        jobs.JOBS[job.stage](job.points, job.study_dir)
    except (Failure, UserError) as failure:
        return str(failure)
    return ""


def _ready(job: Job) -> Job:
    """The job for the points whose earlier work is there; the main rank's view holds for all."""
    needed = {"record": "train", "search": "record"}.get(job.stage)
    points: Sequence = job.points  # type: ignore[type-arg]
    if needed is not None:
        points = [p for p in points if is_done(job_dir(job.study_dir, needed, p.ids[needed]), p.ids[needed])]
    elif job.stage == "train":
        points = [p for p in points if not is_done(job_dir(job.study_dir, "train", p.id), p.id)]
    return dataclasses.replace(job, points=tuple(points))


def _join_ranks() -> tuple[Path, str]:
    """Announces this rank to torch; the folder of the job's logs, and the job's id."""
    import submitit

    environment = submitit.JobEnvironment()
    if environment.num_tasks > 1:
        # a port that the job's last run left may be taken for a minute
        number = int(environment.raw_job_id) * 7 + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        os.environ["MASTER_PORT"] = str(20000 + number % 40000)
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    return environment.paths.folder, environment.job_id


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGUSR2 (time-out, preemption) and SIGTERM (requeue, cancel) end the work at once; a training saves first.

    Whatever is being written is dropped whole. Training has handlers of its own, which let it end its step and save.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        _ignore()
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    def _ignore() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        _ignore()


def _note(folder: Path, job_id: str, word: str) -> None:
    (folder / f"{job_id}.why").write_text(word + "\n", encoding="utf-8")


def script_after(max_timeouts: int, max_preemptions: int, max_retries: int) -> list[str]:
    """The shell lines that follow the ranks in a job's script: note how they ended, requeue up to the limits."""
    return [
        "status=$?",
        '[ "$status" -eq 0 ] && exit 0',
        f'why=$(cat "$job.why" 2>/dev/null || echo {CRASHED})',
        'rm -f "$job.why"',
        'echo "$why $(date +%FT%T) on ${SLURM_JOB_NODELIST:-?} with exit status $status" >> "$job.ends"',
        f"case $why in {TIMED_OUT}) most={max_timeouts} ;; {PREEMPTED}) most={max_preemptions} ;;",
        f"  {CRASHED}) most={max_retries} ;; *) most=0 ;; esac",
        'if [ "$(grep -c "^$why " "$job.ends")" -le "$most" ] && scontrol requeue "$SLURM_JOB_ID"; then',
        "  sleep 300  # until SLURM ends this script",
        "fi",
        'exit "$status"',
    ]


def script_before(folder: Path) -> list[str]:
    """The shell lines that go before the ranks: where this job notes how it ended."""
    name = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_JOB_ID:+_$SLURM_ARRAY_TASK_ID}"
    return [f'job={shlex.quote(str(folder))}/"{name}"', 'rm -f "$job.why"']
