"""Running jobs: in this process, or as processes of this machine, with the ranks that the study asks for."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from dynexit.errors import Failure, Interrupted, UserError
from dynexit.jobs.planning.missing import Job, done_together
from dynexit.provenance import run_stage
from dynexit.study.dist import DistSettings
from dynexit.study.grid import Study
from dynexit.study.own_code import allowed_code
from launch.tasks.attempts import FAILED, append_lines
from launch.tasks.decision import Decision, RequeueLimits, settle
from launch.tasks.folder import add_array, new_folder, work_of

# the variables by which a process knows that it is one of several
_ANNOUNCEMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
_POLL_SECONDS = 0.2
_ENDING_SECONDS = 30
_LOST_SECONDS = 10  # in which the other ranks find out by themselves


def run_here(jobs: Sequence[Job]) -> list[str]:
    """Runs the jobs one after the other; one that fails stops no other. Returns the messages of the failures."""
    failures = []
    for job in jobs:
        try:
            run_stage(job.stage, job.points)
        except Failure as failure:
            failures.append(str(failure))
    return failures


class _LocalJob:
    """A job that runs as `num_ranks` processes of this machine, `path` the beginning of the names of its files."""

    def __init__(self, job: Job, path: Path, num_ranks: int) -> None:
        self.job, self.path, self.num_ranks = job, path, num_ranks
        self.restart = -1
        self.gpus: list[int] = []
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.lost_at: float | None = None  # when a rank was first seen to be missing

    def start(self, gpus: list[int]) -> None:
        """Starts the next attempt."""
        self.gpus, self.lost_at = gpus, None
        self.restart += 1
        line = {"start": time.strftime("%FT%T"), "restart": self.restart, "node": socket.gethostname()}
        append_lines(self.path, [line])
        port = _free_port()
        self.ranks = [self._start(rank, port) for rank in range(self.num_ranks)]
        ranks = f", {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        print(f"{self.job.name}: process {self.ranks[0].pid}{ranks}, log {self.log_path(0, 'out')}", flush=True)

    def _start(self, rank: int, port: int) -> "subprocess.Popen[bytes]":
        environment = {name: value for name, value in os.environ.items() if name not in _ANNOUNCEMENT}
        if self.num_ranks > 1:
            values = (rank, rank, self.num_ranks, self.num_ranks, "127.0.0.1", port)
            environment |= dict(zip(_ANNOUNCEMENT, map(str, values), strict=False))
        if self.gpus or self.job.points[0].config.dist.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.gpus))
        command = [sys.executable, "-m", "launch.tasks.worker", str(self.path), str(self.restart), str(os.getpid())]
        command += allowed_code()
        with self.log_path(rank, "out").open("ab") as out, self.log_path(rank, "err").open("ab") as err:
            # in a session of its own: only the launcher hears Ctrl-C
            return subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)

    def log_path(self, rank: int, kind: str) -> Path:
        return self.path.with_name(f"{self.path.name}_{rank}_log.{kind}")

    def is_over(self) -> bool:
        """Whether all ranks have ended. Ends those that wait for a lost one."""
        alive = [process for process in self.ranks if process.poll() is None]
        if alive and any(process.returncode for process in self.ranks):
            self.lost_at = self.lost_at or time.monotonic()
            if time.monotonic() - self.lost_at > _LOST_SECONDS:
                for process in alive:
                    process.kill()
        return not alive

    def terminate(self) -> None:
        """Asks the ranks to end; trainings save first."""
        for process in self.ranks:
            if process.poll() is None:
                process.terminate()

    def settle(self, limits: RequeueLimits) -> Decision:
        """Notes how the attempt ended; returns what follows. Raises UserError for the user's mistake."""
        # as a shell and srun give it: 128 + the signal
        status = max(one.returncode if one.returncode >= 0 else 128 - one.returncode for one in self.ranks)
        decision = settle(self.path, self.restart, socket.gethostname(), status, 0, limits)
        if status == 2 and decision.end is not None:
            raise UserError(decision.end.error)
        return decision

    def failure(self, decision: Decision) -> str:
        """Returns the message of the failure."""
        error = decision.end.error if decision.end is not None else ""
        if error and decision.end is not None and decision.end.reason == FAILED:
            return error
        logs = ", ".join(str(self.log_path(rank, "err")) for rank in range(self.num_ranks))
        return f"{self.job.name} failed: {error or f'exit status {decision.status}'} (log {logs})"


def run_local(study: Study, jobs: Sequence[Job]) -> list[str]:
    """Runs the jobs as processes of this machine, otherwise as `run_here`; a mistake of the user's ends the others.

    Each gets GPUs of its own, one a rank, and the next starts when one has ended; without GPUs as many run at a time as
    the CPUs carry. A job that crashed is tried `dist.max_retries` times more. Logs and attempts are in a new folder in
    `submitted`. Raises UserError if the study asks for more ranks than there are GPUs.
    """
    dist = study.config.dist
    num_ranks = dist.tasks_per_node if done_together(jobs[0].stage, dist) else 1
    places = _places(dist, num_ranks)
    folder = new_folder(study, "submitted")
    add_array(folder, jobs[0].stage, {str(i): [work_of([job])] for i, job in enumerate(jobs)})
    limits = RequeueLimits(0, dist.max_preemptions, dist.max_retries, math.inf, num_ranks)  # there is no time limit
    waiting = [_LocalJob(job, folder / str(i), num_ranks) for i, job in enumerate(jobs)]
    running, failures = list[_LocalJob](), list[str]()
    with _ending(running):
        while waiting or running:
            while waiting and places:
                running.append(waiting.pop(0))
                running[-1].start(places.pop(0))
            for local in [local for local in running if local.is_over()]:
                running.remove(local)
                places.append(local.gpus)
                decision = local.settle(limits)
                if decision.requeue:
                    print(f"{local.failure(decision)}; tried again", flush=True)
                    waiting.append(local)
                elif decision.status:
                    failures.append(local.failure(decision))
            time.sleep(_POLL_SECONDS if running else 0)
    return failures


@contextlib.contextmanager
def _ending(running: Sequence[_LocalJob]) -> Iterator[None]:
    """Ends what runs when the block is left, also by SIGTERM: trainings save, and what takes too long is killed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for local in running:
            local.terminate()
        deadline = time.monotonic() + _ENDING_SECONDS
        for process in [process for local in running for process in local.ranks]:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _places(dist: DistSettings, ranks: int) -> list[list[int]]:
    """The GPUs of each job that may run at a time; without GPUs as many empty lists as the CPUs carry jobs."""
    gpus = [] if dist.device == "cpu" else visible_gpus()
    if not gpus:
        cpus = os.cpu_count() or 1
        return [[] for _ in range(max(1, cpus // ((dist.num_threads or cpus) * ranks)))]
    if ranks > len(gpus):
        raise UserError(f"dist.tasks_per_node = {ranks}: should be at most {len(gpus)}, the GPUs that are visible here")
    return [gpus[i : i + ranks] for i in range(0, len(gpus) - ranks + 1, ranks)]


def visible_gpus() -> list[int]:
    """The numbers of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(number) for number in visible.split(",") if number.strip().isdigit()]
    return list(range(len(list(Path("/proc/driver/nvidia/gpus").glob("*")))))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
