"""What a job on a cluster leaves beside its logs: for its script, for itself when it is tried again, and for status."""

import collections
import contextlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from dynexit.errors import Failure
from dynexit.run_dir import read_json, write_json, write_text

_LOST_SECONDS = 600

# why a program ended before it was through
PREEMPTED, TIMED_OUT, FAILED_FOR_GOOD, CRASHED, CANCELLED = "preempted", "timed-out", "failed", "crashed", "cancelled"
OR_CRASHED = "?"  # after one of the words, where what told of that may have been the end of another rank
PARTLY_FAILED = "partly-failed"  # what is left of a task's jobs goes on without the one that failed on one rank alone


def heading(part: int | str) -> str:
    """What every rank of a task of several jobs prints among its errors before it begins that one."""
    return f"part {part} begins"


def sections(text: str) -> dict[str, str]:
    """By the number of each job of several what was printed at its last try."""
    _, *found = re.split(f"^{heading('([0-9]+)')}$", text, flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


RUN = "run"  # the note on how often SLURM began the job before
IN_NOTED = " in noted parts"  # ends the line of a crash of which each of several jobs has its own line before


def crashed_parts(end: str) -> list[str]:
    """In which jobs of several the program crashed, by the line on that end of it."""
    return end.partition(" in part ")[2].split()


class Notes:
    """What a job's program leaves for its script, and for itself when it is tried again: files beside its logs."""

    def __init__(self, folder: Path, job_id: str, mark: Path | None = None) -> None:
        """`mark` is a file that is there as long as the file system is."""
        self.folder, self._job_id = folder, job_id
        self._has_crashed = self._was_lost = False
        self._mark = mark
        self._place = _working_directory() or os.environ.get("PWD", "")

    def file(self, name: str) -> Path:
        """Where a note of that name is."""
        return self.folder / f"{self._job_id}.{name}"

    def is_begun_again(self) -> bool:
        """Whether SLURM has begun the job once more since it began this process."""
        try:
            return int(self.file(RUN).read_text(encoding="utf-8")) > int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        except (OSError, ValueError):
            return False

    def look(self) -> None:
        """Remembers for `wait_until_there` where the mark is not there now."""
        self._was_lost = self._was_lost or not self._is_there()

    def wait_until_there(self) -> bool:
        """Returns when the mark is there, if there is one: a lost file system comes back after a while, or is given up.

        The working directory is then the one of its path again, not that of a mount before. Whether either is back
        after it was lost: now, or when anybody looked since the last call.
        """
        deadline = time.monotonic() + _LOST_SECONDS
        self.look()
        while not self._is_there() and time.monotonic() < deadline:
            time.sleep(1)
        was_lost, self._was_lost = self._was_lost, False
        return self._is_there() and (self._enter_again() or was_lost)

    def _is_there(self) -> bool:
        try:
            return self._mark is None or self._mark.is_file()
        except OSError:  # as of a stale handle
            return False

    def _enter_again(self) -> bool:
        """Enters the working directory anew where the one of its path is another, as after a mount; whether it was.

        One that was deleted is left to those who need it.
        """
        if self._mark is None or _working_directory() == self._place:
            return False
        with contextlib.suppress(OSError):
            os.chdir(self._place)
            self._place = os.getcwd()
            return True
        return False

    def given_up(self) -> list[dict[str, object]]:
        """What failed with a sentence in a run of this job before: another try would say the same."""
        path = self.file("given-up.json")
        found: list[dict[str, object]] = read_json(path) if path.is_file() else []
        return found

    def give_up(self, failures: list[dict[str, object]]) -> None:
        """Leaves for the next run all that has failed so by now."""
        write_json(self.file("given-up.json"), failures)

    def crashes(self) -> list[int]:
        """In which jobs the program crashed, oldest first."""
        path = self.file("ends")
        ends = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [int(part) for end in ends for part in crashed_parts(end)]

    def order(self, num_jobs: int, max_retries: int) -> list[int]:
        """In which order the jobs are done: those in which the program crashed come last, so that they stop no other.

        What failed with a sentence and what crashed more than `max_retries` times is left out.
        """
        crashed = self.crashes()
        latest = {i: place for place, i in enumerate(crashed)}
        over = {i for i, times in collections.Counter(crashed).items() if times > max_retries}
        over.update(failure["job"] for failure in self.given_up())  # type: ignore[misc]
        return sorted((i for i in range(num_jobs) if i not in over), key=lambda i: latest.get(i, -1))

    def begin(self, i: int, work: Iterable[str] = (), *, is_last: bool = False) -> None:
        """Job `i` of several begins, with the ids of its work. Where the program crashes, its script notes in which.

        Where that `is_last`, the script knows that there is nothing left to try.
        """
        # a full disk is told of by what cannot do without
        with contextlib.suppress(OSError), self.file("parts").open("a", encoding="utf-8") as file:
            file.write(" ".join([str(i), *work]) + "\n")
        with contextlib.suppress(Failure):
            write_text(self.file("now"), f"{i}\n")
        if is_last:
            self.end_tries()

    def end_tries(self) -> None:
        """Tells the script that a crash from here on leaves nothing to be tried again."""
        with contextlib.suppress(OSError):
            self.file("last").touch()

    def crash(self, i: int) -> None:
        """Job `i` of several crashed, and the program goes on with the others."""
        self._has_crashed = True
        with contextlib.suppress(OSError), self.file("ends").open("a", encoding="utf-8") as file:
            nodes = os.environ.get("SLURM_JOB_NODELIST", "?")
            file.write(f"crashed {time.strftime('%FT%T')} on {nodes} in part {i}\n")

    def through(self, *, is_trained: bool) -> None:
        """It is through; a task of several packs has something to record when one of them is trained.

        An empty note tells the script that the crash at the end of the program is that of jobs that were noted.
        """
        for name in ("now", "last"):
            self.file(name).unlink(missing_ok=True)
        if self._has_crashed:
            with contextlib.suppress(OSError):
                self.file("now").touch()
        if is_trained:
            self.file("some").touch()

    def end(self, word: str) -> None:
        """Why the program ends before it is through: the first rank's word, since its end may be the others' reason."""
        with contextlib.suppress(FileExistsError), self.file("why").open("x", encoding="utf-8") as file:
            file.write(word + "\n")


def _working_directory() -> str:
    """Its path, or '' where it was deleted or is that of a mount that is gone."""
    try:
        return os.getcwd()
    except OSError:
        return ""
