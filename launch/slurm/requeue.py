"""Whether a job is requeued: a function of its attempts so far, and the shell script around the ranks that calls it.

    python -m launch.slurm.requeue FOLDER/JOB STATUS SECONDS LIMITS

appends how the attempt ended to the job's attempts, and prints what the script is to do: `requeue` or `end`, the exit
status, and the nodes to avoid. No rank decides, since one that is killed decides nothing.
"""

import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.slurm import attempts
from launch.slurm.attempts import COMPLETED, CRASHED, FAILED, PREEMPTED, TIMED_OUT, End, RankReason

_BEFORE_HANDLING = 140  # 128 + SIGUSR2, before the program could handle it
_BY_SIGNAL = (attempts.STOPPED_STATUS, 140, 143)  # 143 is 128 + SIGTERM: no rank was killed


@dataclasses.dataclass(frozen=True)
class RequeueLimits:
    """How often a job is tried again, how long it may run before a signal means a time-out, and nodes to avoid."""

    num_packs: int
    """The most of a task of the array."""
    max_timeouts: int
    max_preemptions: int
    max_retries: int
    seconds_in_time: float
    num_ranks: int = 1
    exclude: str = ""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the script does."""

    requeue: bool
    status: int
    avoid: str = ""

    def __str__(self) -> str:
        return f"{'requeue' if self.requeue else 'end'} {self.status} {self.avoid}".rstrip()


def decide(ends: Sequence[End], limits: RequeueLimits) -> Decision:
    """What follows from the ends of all attempts so far, the last of which is that of the attempt that just ended."""
    last = ends[-1]
    left = attempts.packs_left(ends, limits.num_packs, limits.max_retries)
    same = [end for end in ends if end.reason == last.reason]
    if last.reason in (TIMED_OUT, PREEMPTED):
        again = len(same) <= (limits.max_timeouts if last.reason == TIMED_OUT else limits.max_preemptions)
    elif last.pack is None:  # no pack was reached
        again = last.reason == CRASHED and sum(end.pack is None for end in same) <= limits.max_retries
    else:
        again = True  # for the packs that are left: this one too, if it crashed and has tries left
    completed = {end.pack for end in ends if end.reason == COMPLETED}
    status = 0 if len(completed) == limits.num_packs else last.status or 1
    avoid = ",".join(filter(None, (limits.exclude, last.node))) if last.reason == CRASHED else ""
    return Decision(again and bool(left), status, avoid)


def attempt_ends(reasons: Mapping[int, RankReason], status: int, seconds: float, limits: RequeueLimits) -> list[End]:
    """How the packs of an attempt ended, and the attempt itself, by its ranks' reasons and srun's exit status.

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


def main(job: Path, status: int, seconds: float, limits: RequeueLimits) -> Decision:
    """Notes how an attempt ended and returns the decision."""
    restart, before = attempts.restart_count(), attempts.read_attempts(job)
    found = {rank: attempts.read_reason(job, rank, restart) for rank in range(limits.num_ranks)}
    reasons = {rank: one for rank, one in found.items() if one is not None}
    if 0 in reasons and reasons[0].num_packs:  # the script is the same for all tasks of an array
        limits = dataclasses.replace(limits, num_packs=reasons[0].num_packs)
    ends = attempt_ends(reasons, status, seconds, limits)
    if not ends or before.is_superseded(restart):  # SLURM runs the job on another node
        return Decision(False, status or 1)
    node, now = os.environ.get("SLURM_JOB_NODELIST", ""), time.strftime("%FT%T")
    ends = [dataclasses.replace(end, node=node, end=now) for end in ends]
    decision = decide([*before.ends, *ends], limits)
    try:
        attempts.append_ends(job, ends)
    except OSError as error:  # what is not noted would not be counted
        print(f"the end of {job} could not be noted: {error}; the job is not requeued", file=sys.stderr)
        return Decision(False, decision.status)
    return decision


def script_before(folder: Path, umask: int) -> list[str]:
    """The shell lines before the ranks, after a site's own: they note the start."""
    return [
        "set +eu +o pipefail  # a site's lines may have set these",
        f"umask {umask:04o}",
        "trap : USR2  # for the ranks; `scancel --full` sends it to this script too",
        "trap 'exit 143' TERM  # cancelled, or requeued by SLURM",
        # one task of an array has the array's SLURM_JOB_ID, which would requeue them all
        'this="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_JOB_ID:+_$SLURM_ARRAY_TASK_ID}"',
        f'job={shlex.quote(str(folder))}/"$this"',
        'restart="${SLURM_RESTART_COUNT:-0}" node="$SLURM_JOB_NODELIST"',
        "start=$(date +%FT%T)",
        """printf '{"start": "%s", "restart": %d, "node": "%s"}\\n' "$start" "$restart" "$node" >> "$job.jsonl\"""",
    ]


def script_after(python: str, limits: RequeueLimits) -> list[str]:
    """The shell lines after the ranks: they ask for the decision and carry it out.

    Their only own decision is for a batch host without the interpreter.
    """
    text = shlex.quote(json.dumps(dataclasses.asdict(limits)))
    return [
        "status=$?",
        f'answer=$({python} -m launch.slurm.requeue "$job" "$status" "$SECONDS" {text} | tail -n 1)',
        'read -r action code avoid <<< "${answer:-end $status}"',
        'if [ -z "$answer" ] && [ "$status" -ne 0 ]; then',
        f'  [ "$restart" -lt {limits.max_retries} ] && action=requeue',
        """  printf '{"reason": "crashed", "status": %d, "node": "%s"}\\n' "$status" "$node" >> "$job.jsonl\"""",
        "fi",
        'if [ "$action" = requeue ]; then',
        "  trap '' TERM  # a requeue ends this script, and only then ExcNodeList can be set",
        '  [ -z "$avoid" ] || sbatch --test-only --exclude="$avoid" "$0" >/dev/null 2>&1 || avoid=',
        "  for try in $(seq 12); do  # the controller may be restarted",
        '    [ -e "$job.cancelled" ] && break',
        '    if scontrol requeue "$this"; then',
        '      [ -z "$avoid" ] || scontrol update JobId="$this" ExcNodeList="$avoid"',
        '      exit "$code"',
        "    fi",
        "    sleep 5",
        "  done",
        "fi",
        'exit "$code"',
    ]


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), RequeueLimits(**json.loads(sys.argv[4]))))
