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
from typing import TYPE_CHECKING

from dynexit.config import Dist
from dynexit.errors import Failure, Interrupted, UserError
from dynexit.run_dir import is_done, job_dir, write_json
from launch.notes import IN_NOTED, Notes, heading
from launch.plan import Job

if TYPE_CHECKING:
    from dynexit.dist import Ranks

PREEMPTED, TIMED_OUT, FAILED_FOR_GOOD, CRASHED, CANCELLED = "preempted", "timed-out", "failed", "crashed", "cancelled"
PARTLY_FAILED = "partly-failed"  # what is left of the task's jobs goes on without the one that failed
_EARLY_SECONDS = 65  # SLURM looks at time limits about once a minute
_STOPPED, _FAILED = 75, 1  # exit statuses
_REQUEUE_TRIES = 120  # every 5 seconds
_MANY = 1_000_000
_ALONE = ("search", "report")  # what the main rank does when the others have left
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
        folder, job_id = _join_ranks()
        try:
            with _interruptible():
                failures = self._run_all(folder, job_id)
        except Interrupted as stop:
            left = self.time_limit_seconds - (time.monotonic() - started)
            word = TIMED_OUT if left <= self.signal_delay_seconds + _EARLY_SECONDS else PREEMPTED
            print(f"{stop} ({word})", flush=True)
            Notes(folder, job_id).end(word)
            sys.exit(_STOPPED)
        except Exception:
            Notes(folder, job_id).end(CRASHED)
            raise
        if failures and self.jobs[0].stage == "prepare":  # nothing that waits for it can run
            Notes(folder, job_id).end(FAILED_FOR_GOOD)
            sys.exit(_FAILED)
        return failures

    def _run_all(self, folder: Path, job_id: str) -> list[str]:
        from dynexit.dist import start_ranks, stop_ranks

        dist = self.jobs[0].points[0].config.dist
        ranks = start_ranks(dist.device, dist.num_threads, dist.timeout_seconds)
        work = _Work(folder, job_id, ranks, is_one_of_many=len(self.jobs) > 1)
        work.failures = ranks.agree(work.notes.failed_alone() if ranks.is_main else [])
        order = ranks.agree(work.notes.order(len(self.jobs), dist.max_retries) if ranks.is_main else [])
        alone = [i for i in order if self.jobs[i].stage in _ALONE]
        for i in (i for i in order if i not in alone):
            work.do(i, ranks.agree(_ready(self.jobs[i]) if ranks.is_main else None), is_only=len(order) == 1)
        stop_ranks()  # however long the main rank searches, nobody waits for it
        for i in alone if ranks.is_main else []:
            work.do(i, _ready(self.jobs[i]))
        if ranks.is_main:
            work.write_failures()
        if work.crash is not None:
            raise work.crash
        return [str(failure["reason"]) for failure in work.failures]


class _Work:
    """A task's jobs as they are done: one that fails stops no other."""

    def __init__(self, folder: Path, job_id: str, ranks: "Ranks", *, is_one_of_many: bool) -> None:
        self.notes, self.ranks, self.is_one_of_many = Notes(folder, job_id), ranks, is_one_of_many
        self.failures: list[dict[str, object]] = []
        self.crash: Exception | None = None

    def do(self, i: int, job: Job | None, *, is_only: bool = False) -> None:
        """Does a task's job `i`. Raises what crashes one of several ranks, and SystemExit where one failed alone.

        The others wait for that one, so the program ends; it is tried again for the jobs that are left, unless `i`
        `is_only` one.
        """
        if job is None or not job.points:
            return
        work = [p.ids[_IDS.get(job.stage, job.stage)] for p in job.points]
        if self.is_one_of_many:
            print(heading(i), file=sys.stderr, flush=True)
            if self.ranks.is_main:
                self.notes.begin(i, work)
        others_wait = self.ranks.world_size > 1 and job.stage not in _ALONE
        try:
            stop = _run(job)
        except Exception as error:
            if others_wait:
                raise
            traceback.print_exc()
            stop, self.crash = Failure(f"{type(error).__name__}: {error}"), error
            if self.is_one_of_many:
                self.notes.crash(i)
        failed_alone = others_wait and stop is not None and not stop.on_all_ranks
        if stop is not None:
            if self.ranks.is_main or failed_alone:
                print(stop, file=sys.stderr, flush=True)
            self.failures.append({"job": i, "stage": job.stage, "work": work, "reason": str(stop)})
        if failed_alone:
            if is_only:
                self.write_failures()
                self.notes.end(FAILED_FOR_GOOD)
            else:
                self.notes.fail_alone(self.failures)
                self.notes.end(PARTLY_FAILED)
            sys.exit(_FAILED)  # srun ends the ranks that wait for this one
        if self.ranks.is_main:
            self.notes.through(is_trained=job.stage == "train" and stop is None)

    def write_failures(self) -> None:
        """Leaves the sentences of what failed, when the task is through."""
        write_json(self.notes.file("failures.json"), self.failures)
        self.notes.file("alone.json").unlink(missing_ok=True)


