"""Whether a task is tried again: a function of its attempts so far. No rank decides, since one may be killed."""

import dataclasses
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.tasks import attempts
from launch.tasks.attempts import COMPLETED, CRASHED, FAILED, PREEMPTED, TIMED_OUT, End, RankReason

_BEFORE_HANDLING = 140  # 128 + SIGUSR2, before the program could handle it
_BY_SIGNAL = (attempts.STOPPED_STATUS, 140, 143)  # 143 is 128 + SIGTERM: no rank was killed


@dataclasses.dataclass(frozen=True)
class RequeueLimits:
    """How often a job is tried again, how long it may run before a signal means a time-out, and nodes to avoid."""

    max_timeouts: int
    max_preemptions: int
    max_retries: int
    seconds_in_time: float
    num_ranks: int = 1
    exclude: str = ""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What follows from an attempt, the last end of which is `end`; None if it is left to SLURM."""

    requeue: bool
    status: int
    avoid: str = ""
    end: End | None = None

    def __str__(self) -> str:
        return f"{'requeue' if self.requeue else 'end'} {self.status} {self.avoid}".rstrip()


def decide(ends: Sequence[End], num_packs: int, limits: RequeueLimits) -> Decision:
    """What follows from the ends of all attempts so far, the last of which is that of the attempt that just ended."""
    last = ends[-1]
    left = attempts.packs_left(ends, num_packs, limits.max_retries)
    same = [end for end in ends if end.reason == last.reason]
    if last.reason in (TIMED_OUT, PREEMPTED):
        again = len(same) <= (limits.max_timeouts if last.reason == TIMED_OUT else limits.max_preemptions)
    elif last.pack is None:  # no pack was reached
        again = last.reason == CRASHED and sum(end.pack is None for end in same) <= limits.max_retries
    else:
        again = True  # for the packs that are left: this one too, if it crashed and has tries left
    completed = {end.pack for end in ends if end.reason == COMPLETED}
    status = 0 if len(completed) == num_packs else last.status or 1
    avoid = ",".join(filter(None, (limits.exclude, last.node))) if last.reason == CRASHED else ""
    return Decision(again and bool(left), status, avoid, last)


def attempt_ends(reasons: Mapping[int, RankReason], status: int, seconds: float, limits: RequeueLimits) -> list[End]:
    """How the packs of an attempt ended, and the attempt itself, by its ranks' reasons and their exit status.

    Empty if it is left to SLURM.
    """
    main = reasons.get(0, RankReason(Path()))
    ends = [End(**one) for one in main.finished]
    alone = next((one for one in reasons.values() if one.word == FAILED), None)  # others waited for that rank
    if alone is not None:
        return [*ends, End(FAILED, alone.pack, status, alone.error)]
    if status == 0 and not main.word:  # so srun ends when a node fails, after which SLURM requeues the job
        return []
    if main.word == COMPLETED:
        return ends or [End(FAILED, None, status)]  # nothing was left to do
    reason = _reason({one.word for one in reasons.values()}, status, seconds < limits.seconds_in_time)
    error = _cause([one.error for one in reasons.values() if one.error], status) if reason == CRASHED else ""
    return [*ends, End(reason, main.pack, status, error)]


def _reason(words: set[str], status: int, is_in_time: bool) -> str:
    """Why the ranks ended. srun ends the ranks beside one that was killed by SIGTERM, as a preemption may end all."""
    by_signal = attempts.STOPPED in words
    if CRASHED not in words:
        by_signal |= status == _BEFORE_HANDLING or (attempts.TERMINATED in words and status in _BY_SIGNAL)
    return CRASHED if not by_signal else PREEMPTED if is_in_time else TIMED_OUT


def _cause(errors: Sequence[str], status: int) -> str:
    """The error of the rank that crashed, rather than what the others say of its end."""
    own = [error for error in errors if "gloo" not in error.lower() and "nccl" not in error.lower()]
    silent = [error for error in errors if "Connection" not in error]
    if status > 128 and not own and not silent:
        number = status - 128
        name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
        return f"a rank was ended by {name}" + " (out of memory, perhaps)" * (number == signal.SIGKILL)
    return (own or silent or list(errors) or [""])[0]


def settle(job: Path, restart: int, node: str, status: int, seconds: float, limits: RequeueLimits) -> Decision:
    """Notes how the attempt number `restart` ended, which `node` ran, and returns what follows."""
    before, packs = attempts.read_attempts(job), attempts.read_work(job) or [{}]
    reasons = {rank: one for rank in range(limits.num_ranks) if (one := attempts.read_reason(job, rank, restart))}
    ends = attempt_ends(reasons, status, seconds, limits)
    if not ends or before.restart > restart:  # SLURM runs the job on another node
        return Decision(False, status or 1)
    now = time.strftime("%FT%T")
    ends = [dataclasses.replace(end, node=node, end=now) for end in ends]
    decision = decide([*before.ends, *ends], len(packs), limits)
    try:
        attempts.append_lines(job, [dataclasses.asdict(end) for end in ends])
    except OSError as error:  # what is not noted would not be counted
        print(f"the end of {job} could not be noted: {error}; it is not tried again", file=sys.stderr)
        return dataclasses.replace(decision, requeue=False)
    return decision
