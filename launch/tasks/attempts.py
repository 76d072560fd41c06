"""The attempts at a task: one file of JSON lines. Importing this needs nothing but Python: ranks set handlers first.

Only the launcher, or the batch host of a SLURM job, appends: a line when an attempt starts, and a line for every way in
which a pack, or the attempt, ended. The ranks leave a reason file each, written whole, which is read when they have
ended. A job is named by a path here: its folder and its id. JOBS in that folder lists the work of all its jobs.
"""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynexit.errors import Failure

JOBS = "jobs.json"
PREEMPTED, TIMED_OUT, CRASHED, FAILED, COMPLETED = "preempted", "timed-out", "crashed", "failed", "completed"
STOPPED, TERMINATED = "stopped", "terminated"  # words of a rank: ended by SIGUSR2, by SIGTERM
STOPPED_STATUS = 75  # exit status of a rank that a signal stopped

Work = dict[str, list[str]]  # of a pack: stage -> ids of what is done


@dataclasses.dataclass(frozen=True)
class End:
    """How a pack ended or, with the packs that were not reached, the attempt. `pack` None: before any pack began."""

    reason: str
    pack: int | None = None
    status: int = 0
    error: str = ""
    node: str = ""
    end: str = ""

    def __str__(self) -> str:
        status = f" with exit status {self.status}" if self.status > 0 else ""
        return "; ".join(filter(None, (self.error, f"{self.reason} {self.end} on {self.node or '?'}{status}")))


@dataclasses.dataclass(frozen=True)
class Attempts:
    """The content of a job's file: its starts as (time, restart count, nodes), and how they ended."""

    starts: tuple[tuple[str, int, str], ...] = ()
    ends: tuple[End, ...] = ()
    has_ended: bool = False
    """Whether the last attempt noted its end; one that was killed with its node, or cancelled, does not."""

    @property
    def node(self) -> str:
        """The nodes of the last attempt."""
        return self.starts[-1][2] if self.starts else ""

    @property
    def restart(self) -> int:
        """The restart count of the newest attempt."""
        return max((count for _, count, _ in self.starts), default=0)


def read_attempts(job: Path) -> Attempts:
    """The attempts at a job; none if there is no file. A line that a full disk cut off is left out.

    Raises Failure, naming file and line, for another line that is not an attempt's.
    """
    from dynexit.contents import AttemptEnd, AttemptStart
    from dynexit.run_dir import read_json_lines

    try:
        lines = read_json_lines(job.with_name(f"{job.name}.jsonl"), AttemptStart | AttemptEnd, skip_cut_off=True)
    except FileNotFoundError:
        return Attempts()
    starts = tuple((line["start"], line["restart"], line["node"]) for line in lines if "start" in line)
    names = [field.name for field in dataclasses.fields(End)]
    ends = tuple(End(**{name: line[name] for name in names if name in line}) for line in lines if "reason" in line)
    return Attempts(starts, ends, bool(lines) and "reason" in lines[-1])


def append_lines(job: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Adds lines to the job's file, in one write."""
    with job.with_name(f"{job.name}.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def read_work(job: Path) -> list[Work] | None:
    """The packs of a job by the list in its folder; None if it is not there yet. Raises Failure if it is damaged."""
    from dynexit.contents import LaunchedJobs
    from dynexit.run_dir import read_json

    try:
        arrays = read_json(job.parent / JOBS, LaunchedJobs)["arrays"]
    except FileNotFoundError:
        return None
    return next((array["tasks"][job.name] for array in arrays if job.name in array["tasks"]), None)


def packs_left(ends: Sequence[End], num_packs: int, max_retries: int) -> list[int]:
    """The packs that another attempt does, in order: those that crashed come last, so that they stop no other.

    A pack that completed, failed with an error message or crashed more than `max_retries` times is left out.
    """
    crashes = collections.Counter(end.pack for end in ends if end.reason == CRASHED)
    over = {end.pack for end in ends if end.reason in (COMPLETED, FAILED)}
    left = [pack for pack in range(num_packs) if pack not in over and crashes[pack] <= max_retries]
    return sorted(left, key=lambda pack: crashes[pack])


@dataclasses.dataclass
class RankReason:
    """How a rank ended; of the main rank also the pack that it is at and the packs that it finished."""

    path: Path
    restart: int = 0
    pack: int | None = None
    finished: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    word: str = ""
    error: str = ""

    def write(self) -> None:
        """Writes the file whole. A full disk is no error here: without the file the end counts as a crash."""
        from dynexit.run_dir import write_json

        with contextlib.suppress(Failure):
            write_json(self.path, {name: value for name, value in vars(self).items() if name != "path"})


def reason_path(job: Path, rank: int) -> Path:
    """Where a rank of the job leaves its reason."""
    return job.with_name(f"{job.name}_{rank}.reason.json")


def read_reason(job: Path, rank: int, restart: int) -> RankReason | None:
    """The reason that a rank of the job's attempt `restart` left, or None. Raises Failure if it is damaged."""
    from dynexit.contents import RankWord
    from dynexit.run_dir import read_json

    path = reason_path(job, rank)
    try:
        content: RankWord = read_json(path, RankWord)
    except FileNotFoundError:
        return None
    if content["restart"] != restart:
        return None
    finished = [{**end} for end in content["finished"]]
    return RankReason(path, restart, content["pack"], finished, content["word"], content["error"])
