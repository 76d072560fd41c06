"""What runs, is done or failed, and why: of every point by its files and, where it was submitted, by the queue."""

import dataclasses
from pathlib import Path

from dynexit.errors import Failure
from dynexit.jobs.finished import failure_reason, pack_folders, report_is_done
from dynexit.jobs.planning.states import INTERRUPTED, point_state
from dynexit.study.grid import Point, Study
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
    speed: dict[str, float] = dataclasses.field(default_factory=dict)
    """As PointState's; not in the table."""


@dataclasses.dataclass(frozen=True)
class StudyStatus:
    """The state of a whole study. `queue_error` says why the queue could not be asked; empty if it could."""

    study: str
    queue_error: str
    report: str
    points: list[PointStatus]
    is_over: bool
    """Whether no job that waits or runs will change it."""
    is_idle: bool
    """Whether some of it is left to do, and no job that waits or runs does it."""


def whole_status(study: Study) -> StudyStatus:
    """Returns the state of the report and of every point; one squeue call where it was submitted to a cluster."""
    jobs = QueueView(study.directory)
    points, (report, is_over) = study_status(study, jobs), report_state(study, jobs)
    left = [one.state for one in points if one.state not in OVER]
    is_idle = is_over and not is_held(study.directory) and not jobs.unanswered and bool(left)
    is_idle = is_idle and all(state.endswith(("to do", INTERRUPTED)) for state in left)
    return StudyStatus(str(study.directory), jobs.unanswered, report, points, is_over and not left, is_idle)


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
    found = point_state(point, folder, is_held=held)
    state, step, figures, log = found.state, found.step, found.figures, found.log
    reason, attempts, node = failure_reason(point), "", ""
    on_cluster = jobs.of(point, found.missing or "train")
    if on_cluster is not None:
        attempts, node = str(on_cluster.attempts), on_cluster.node
        if found.missing is not None:
            state = on_cluster.state
            reason = (None if on_cluster.is_live else reason) or on_cluster.reason
            log = log if found.is_logged and not on_cluster.reason else on_cluster.log
    if reason:
        state, step, figures = "failed", "", reason
    path = str(log) if log.is_file() else ""
    return PointStatus(point.label, point.id, state, step, figures, attempts, node, path, found.speed)


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
