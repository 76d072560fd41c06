"""What a rank of a SLURM job does: its packs in turn, until a signal asks it to stop.

    python -m launch.slurm.worker FOLDER MODULE...

runs the job's own pickle in FOLDER; the study may run the code of each MODULE. How the rank ended goes into its
reason file, which the job's script reads when all ranks have ended.
"""

import atexit
import contextlib
import dataclasses
import errno
import os
import pickle
import signal
import stat
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dynexit import errors
from dynexit.errors import Failure, UserError
from dynexit.study.own_code import allowing_code
from launch.slurm import attempts
from launch.slurm.attempts import COMPLETED, FAILED, STOPPED_STATUS, RankReason

if TYPE_CHECKING:
    from dynexit.dist import Ranks
    from launch.plan import Job

_WATCH_SECONDS = 5
_PICKLE_SECONDS = 60  # submitit names it after the job when sbatch has answered
_FAILURES = (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EDQUOT)  # another try would meet them again


class _FailedAlone(Exception):  # noqa: N818  its text is the rank's error message
    """One of several ranks failed, and the others wait for it."""


@dataclasses.dataclass(frozen=True)
class ClusterTask:
    """The work of one task of an array: packs, each with the jobs that are done for it in turn."""

    packs: "tuple[tuple[Job, ...], ...]"
    max_retries: int = 0

    def __call__(self, job: Path, reason: RankReason) -> int:
        """Does the packs that are left, and returns the exit status: 1 if one of them failed, now or before."""
        ranks = _start_ranks(self.packs[0][0])
        ends = attempts.read_attempts(job).ends
        left = attempts.packs_left(ends, len(self.packs), self.max_retries)
        completed = {end.pack for end in ends if end.reason == COMPLETED}
        for pack in ranks.broadcast(left):
            errors.end_if_stopped()
            reason.pack, reason.num_packs = pack, len(self.packs)
            if ranks.is_main:
                reason.write()
            found = do_pack(self.packs[pack], ranks)
            finished = {"pack": pack, "reason": FAILED if found else COMPLETED, "error": "; ".join(found)}
            reason.finished.append(finished)
            completed |= set() if found else {pack}
        reason.pack, reason.word = None, COMPLETED
        if ranks.is_main:
            reason.write()
        if ranks.world_size > 1:
            from dynexit.dist import stop_ranks

            stop_ranks()
        return int(len(completed) < len(self.packs))


def do_pack(jobs: "tuple[Job, ...]", ranks: "Ranks") -> list[str]:
    """Does the jobs of a pack for the points whose input is complete, and returns the error messages of the others.

    Raises what another try may repair, and _FailedAlone if one of several ranks failed.
    """
    found: list[str] = []
    for job in jobs:
        ready, damaged, missing = ranks.broadcast(split_by_input(job) if ranks.is_main else (job, [], []))
        new = damaged + ([] if found else missing)  # what the job before did not make has its message already
        for text in new if ranks.is_main else []:
            print(text, file=sys.stderr, flush=True)
        found += new
        if ready.points:
            found += _run(ready, ranks)
    return found


def _run(job: "Job", ranks: "Ranks") -> list[str]:
    """Runs a job; returns the error message of a failure that another try would repeat, if any."""
    from dynexit.study.stages import stage_of

    try:
        with errors.unmasked_interrupts():
            stage_of(job.stage).runner()(job.points)
        return []
    except (Failure, UserError, OSError) as error:
        if errors.is_transient(error) or (isinstance(error, OSError) and error.errno not in _FAILURES):
            raise
        if ranks.world_size > 1 and not getattr(error, "on_all_ranks", False):
            raise _FailedAlone(str(error)) from error
        print(error, file=sys.stderr, flush=True)
        return [str(error)]


def split_by_input(job: "Job") -> "tuple[Job, list[str], list[str]]":
    """Splits off the points whose input is not complete: the job for the rest, error messages for damaged and missing.

    Files decide, not the state of another job in the queue.
    """
    from dynexit.run_dir import RunDir
    from dynexit.study.stages import POINT_STAGES, STAGES

    needed = STAGES[job.stage].needs
    if needed is None or job.stage not in POINT_STAGES:  # a report shows what there is
        return job, [], []
    ready, damaged, missing = [], [], []
    for point in job.points:
        try:
            if RunDir(point, needed).is_done():
                ready.append(point)
            else:
                missing.append(f"{job.stage} {point.label}: its {needed} is not done")
        except Failure as failure:
            damaged.append(str(failure))
    return dataclasses.replace(job, points=tuple(ready)), list(dict.fromkeys(damaged)), missing


def _start_ranks(job: "Job") -> Any:
    """Joins the job's ranks, if it has several; one alone needs no torch, as for a search."""
    if int(os.environ["SLURM_NTASKS"]) == 1:
        return SimpleNamespace(is_main=True, world_size=1, broadcast=lambda value: value)
    import submitit

    from dynexit.dist import start_ranks

    # a port that the job's last attempt left may be taken for a minute
    number = int(os.environ["SLURM_JOB_ID"]) * 7 + attempts.restart_count()
    os.environ["MASTER_PORT"] = str(20000 + number % 12000)  # below the ports that Linux gives to others
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    dist = job.points[0].config.dist
    return start_ranks(dist.device, dist.num_threads, dist.timeout_seconds)


def load_task(path: Path) -> Any:
    """The pickled task of this job. Raises UserError if others could have written it: a pickle can run any program."""
    deadline = time.monotonic() + _PICKLE_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(1)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        both = (os.fstat(file.fileno()), path.parent.stat())
        if any(one.st_uid != os.geteuid() or stat.S_IMODE(one.st_mode) & 0o077 for one in both):
            raise UserError(
                f"{path} and its folder should belong to the user who runs the job, with modes 0600 and 0700; "
                "submit the study again"
            )
        return pickle.load(file).function


def _watch(job: Path, restart: int) -> None:
    """Ends this process if SLURM, which took its node for dead, has started the job again: two must not write."""
    while True:
        time.sleep(_WATCH_SECONDS)
        with contextlib.suppress(OSError):
            if attempts.read_attempts(job).is_superseded(restart):
                print("SLURM has started this job again elsewhere; this process ends", file=sys.stderr, flush=True)
                os._exit(1)


def main(folder: Path) -> int:
    """Runs this rank and returns its exit status."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, errors.request_stop)
    array, environment = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ
    job = folder / (f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"])
    reason = RankReason(attempts.reason_path(job, int(environment["SLURM_PROCID"])), attempts.restart_count())
    threading.Thread(target=_watch, args=(job, reason.restart), daemon=True).start()
    try:
        return int(load_task(folder / f"{job.name}_submitted.pkl")(job, reason))
    except BaseException as error:
        reason.error, status = str(error), 1
        if errors.received_signals:  # SIGTERM is also what srun sends to the ranks beside one that was killed
            print(error if isinstance(error, errors.Interrupted) else f"stopped: {error!r}", file=sys.stderr)
            is_asked = signal.SIGUSR2 in errors.received_signals
            reason.word, status = attempts.STOPPED if is_asked else attempts.TERMINATED, STOPPED_STATUS
        elif isinstance(error, (UserError, _FailedAlone)):
            print(error, file=sys.stderr)
            reason.word = FAILED
        else:
            traceback.print_exc()
            reason.word, reason.error = attempts.CRASHED, f"{type(error).__name__}: {error}"
        reason.write()
        return status


if __name__ == "__main__":
    with allowing_code(sys.argv[2:]):
        exit_status = main(Path(sys.argv[1]))
    atexit._run_exitfuncs()  # threads of a process group that was left may abort an interpreter
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)
