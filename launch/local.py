"""Running jobs: in this process, or as processes of this machine, with the ranks that the study asks for.

A worker gets its job from the launcher's pipe and leaves its result as JSON in a folder of this launch alone. Nothing
that an earlier launch or somebody else left is read.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dynexit.errors import Failure, Interrupted, UserError, unmasked_interrupts
from dynexit.run_dir import read_json, write_json
from dynexit.study.grid import Point
from dynexit.study.own_code import allowed_code, allowing_code
from dynexit.study.schema import Config, DistSettings
from dynexit.study.stages import stage_of
from launch.lock import work_for
from launch.plan import Job, done_together

_POLL_SECONDS = 0.2
_ENDING_SECONDS = 30
_LOST_SECONDS = 10  # in which the other ranks find out by themselves


def run_job(job: Job) -> str:
    """Runs a job in this process. Returns the message of a failure (of the run, not of the request), or ''."""
    try:
        stage_of(job.stage).runner()(job.points)
    except Failure as failure:
        return str(failure)
    return ""


def run_here(jobs: Sequence[Job]) -> list[str]:
    """Runs the jobs one after the other; one that fails stops no other. Returns the messages of the failures."""
    return [text for text in map(run_job, jobs) if text]


class _LocalJob:
    """A job that runs as `num_ranks` processes of this machine."""

    def __init__(self, job: Job, path: Path, gpus: list[int], num_ranks: int) -> None:
        """`path` is where the logs and results of the ranks are, without their endings."""
        self.job, self.path, self.gpus = job, path, gpus
        self.timed_out = False
        self.lost_at: float | None = None  # when a rank was first seen to be missing
        self.started = time.monotonic()
        text = json.dumps(_to_json(job)).encode()
        port = _free_port() if num_ranks > 1 else None
        self.ranks = [self._start(rank, num_ranks, port) for rank in range(num_ranks)]
        for process in self.ranks:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:  # its log has the reason
                process.stdin.write(text)

    def _start(self, rank: int, num_ranks: int, port: int | None) -> "subprocess.Popen[bytes]":
        environment = dict(os.environ)
        dist = self.job.points[0].config.dist
        if self.gpus or dist.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.gpus))
        if port is not None:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
            environment |= {name: str(value) for name, value in numbers.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "launch.local", str(os.getpid()), str(self.result_path(rank))]
        command += allowed_code()
        with self.log_path(rank, "out").open("wb") as out, self.log_path(rank, "err").open("wb") as err:
            # in a session of its own: only the launcher hears Ctrl-C
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment, start_new_session=True
            )

    def result_path(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}-rank{rank}.json")

    def log_path(self, rank: int, kind: str) -> Path:
        return self.path.with_name(f"{self.path.name}-rank{rank}.{kind}")

    def is_over(self) -> bool:
        """Whether all ranks have ended. Ends those that wait for a lost one, and all after the time limit."""
        alive = [process for process in self.ranks if process.poll() is None]
        if alive and any(process.returncode for process in self.ranks):
            self.lost_at = self.lost_at or time.monotonic()
            if time.monotonic() - self.lost_at > _LOST_SECONDS:
                for process in alive:
                    process.kill()
        limit = 60 * self.job.points[0].config.dist.timeout_minutes
        if alive and not self.timed_out and time.monotonic() - self.started > limit:
            self.timed_out = True
            self.terminate()
        return not alive

    def terminate(self) -> None:
        """Asks the ranks to end; trainings save first."""
        for process in self.ranks:
            if process.poll() is None:
                process.terminate()

    def failure(self) -> tuple[str, bool]:
        """Returns the message of the failure, or '', and whether it was a crash, so that another try may help.

        Raises UserError for the user's mistake.
        """
        results = [read_json(path) for path in map(self.result_path, range(len(self.ranks))) if path.is_file()]
        if len(results) < len(self.ranks) or any(process.returncode for process in self.ranks):
            logs = [self.log_path(rank, "err") for rank in range(len(self.ranks))]
            reason = _last_error(logs) or _exit_statuses(self.ranks)
            return f"{self.job.name} failed: {reason} (log {', '.join(map(str, logs))})", True
        for result in results:
            if result["user_error"]:
                raise UserError(result["user_error"])
        return next((result["failure"] for result in results if result["failure"]), ""), False


def run_local(jobs: Sequence[Job], folder: Path) -> list[str]:
    """Runs the jobs as processes of this machine, otherwise as `run_here`; a mistake of the user's ends the others.

    Each gets GPUs of its own, one a rank, and the next starts when one has ended; without GPUs as many run at a time as
    the CPUs carry. A job that crashed is tried `dist.max_retries` times more. Logs and results are in a new folder in
    `folder`. Raises UserError if the study asks for more ranks than there are GPUs.
    """
    dist = jobs[0].points[0].config.dist
    num_ranks = dist.tasks_per_node if done_together(jobs[0].stage, dist) else 1
    places = _places(dist, num_ranks)
    launch_dir = _new_folder(folder)
    waiting, failures = [(job, 1) for job in jobs], list[str]()
    running: dict[_LocalJob, int] = {}
    with _terminable(), _ending(running):
        for number in range(10**9):
            while waiting and places:
                (job, attempt), gpus = waiting.pop(0), places.pop(0)
                path = launch_dir / f"{job.stage}-{number:04d}-{len(waiting):04d}-try{attempt}"
                local = _LocalJob(job, path, gpus, num_ranks)
                running[local] = attempt
                where = f"process {local.ranks[0].pid}" + (f", {num_ranks} ranks" if num_ranks > 1 else "")
                print(f"{job.name}: {where}, log {local.log_path(0, 'out')}", flush=True)
            if not running:
                break
            for local in [local for local in running if local.is_over()]:
                attempt = running.pop(local)
                places.append(local.gpus)
                failure, crashed = ("", False) if local.timed_out else local.failure()
                if local.timed_out:
                    print(f"{local.job.name}: reached the time limit and resumes", flush=True)
                    waiting.append((local.job, attempt))
                elif crashed and attempt <= dist.max_retries:
                    print(f"{failure}; tried again, {attempt} of {dist.max_retries}", flush=True)
                    waiting.append((local.job, attempt + 1))
                elif failure:
                    failures.append(failure)
            time.sleep(_POLL_SECONDS if running else 0)
    return failures


def _new_folder(folder: Path) -> Path:
    """Makes a folder that no other launch has, which only this user may enter."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(10**6):
        with contextlib.suppress(FileExistsError):
            path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{f'-{number}' if number else ''}"
            path.mkdir(mode=0o700)
            return path
    raise Failure(f"{folder} has no free name for a launch")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}")


