"""Running jobs: in this process, or as processes of their own through submitit (whose only user this file is)."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynexit.errors import Failure, UserError
from launch.plan import Job

_POLL_SECONDS = 0.5


class Task:
    """What submitit calls: one job. After a time-out the same call, made again, goes on where it stopped."""

    def __call__(self, job: Job) -> str | UserError:
        """Runs the job; the text of what failed, or nothing; the user's mistake as what it is."""
        try:
            return run_job(job)
        except UserError as error:
            return UserError(str(error))  # of a subclass not each comes through a pickle

    def checkpoint(self, job: Job) -> Any:
        """What submitit submits again when it must stop this process."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Task(), job)


def run_job(job: Job) -> str:
    """Runs a job in this process; returns the sentence of a failure (of the run, not of the request), or ''."""
    from dynexit import jobs

    try:
        jobs.JOBS[job.stage](job.points, job.study_dir)
    except Failure as failure:
        return str(failure)
    return ""


def run_here(jobs: Sequence[Job]) -> list[str]:
    """Runs the jobs one after the other; one that fails stops no other. Returns the sentences of the failures."""
    return [text for text in map(run_job, jobs) if text]


def run_local(jobs: Sequence[Job], folder: Path) -> list[str]:
    """Runs the jobs as processes of this machine, as many at a time as its CPUs carry; otherwise as `run_here`.

    A mistake of the user's ends the others, as it does there.
    """
    import submitit

    executor = submitit.LocalExecutor(folder=folder)
    executor.update_parameters(timeout_min=jobs[0].points[0].config.dist.timeout_minutes, visible_gpus=_visible_gpus())
    threads = jobs[0].points[0].config.dist.num_threads or os.cpu_count() or 1
    at_once = max(1, (os.cpu_count() or 1) // threads)
    waiting, failures = list(jobs), list[str]()
    running: list[tuple[Job, Any]] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                submitted = executor.submit(Task(), job)
                running.append((job, submitted))
                print(f"{job.name}: process {submitted.job_id}, log {submitted.paths.stdout}", flush=True)
            for job, submitted in [(job, submitted) for job, submitted in running if submitted.done()]:
                running.remove((job, submitted))
                failures += _outcome(job, submitted)
            time.sleep(_POLL_SECONDS if running else 0)
    finally:
        for _, submitted in running:
            submitted.cancel(check=False)
    return failures


def _outcome(job: Job, submitted: Any) -> list[str]:
    import submitit

    try:
        text = submitted.result()
    except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
        last = [line for line in str(error).strip().splitlines() if line.strip()][-1:]
        text = f"{job.name} failed: {' '.join(last).strip()} (log {submitted.paths.stderr})"
    if isinstance(text, UserError):
        raise text
    return [text] if text else []


def _visible_gpus() -> list[int]:
    """All that this process may use; submitit's local processes see none unless they are named."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(number) for number in visible.split(",") if number.strip().isdigit()]
    return list(range(len(list(Path("/proc/driver/nvidia/gpus").glob("*")))))


@contextlib.contextmanager
def hold(study_dir: Path) -> Iterator[None]:
    """Holds the study for this launcher; UserError, naming the holder, where another one has it."""
    study_dir.mkdir(parents=True, exist_ok=True)
    with (study_dir / ".lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UserError(
                f"{study_dir} is held by {lock.read().strip() or 'another launcher'}; wait for it or stop it"
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()} (`{' '.join(sys.argv[1:3])}`)")
        lock.flush()
        yield
