"""What runs, what is done, what failed and why: read from the files that the jobs leave."""

import collections
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from dynexit.contents import JobProgress
from dynexit.errors import Failure
from dynexit.jobs.finished import (
    failure_reason,
    finished_jobs,
    last_figures,
    pack_folders,
    read_progress,
    report_is_done,
)
from dynexit.run_dir import RunDir
from dynexit.study.grid import Point, Study
from dynexit.study.stages import POINT_STAGES
from launch.lock import is_held
from launch.slurm.submissions import QueueView

OVER = ("done", "failed", "cancelled")  # what only a new submission changes


@dataclasses.dataclass(frozen=True)
class PointStatus:
    """A point's line in the table."""

    point: str
    id: str
    state: str
    step: str
    figures: str
    attempts: str
    node: str
    log: str


def study_status(study: Study, jobs: QueueView | None = None) -> list[PointStatus]:
    """The state of every point, in the order of the sweep; one squeue call where it was submitted to a cluster."""
    held = is_held(study.directory)
    packs = pack_folders(study.directory)
    jobs = QueueView(study.directory) if jobs is None else jobs
    return [_damaged_or(point, held, packs.get(point.id), jobs) for point in study.all_points]


def _damaged_or(point: Point, held: bool, folder: Path | None, jobs: QueueView) -> PointStatus:
    """Returns the point's status; a damaged file of one point takes no other out of the table."""
    try:
        return _point_status(point, held, folder, jobs)
    except Failure as damage:
        return PointStatus(point.label, point.id, "damaged", "", str(damage), "", "", "")


def _point_status(point: Point, held: bool, folder: Path | None, jobs: QueueView) -> PointStatus:
    """`folder` is that of the point's pack, `held` whether a launcher works on the study here."""
    finished = finished_jobs(point)
    missing = next((job for job in POINT_STAGES if job not in finished), None)
    log = folder / "log.txt" if folder is not None else RunDir(point, "prepare") / "log.txt"
    working_in = folder if missing == "train" else RunDir(point, "prepare").path if missing == "prepare" else None
    progress = read_progress(working_in) if working_in is not None else None
    step = f"{progress['step']}/{progress['num_steps']}" if progress else ""
    figures = last_figures(point) if "train" in finished else " ".join(_figures(progress))
    if missing is None:
        state = "done"
    elif finished or folder is not None:
        state = f"{missing} {'running' if held and (missing != 'train' or folder is not None) else 'to do'}"
    else:
        state = "waiting (prepare running)" if held else "waiting"
    reason, attempts, node = failure_reason(point), "", ""
    on_cluster = jobs.of(point, missing or "train")
    if on_cluster is not None:
        attempts, node = str(on_cluster.attempts), on_cluster.node
        if missing is not None:
            state = on_cluster.state
            reason = (None if on_cluster.is_live else reason) or on_cluster.reason
            is_of_it = log.is_file() and (folder is not None or missing == "prepare") and not on_cluster.reason
            log = log if is_of_it else on_cluster.log
    if reason:
        state, step, figures = "failed", "", reason
    return PointStatus(point.label, point.id, state, step, figures, attempts, node, str(log) if log.is_file() else "")


def report_state(study: Study, jobs: QueueView) -> tuple[str, bool]:
    """The state of the report, and whether it is over: no job that waits or runs will make it."""
    on_cluster = jobs.of(study.points[0], "report")
    try:
        if (on_cluster is None or not on_cluster.is_live) and report_is_done(study.points):
            return f"done, {study.directory / 'report' / 'report.html'}", True
    except Failure as damage:
        return f"damaged: {damage}", True
    if on_cluster is None:
        return "to do", True
    if on_cluster.reason:
        return f"failed: {on_cluster.reason}", True
    return on_cluster.state, not on_cluster.is_live


def _figures(progress: JobProgress | None) -> Iterator[str]:
    if progress is not None:
        yield from (f"{name} {float(value):.4g}" for name, value in progress["figures"].items())
        yield f"{progress['images_per_second']:.0f} images/s {progress['seconds_left']:.0f} s left"


def table(statuses: list[PointStatus], report: str) -> str:
    """The states as a table of text, with what is said of the report and a line of counts."""
    names = [field.name for field in dataclasses.fields(PointStatus)]
    cells = [names, *([getattr(status, name) for name in names] for status in statuses)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    counts = collections.Counter(status.state for status in statuses)
    return "\n".join([*lines, f"report: {report}", ", ".join(f"{count} {state}" for state, count in counts.items())])