@contextlib.contextmanager
def _ending(running: dict[_LocalJob, int]) -> Iterator[None]:
    """Ends what runs when the block is left: trainings save, and what has not ended after a while is killed."""
    try:
        yield
    finally:
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


def _exit_statuses(processes: "Sequence[subprocess.Popen[bytes]]") -> str:
    """What is known of processes that ended without an error message."""
    statuses = [
        f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        for status in (process.returncode for process in processes)
    ]
    return "; ".join(f"rank {rank} {status}" for rank, status in enumerate(statuses))


def _last_error(logs: Sequence[Path]) -> str:
    """Returns the last error that a rank printed, rather than what the others said of its end; '' if none did."""
    found = _errors(path for path in logs if path.suffix == ".err")
    # if its errors had no room on the disk, those of others may have
    found = found or _errors(path for path in logs if path.suffix == ".out")
    silent = [line for line in found if "Connection" not in line]
    own = [line for line in silent if "gloo" not in line.lower()]
    return (own or silent or found or [""])[0]


def _errors(logs: Iterable[Path]) -> list[str]:
    """The last error in each of the logs that have one."""
    found = []
    for path in logs:
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in text.splitlines()]  # torch puts it before each
        kinds = r"\S*(Error|Exception|Interrupted|error|Killed)\b|\[Errno \d+\]"
        errors = [line for line in lines if re.match(kinds, line)]
        found += errors[-1:]
    return found


def _to_json(job: Job) -> dict[str, Any]:
    points = [
        {**dataclasses.asdict(dataclasses.replace(point, config=None)), "config": point.config.model_dump(mode="json")}  # type: ignore[arg-type]
        for point in job.points
    ]
    return {"stage": job.stage, "points": points}


def _from_json(content: dict[str, Any]) -> Job:
    points = (
        Point(**{**point, "config": Config.model_validate(point["config"]), "sweep_keys": tuple(point["sweep_keys"])})
        for point in content["points"]
    )
    return Job(content["stage"], tuple(points))


def main(launcher: int, result_path: Path) -> int:
    """A worker: runs the job that comes from standard input. SIGTERM ends it, a training at its step, saved."""
    signal.signal(signal.SIGTERM, _interrupt)
    job = _from_json(json.loads(sys.stdin.buffer.read()))
    work_for(launcher, job.study_dir)
    result = {"failure": "", "user_error": ""}
    try:
        with unmasked_interrupts():
            if "WORLD_SIZE" in os.environ:
                _join_ranks(job.points[0].config.dist)
            result["failure"] = run_job(job)
    except UserError as error:
        result["user_error"] = str(error)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    if "WORLD_SIZE" in os.environ:
        from dynexit.dist import stop_ranks

        stop_ranks()
    write_json(result_path, result)
    return 0


def _join_ranks(dist: DistSettings) -> None:
    from dynexit.dist import start_ranks

    start_ranks(dist.device, dist.num_threads, dist.timeout_seconds)


if __name__ == "__main__":
    with allowing_code(sys.argv[3:]):
        status = main(int(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of a process group that was left may abort an interpreter
