"""Running jobs: in this process, or through submitit as processes of their own, with the ranks that the study asks."""

import contextlib
import dataclasses
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dynexit.errors import Failure, Interrupted, UserError
from dynexit.study.schema import DistSettings
from dynexit.study.stages import stage_of
from launch.lock import work_for
from launch.log_errors import last_error
from launch.plan import Job, done_together

_POLL_SECONDS = 0.5
_ENDING_SECONDS = 30
_LOST_SECONDS = 10  # in which the other ranks find out by themselves


@dataclasses.dataclass(frozen=True)
class LocalTask:
    """What submitit calls: one job. After a time-out the same call, made again, goes on where it stopped.

    Where there are several ranks, they meet at `port` of this machine. SIGTERM ends it, a training at its step, saved.
    """

    launcher: int
    port: int | None = None

    def __call__(self, job: Job) -> str | UserError:
        """Runs the job; the text of what failed, or nothing; the user's mistake as what it is."""
        signal.signal(signal.SIGTERM, _interrupt)
        work_for(self.launcher, job.study_dir)
        if self.port is not None:
            self._join_ranks(self.port, job)
        try:
            text = run_job(job)
        except UserError as error:
            return UserError(str(error))  # of a subclass not each comes through a pickle
        if self.port is not None:
            from dynexit.dist import stop_ranks

            stop_ranks()
        return text

    @staticmethod
    def _join_ranks(port: int, job: Job) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        from dynexit.dist import start_ranks

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist = job.points[0].config.dist
        start_ranks(dist.device, dist.num_threads, dist.timeout_seconds)

    def checkpoint(self, job: Job) -> Any:
        """What submitit submits again when it must stop this process."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


def run_job(job: Job) -> str:
    """Runs a job in this process; returns the sentence of a failure (of the run, not of the request), or ''."""
    try:
        stage_of(job.stage).runner()(job.points)
    except Failure as failure:
        return str(failure)
    return ""


def run_here(jobs: Sequence[Job]) -> list[str]:
    """Runs the jobs one after the other; one that fails stops no other. Returns the sentences of the failures."""
    return [text for text in map(run_job, jobs) if text]


@dataclasses.dataclass
class _Running:
    """A job that runs as processes of this machine."""

    job: Job
    submitted: Any
    gpus: list[int]
    attempt: int
    lost_at: float | None = None  # when a rank was first seen to be gone


def run_local(jobs: Sequence[Job], folder: Path) -> list[str]:
    """Runs the jobs as processes of this machine, otherwise as `run_here`; a mistake of the user's ends the others.

    Each gets GPUs of its own, one a rank, and the next starts when one has ended; without GPUs as many run at a time as
    the CPUs carry. A job that crashed is tried `dist.max_retries` times more. Raises UserError where the study asks for
    more ranks than there are GPUs.
    """
    import submitit

    executor = submitit.LocalExecutor(folder=folder)
    dist = jobs[0].points[0].config.dist
    ranks = dist.tasks_per_node if done_together(jobs[0].stage, dist) else 1
    places = _places(dist, ranks)
    waiting, failures = [(job, 1) for job in jobs], list[str]()
    running: list[_Running] = []
    with _signals(_interrupt, signal.SIGTERM), _ending(running):
        while waiting or running:
            while waiting and places:
                (job, attempt), gpus = waiting.pop(0), places.pop(0)
                executor.update_parameters(
                    timeout_min=dist.timeout_minutes, tasks_per_node=ranks, visible_gpus=gpus, gpus_per_node=len(gpus)
                )
                with _signals(signal.SIG_IGN, signal.SIGINT):  # of Ctrl-C only the launcher is to hear
                    submitted = executor.submit(LocalTask(os.getpid(), _free_port() if ranks > 1 else None), job)
                running.append(_Running(job, submitted, gpus, attempt))
                where = f"process {submitted.job_id}" + (f", {ranks} ranks" if ranks > 1 else "")
                log = submitted.task(0).paths.stdout
                print(f"{job.name}: {where}, log {log}", flush=True)
            for entry in [entry for entry in running if entry.submitted.done()]:
                running.remove(entry)
                places.append(entry.gpus)
                failed, crashed = _outcome(entry.job, entry.submitted)
                if crashed and entry.attempt <= dist.max_retries:
                    print(f"{failed}; tried again, {entry.attempt} of {dist.max_retries}", flush=True)
                    waiting.append((entry.job, entry.attempt + 1))
                elif failed:
                    failures.append(failed)
            for entry in running if ranks > 1 else []:
                _end_if_a_rank_is_lost(entry, ranks)
            time.sleep(_POLL_SECONDS if running else 0)
    return failures


@contextlib.contextmanager
def _signals(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)


@contextlib.contextmanager
def _ending(running: Sequence[_Running]) -> Iterator[None]:
    """Ends what runs when the block is left: trainings save, and what has not ended after a while is killed."""
    import psutil

    try:
        yield
    finally:
        processes = []
        for entry in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                submitits = psutil.Process(int(entry.submitted.job_id))
                processes += [submitits, *submitits.children()]
                submitits.terminate()  # it passes that on
        for process in psutil.wait_procs(processes, timeout=_ENDING_SECONDS)[1]:
            process.kill()


def _end_if_a_rank_is_lost(entry: _Running, ranks: int) -> None:
    """Kills the other ranks some seconds after one has gone before its time: they might wait for it for long."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        alive = [child for child in psutil.Process(int(entry.submitted.job_id)).children() if child.is_running()]
        tasks = [entry.submitted.task(rank) for rank in range(ranks)]
        through = sum(task.paths.result_pickle.exists() and task.exception() is None for task in tasks)
        if not alive or len(alive) + through >= ranks:
            return
        entry.lost_at = entry.lost_at or time.monotonic()
        if time.monotonic() - entry.lost_at > _LOST_SECONDS:
            for child in alive:
                child.kill()


def _places(dist: DistSettings, ranks: int) -> list[list[int]]:
    """The GPUs of each job that may run at a time; without GPUs as many empty lists as the CPUs carry jobs."""
    gpus = [] if dist.device == "cpu" else visible_gpus()
    if not gpus:
        cpus = os.cpu_count() or 1
        return [[] for _ in range(max(1, cpus // ((dist.num_threads or cpus) * ranks)))]
    if ranks > len(gpus):
        raise UserError(f"dist.tasks_per_node = {ranks}: should be at most {len(gpus)}, the GPUs that are visible here")
    return [gpus[i : i + ranks] for i in range(0, len(gpus) - ranks + 1, ranks)]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _outcome(job: Job, submitted: Any) -> tuple[str, bool]:
    """The sentence of a job's failure, or '', and whether it crashed, so that another try may help."""
    import submitit

    try:
        texts = submitted.results()
    except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
        logs = sorted(submitted.task(0).paths.folder.glob(f"{submitted.job_id}_*_log.err"))
        last = [line for line in str(error).strip().splitlines() if line.strip()][-1:]
        said = last_error(logs) or " ".join(line for line in last if " INFO " not in line) or "it ended without a word"
        return f"{job.name} failed: {said} (log {', '.join(map(str, logs))})", True
    for text in texts:
        if isinstance(text, UserError):
            raise text
    return next(filter(None, texts), ""), False  # all ranks say the same


def visible_gpus() -> list[int]:
    """All that this process may use; submitit's local processes see none unless they are named."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(number) for number in visible.split(",") if number.strip().isdigit()]
    return list(range(len(list(Path("/proc/driver/nvidia/gpus").glob("*")))))