def _run(job: Job) -> Failure | UserError | None:
    """Runs a job; the failure that another try would not mend, or None."""
    from dynexit import jobs

    try:
        jobs.JOBS[job.stage](job.points, job.study_dir)
    except (Failure, UserError) as failure:
        return failure
    return None


def _ready(job: Job) -> Job:
    """The job for the points whose earlier work is there; the main rank's view holds for all."""
    needed = {"record": "train", "search": "record"}.get(job.stage)
    points: Sequence = job.points  # type: ignore[type-arg]
    if needed is not None:
        points = [p for p in points if is_done(job_dir(job.study_dir, needed, p.ids[needed]), p.ids[needed])]
    elif job.stage == "train" and all(is_done(job_dir(job.study_dir, "train", p.id), p.id) for p in points):
        points = ()  # of a pack that is not through, the job itself knows what is left
    return dataclasses.replace(job, points=tuple(points))


def _join_ranks() -> tuple[Path, str]:
    """Announces this rank to torch; the folder of the job's logs, and the job's id."""
    import submitit

    environment = submitit.JobEnvironment()
    if environment.num_tasks > 1:
        # a port that the job's last run left may be taken for a minute
        number = int(environment.raw_job_id) * 7 + int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        os.environ["MASTER_PORT"] = str(20000 + number % 12000)  # below the ports that Linux gives to others
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


def script_after(task: ClusterTask, dist: Dist, exclude: str = "") -> list[str]:
    """The shell lines that follow the ranks in a job's script: note how they ended, requeue up to the limits.

    A job that crashed is to avoid the nodes it crashed on (and `exclude`), where it could run without them.
    """
    in_time = int(task.time_limit_seconds - task.signal_delay_seconds - _EARLY_SECONDS)
    avoided = shlex.quote(exclude + ",") if exclude else ""
    return [
        "status=$?",
        '[ "$status" -eq 0 ] && exit 0',
        f"why={CRASHED}",
        # SIGUSR2 before the program could take it
        f'[ "$status" -eq 140 ] && {{ [ "$SECONDS" -lt {in_time} ] && why={PREEMPTED} || why={TIMED_OUT}; }}',
        'why=$(cat "$job.why" 2>/dev/null || echo "$why")',
        'rm -f "$job.why"',
        # srun ends the ranks beside one that was killed, and they cannot know it from a preemption
        f"case $status,$why in {_STOPPED},*|140,*|143,*) ;; *,{PREEMPTED}|*,{TIMED_OUT}) why={CRASHED} ;; esac",
        f'part=; [ -e "$job.now" ] && part="{IN_NOTED}"; [ -s "$job.now" ] && part=" in part $(cat "$job.now")"',
        f'[ "$why" = {CRASHED} ] || part=',
        'rm -f "$job.now"',
        f"case $why in {TIMED_OUT}) most={dist.max_timeouts} ;; {PREEMPTED}) most={dist.max_preemptions} ;;",
        # each of the task's jobs has its own tries, and the program leaves out one that has used them up
        f'  {CRASHED}) [ -n "$part" ] && most={_MANY} || most={dist.max_retries} ;;',
        f"  {PARTLY_FAILED}) most={_MANY} ;; *) most=0 ;; esac  # each time there is a job less to do",
        # what cannot be noted, as on a full disk, would not be counted either
        'echo "$why $(date +%FT%T) on ${SLURM_JOB_NODELIST:-?} with exit status $status$part" >> "$job.ends" || most=0',
        'if [ "$most" -gt 0 ] && [ "$(grep -c "^$why .* status [0-9]*$" "$job.ends")" -le "$most" ]; then',
        f"  avoided={avoided}$SLURM_JOB_NODELIST",
        f'  [ "$why" = {CRASHED} ] && sbatch --test-only --exclude="$avoided" "$0" >/dev/null 2>&1 || avoided=',
        "  trap '' TERM  # a requeue ends this script, and a job can be told what to avoid only after it",
        f"  for try in $(seq {_REQUEUE_TRIES}); do  # the controller may be away for a while",
        '    if scontrol requeue "$SLURM_JOB_ID"; then',
        '      [ -z "$avoided" ] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$avoided"',
        '      exit "$status"',
        "    fi",
        "    sleep 5",
        "  done",
        "fi",
        '[ -e "$job.some" ] && exit 0  # there is something to record, and that waits for this job',
        'exit "$status"',
    ]


def script_before(folder: Path) -> list[str]:
    """The shell lines that go before the ranks, after a site's own: where this job notes how it ended."""
    name = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_JOB_ID:+_$SLURM_ARRAY_TASK_ID}"
    return [
        "set +eu",  # a site's lines may have set it, and the lines that follow the ranks must be come to
        f'job={shlex.quote(str(folder))}/"{name}"',
        # submitit refuses to write over what a kill left of its own
        'rm -f "$job.why" "$job.now" "$job"_*_result.pkl.save_tmp',
        'echo "$(date +%FT%T) on ${SLURM_JOB_NODELIST:-?}" >> "$job.starts"',
    ]
