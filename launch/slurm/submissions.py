"""What was submitted for a study: one folder per submission, with the jobs' logs and the list of who does what."""

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynexit.errors import Failure, UserError
from dynexit.run_dir import folders_in_place, read_json, write_json
from dynexit.study.grid import Study
from launch.slurm import cluster
from launch.slurm.cluster import QueuedJob
from launch.slurm.notes import CANCELLED

_LIST = "jobs.json"
_SETTLE_SECONDS, _SETTLE_TRIES = 10, 12


@dataclasses.dataclass(frozen=True)
class Submitted:
    """A job or array task that was submitted, and the ids of the work it does."""

    job_id: str
    stage: str
    work: tuple[str, ...]
    folder: Path

    @property
    def ends(self) -> list[str]:
        """A line for every time the job ended and was not through: why, when, where."""
        return self._lines("ends")

    @property
    def starts(self) -> list[str]:
        """A line for every time the job started: when, where."""
        return self._lines("starts")

    @property
    def parts(self) -> list[list[str]]:
        """Of a task of several jobs, a line for every time one was begun: its number, the ids of its work."""
        return [line.split() for line in self._lines("parts")]

    def _lines(self, name: str) -> list[str]:
        path = self.folder / f"{self.job_id}.{name}"
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

    @property
    def is_at_a_part(self) -> bool:
        """Whether one of several jobs is being done."""
        return (self.folder / f"{self.job_id}.now").is_file()

    def failures(self) -> list[dict[str, Any]]:
        """What failed of a job that came through: stage, ids of the work, reason."""
        return self._failures("failures")

    def given_up(self) -> list[dict[str, Any]]:
        """What failed of a job that is not over, and will not be tried again by it."""
        return self._failures("given-up")

    def _failures(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{self.job_id}.{name}.json"
        found: list[dict[str, Any]] = read_json(path) if path.is_file() else []
        return found

    def logs(self) -> list[Path]:
        """What its ranks printed: outputs first, then errors, by rank."""
        return logs_by_job(self.folder).get(self.job_id, [])


def logs_by_job(folder: Path) -> dict[str, list[Path]]:
    """What the ranks of a submission's jobs printed, from one look at the folder: by job id, outputs first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*_log.*"), key=lambda path: (path.suffix != ".out", len(path.name), path.name)):
        found.setdefault(path.name.rsplit("_", 2)[0], []).append(path)  # 7_2_0_log.out: of the job 7_2 rank 0
    return found


class Submission:
    """A submission that is being made: keeps the list on disk as complete as the queue is."""

    def __init__(self, study: Study, site: dict[str, Any]) -> None:
        root = study.directory / "slurm"
        number = next(n for n in itertools.count(1) if not (root / f"{n:04d}").exists())
        self.folder = root / f"{number:04d}"
        self.folder.mkdir(parents=True)
        self._content: dict[str, Any] = {"site": site, "arrays": []}

    def add(self, job_ids: Sequence[str], stage: str, work: Sequence[Sequence[str]]) -> None:
        """Notes the tasks of an array that was submitted."""
        self._content["arrays"].append({"stage": stage, "tasks": dict(zip(job_ids, work, strict=True))})
        write_json(self.folder / _LIST, self._content)

    def take_back(self) -> str:
        """Cancels what was submitted, and says what became of it; '' where nothing was."""
        if not self._content["arrays"]:
            shutil.rmtree(self.folder)
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()  # the first submission's
            return ""
        try:
            cancel(list(_jobs(self.folder / _LIST)))
        except Failure as failure:
            return f"; what was submitted before it stays in the queue ({failure})"
        return "; what was submitted before it is cancelled"


def all_submitted(study_dir: Path) -> list[Submitted]:
    """Everything that was ever submitted for the study, oldest first."""
    return [job for path in _lists(study_dir) for job in _jobs(path)]


def _jobs(path: Path) -> Iterator[Submitted]:
    for array in read_json(path)["arrays"]:
        for job_id, work in array["tasks"].items():
            yield Submitted(job_id, array["stage"], tuple(work), path.parent)


def _lists(study_dir: Path) -> list[Path]:
    lists = [folder / _LIST for folder in folders_in_place(study_dir / "slurm")]
    return [path for path in lists if path.is_file()]


def last_site(study_dir: Path) -> dict[str, Any] | None:
    """The site profile of the last submission, or None."""
    lists = _lists(study_dir)
    return read_json(lists[-1])["site"] if lists else None


def live_jobs(study_dir: Path) -> list[tuple[Submitted, QueuedJob]]:
    """What waits or runs; one squeue call, and none where nothing was ever submitted."""
    submitted = all_submitted(study_dir)
    if not submitted or not cluster.is_here():
        return []
    queued = cluster.queue()
    pairs = ((job, queued.get(job.job_id)) for job in submitted)
    return [(job, entry) for job, entry in pairs if entry is not None and entry.is_live]


def cancel(jobs: Sequence[Submitted]) -> None:
    """Takes jobs out of the queue, and notes that the user did."""
    cluster.cancel_jobs([job.job_id for job in jobs])
    for job in jobs:
        with (job.folder / f"{job.job_id}.ends").open("a", encoding="utf-8") as file:
            file.write(f"{CANCELLED} {time.strftime('%FT%T')} by the user\n")


def settled_jobs(study_dir: Path) -> list[tuple[Submitted, QueuedJob]]:
    """As `live_jobs`, when those have ended that are ending now: whether one goes on by a requeue is not known before.

    Raises UserError where that takes minutes.
    """
    first: set[str] | None = None  # of a large sweep there is always one that ends
    for _ in range(_SETTLE_TRIES):
        live = live_jobs(study_dir)
        found = {job.job_id for job, entry in live if entry.state == "COMPLETING"}
        first = found if first is None else first & found
        ending = sorted(first)
        if not ending:
            return live
        print(f"waiting until {_first(ending)} of {study_dir} have ended", flush=True)
        time.sleep(_SETTLE_SECONDS)
    raise UserError(f"jobs of {study_dir} are ending ({_first(ending)}); run it again when squeue shows them no more")


def _first(job_ids: Sequence[str]) -> str:
    return " ".join(job_ids[:5]) + (" ..." if len(job_ids) > 5 else "")


def away(study_dir: Path, queue: Mapping[str, QueuedJob]) -> str:
    """A sentence where the queue has jobs of the study and its folder nothing of their submission, or ''."""
    if folders_in_place(study_dir / "slurm"):
        return ""
    found = sorted({job.job_id.partition("_")[0] for job in queue.values() if _is_live_of(study_dir, job)})
    if not found:
        return ""
    return (
        f"jobs of {study_dir} are in the queue ({_first(found)}), but nothing of their submission is in that folder: "
        "its file system is away, and the jobs wait some minutes for it; bring it back and run this again "
        f"(only if the folder was deleted: `scancel {' '.join(found)}`)"
    )


def check_is_there(study_dir: Path) -> None:
    """Raises UserError where the study's jobs are in the queue and its folder is not there, as of a lost mount."""
    if cluster.is_here() and not folders_in_place(study_dir / "slurm"):
        with contextlib.suppress(Failure):  # with no queue to ask there is nothing to say
            sentence = away(study_dir, cluster.queue())
            if sentence:
                raise UserError(sentence)


def _is_live_of(study_dir: Path, job: QueuedJob) -> bool:
    return job.is_live and job.study == str(study_dir.absolute())


def check_strays(study_dir: Path) -> None:
    """Raises UserError where the queue has jobs of the study that no list knows: their launcher was killed over it."""
    known = {job.job_id for job in all_submitted(study_dir)}
    strays = [job.job_id for job in cluster.queue().values() if _is_live_of(study_dir, job)]
    strays = sorted({job_id.partition("_")[0] for job_id in strays if job_id not in known})
    if strays:
        raise UserError(
            f"jobs of {study_dir} are in the queue that no list of its submissions knows ({' '.join(strays)}), as when "
            f"a launcher is killed while it submits; `scancel {' '.join(strays)}`, then run it again"
        )


def check_queue(study: Study) -> None:
    """Raises UserError where jobs of the study wait or run: nobody else may write what they write."""
    if cluster.is_here() and (study.directory / "slurm").is_dir():
        check_strays(study.directory)
    live = live_jobs(study.directory)
    if live:
        names = _first([job.job_id for job, _ in live])
        raise UserError(
            f"{len(live)} jobs of {study.directory} are in the cluster's queue ({names}); wait for them, "
            "or take them out with `dynexit cancel`"
        )
