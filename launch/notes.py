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


def heading(part: int | str) -> str:
    """What every rank of a task of several jobs prints among its errors before it begins that one."""
    return f"part {part} begins"


def section(text: str, part: int | str) -> str:
    """What was printed at the last try of a job of several, '' where it was never tried."""
    _, begun, after = text.rpartition(heading(part) + "\n")
    return re.split(f"^{heading(r'[0-9]+')}$", after, maxsplit=1, flags=re.MULTILINE)[0] if begun else ""


IN_NOTED = " in noted parts"  # ends the line of a crash of which each of several jobs has its own line before


def crashed_parts(end: str) -> list[str]:
    """In which jobs of several the program crashed, by the line on that end of it."""
    return end.partition(" in part ")[2].split()


class Notes:
    """What a job's program leaves for its script, and for itself when it is tried again: files beside its logs."""

    def __init__(self, folder: Path, job_id: str) -> None:
        self._folder, self._job_id = folder, job_id
        self._has_crashed = False

    def file(self, name: str) -> Path:
        """Where a note of that name is."""
        return self._folder / f"{self._job_id}.{name}"

    def failed_alone(self) -> list[dict[str, object]]:
        """What failed on one rank of several in a run of this job before, with all that had failed by then."""
        path = self.file("alone.json")
        found: list[dict[str, object]] = read_json(path) if path.is_file() else []
        return found

    def fail_alone(self, failures: list[dict[str, object]]) -> None:
        """Leaves for the next run what has failed by now."""
        write_json(self.file("alone.json"), failures)

    def order(self, num_jobs: int, max_retries: int) -> list[int]:
        """In which order the jobs are done: those in which the program crashed come last, so that they stop no other.

        What failed on one rank alone and what crashed more than `max_retries` times is left out.
        """
        path = self.file("ends")
        ends = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        crashed = [int(part) for end in ends for part in crashed_parts(end)]
        latest = {i: place for place, i in enumerate(crashed)}
        over = {i for i, times in collections.Counter(crashed).items() if times > max_retries}
        over.update(failure["job"] for failure in self.failed_alone())  # type: ignore[misc]
        return sorted((i for i in range(num_jobs) if i not in over), key=lambda i: latest.get(i, -1))

    def begin(self, i: int, work: Iterable[str] = ()) -> None:
        """Job `i` of several begins, with the ids of its work. Where the program crashes, its script notes in which."""
        # a full disk is told of by what cannot do without
        with contextlib.suppress(OSError), self.file("parts").open("a", encoding="utf-8") as file:
            file.write(" ".join([str(i), *work]) + "\n")
        with contextlib.suppress(Failure):
            write_text(self.file("now"), f"{i}\n")

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
        self.file("now").unlink(missing_ok=True)
        if self._has_crashed:
            with contextlib.suppress(OSError):
                self.file("now").touch()
        if is_trained:
            self.file("some").touch()

    def end(self, word: str) -> None:
        """Why the program ends before it is through: the first rank's word, since its end may be the others' reason."""
        with contextlib.suppress(FileExistsError), self.file("why").open("x", encoding="utf-8") as file:
            file.write(word + "\n")
