"""What a job on a cluster leaves beside its logs: for its script, for itself when it is tried again, and for status."""

import contextlib
from pathlib import Path

from dynexit.errors import Failure
from dynexit.run_dir import read_json, write_json, write_text


class Notes:
    """What a job's program leaves for its script, and for itself when it is tried again: files beside its logs."""

    def __init__(self, folder: Path, job_id: str) -> None:
        self._folder, self._job_id = folder, job_id

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

    def order(self, num_jobs: int) -> list[int]:
        """In which order the jobs are done: those in which the program crashed come last, so that they stop no other.

        What failed on one rank alone is left out.
        """
        path = self.file("crashed")
        crashed = [int(line) for line in path.read_text(encoding="utf-8").split()] if path.is_file() else []
        latest = {i: place for place, i in enumerate(crashed)}
        failed = [failure["job"] for failure in self.failed_alone()]
        return sorted((i for i in range(num_jobs) if i not in failed), key=lambda i: latest.get(i, -1))

    def begin(self, i: int) -> None:
        """Job `i` begins. Where the program crashes, its script adds this to the list of what crashed."""
        with contextlib.suppress(Failure):  # a full disk is told of by what cannot do without
            write_text(self.file("now"), f"{i}\n")

    def through(self, *, is_trained: bool) -> None:
        """It is through; a task of several packs has something to record when one of them is trained."""
        self.file("now").unlink(missing_ok=True)
        if is_trained:
            self.file("some").touch()

    def end(self, word: str) -> None:
        """Why the program ends before it is through: the first rank's word, since its end may be the others' reason."""
        with contextlib.suppress(FileExistsError), self.file("why").open("x", encoding="utf-8") as file:
            file.write(word + "\n")
