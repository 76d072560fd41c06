"""What a rank of a job does, under SLURM or as a local process: its packs in turn, until a signal asks it to stop.

    python -m launch.tasks.worker FOLDER/JOB RESTART [LAUNCHER] [MODULE...]

LAUNCHER is the process that started a local rank; the study may run the code of each MODULE. How the rank ended goes
into its reason file, which is read when all ranks have ended. The exit status is 0, 1 for a failure, 2 for the user's
mistake, 75 when a signal stopped it.
"""

import atexit
import contextlib
import errno
import os
import signal
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
from launch.tasks import attempts
from launch.tasks.attempts import COMPLETED, FAILED, RankReason

if TYPE_CHECKING:
    from dynexit.dist import Ranks
    from dynexit.jobs.planning.missing import Job

_WATCH_SECONDS = 5
_LIST_SECONDS = 60  # within which the launcher lists a job that sbatch took
_FAILURES = (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EDQUOT)  # another try would meet them again

ONE_RANK = SimpleNamespace(is_main=True, world_size=1, broadcast=lambda value: value)  # needs no torch


class _FailedAlone(Exception):  # noqa: N818  its text is the rank's error message
    """One of several ranks failed, and the others wait for it."""


def run_packs(job: Path, reason: RankReason, packs: "list[tuple[Job, ...]]") -> int:
    """Does the packs that are left, and returns the exit status: 0 only if all have completed, now or before."""
    ranks = _start_ranks(packs[0][0], job)
    ends = attempts.read_attempts(job).ends
    max_retries = packs[0][0].points[0].config.dist.max_retries
    completed = {end.pack for end in ends if end.reason == COMPLETED}
    is_mistake = False
    for pack in ranks.broadcast(attempts.packs_left(ends, len(packs), max_retries)):
        errors.end_if_stopped()
        reason.pack = pack
        if ranks.is_main:
            reason.write()
        found = do_pack(packs[pack], ranks)
        error = "; ".join(map(str, found))
        reason.finished.append({"pack": pack, "reason": FAILED if found else COMPLETED, "error": error})
        completed |= set() if found else {pack}
        is_mistake |= any(isinstance(one, UserError) for one in found)
    reason.pack, reason.word = None, COMPLETED
    if ranks.is_main:
        reason.write()
    if ranks.world_size > 1:
        from dynexit.dist import stop_ranks

        stop_ranks()
    return 2 if is_mistake else int(len(completed) < len(packs))


def do_pack(jobs: "tuple[Job, ...]", ranks: "Ranks") -> list[Exception]:
    """Does the jobs of a pack for the points whose input is complete, and returns the errors of the others.

    Raises what another try may repair, and _FailedAlone if one of several ranks failed.
    """
    from dynexit.jobs.planning.missing import split_by_input

    found: list[Exception] = []
    for job in jobs:
        ready, damaged, missing = ranks.broadcast(split_by_input(job) if ranks.is_main else (job, [], []))
        new = damaged + ([] if found else missing)  # what the job before did not make has its message already
        for text in new if ranks.is_main else []:
            print(text, file=sys.stderr, flush=True)
        found += map(Failure, new)
        if ready.points:
            found += _run(ready, ranks)
    return found


def _run(job: "Job", ranks: "Ranks") -> list[Exception]:
    """Runs a job; returns the failure that another try would repeat, if any."""
    from dynexit.provenance import run_stage

    try:
        with errors.unmasked_interrupts():
            run_stage(job.stage, job.points)
        return []
    except (Failure, UserError, OSError) as error:
        if errors.is_transient(error) or (isinstance(error, OSError) and error.errno not in _FAILURES):
            raise
        if ranks.world_size > 1 and not getattr(error, "on_all_ranks", False):
            raise _FailedAlone(str(error)) from error
        print(error, file=sys.stderr, flush=True)
        return [error]


def _announce_ranks(restart: int) -> None:
    """Sets the variables of torch.distributed from those of SLURM."""
    if int(os.environ["SLURM_NTASKS"]) > 1:
        import submitit

        # a port that the job's last attempt left may be taken for a minute; these are below what Linux gives to others
        os.environ["MASTER_PORT"] = str(20000 + (int(os.environ["SLURM_JOB_ID"]) * 7 + restart) % 12000)
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _start_ranks(first: "Job", job: Path) -> Any:
    """Joins the job's ranks, if it has several; one alone needs no torch, as for a search."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ONE_RANK
    from dynexit.dist import record_flights, start_ranks

    record_flights(job.with_name(f"{job.name}_nccl_trace_"))
    dist = first.points[0].config.dist
    return start_ranks(dist.device, dist.num_threads, dist.timeout_seconds)


def listed_work(job: Path) -> list[attempts.Work]:
    """The packs of a job. Raises UserError if its launcher was killed before it listed the job: it must not write."""
    deadline = time.monotonic() + _LIST_SECONDS
    while (work := attempts.read_work(job)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{job.parent / attempts.JOBS} does not list job {job.name}; submit the study again")
        time.sleep(1)
    return work


def _watch(job: Path, restart: int) -> None:
    """Ends this process if SLURM, which took its node for dead, has started the job again: two must not write."""
    while True:
        time.sleep(_WATCH_SECONDS)
        with contextlib.suppress(OSError, Failure):
            if attempts.read_attempts(job).restart > restart:
                print("SLURM has started this job again elsewhere; this process ends", file=sys.stderr, flush=True)
                os._exit(1)


def leave(status: int) -> None:
    """Ends this process: threads of a process group that was left may abort an interpreter that ends by itself."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(job: Path, restart: int, launcher: int | None = None) -> int:
    """Runs this rank and returns its exit status."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, errors.request_stop)
    rank = int(os.environ["SLURM_PROCID"] if launcher is None else os.environ.get("RANK", "0"))
    reason = RankReason(attempts.reason_path(job, rank), restart)
    if launcher is None:
        threading.Thread(target=_watch, args=(job, restart), daemon=True).start()
    else:
        from launch.lock import work_for

        work_for(launcher, job.parents[2])
    try:
        if launcher is None:
            _announce_ranks(restart)
        work = listed_work(job)
        from launch.tasks.folder import read_jobs

        return run_packs(job, reason, read_jobs(job.parent, work))
    except BaseException as error:
        reason.error, status = str(error), 1
        if errors.received_signals:  # SIGTERM is also what srun sends to the ranks beside one that was killed
            print(error if isinstance(error, errors.Interrupted) else f"stopped: {error!r}", file=sys.stderr)
            is_asked = signal.SIGUSR2 in errors.received_signals
            reason.word = attempts.STOPPED if is_asked else attempts.TERMINATED
            status = attempts.STOPPED_STATUS
        elif isinstance(error, (UserError, _FailedAlone)):
            print(error, file=sys.stderr)
            reason.word = FAILED
            status = 2 if isinstance(error.__cause__ or error, UserError) else 1
        else:
            traceback.print_exc()
            reason.word, reason.error = attempts.CRASHED, f"{type(error).__name__}: {error}"
        reason.write()
        return status


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[2:] if word.isdecimal()]
    with allowing_code(word for word in sys.argv[2:] if not word.isdecimal()):
        exit_status = main(Path(sys.argv[1]), *numbers)
    leave(exit_status)
