"""What runs, what is done, what failed and why: read from the files that the jobs leave."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from dynexit.contents import Progress
from dynexit.errors import Failure
from dynexit.jobs.finished import failure_reason, finished_jobs
from dynexit.run_dir import MEMBERS, METRICS, PROGRESS, RunDir, folders_in_place, read_json
from dynexit.study.grid import Point, Study
from dynexit.study.stages import POINT_STAGES
from launch.lock import is_held
from launch.plan import report_is_done
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
    packs = _pack_folders(study.directory)
    jobs = QueueView(study.directory) if jobs is None else jobs
    return [_damaged_or(study, point, held, packs, jobs) for point in study.all_points]


def _damaged_or(study: Study, point: Point, held: bool, packs: dict[str, Path], jobs: QueueView) -> PointStatus:
    """Returns the point's status; a damaged file of one point takes no other out of the table."""
    try:
        return _point_status(study, point, held, packs, jobs)
    except Failure as damage:
        return PointStatus(point.label, point.id, "damaged", "", str(damage), "", "", "")


def _point_status(study: Study, point: Point, held: bool, packs: dict[str, Path], jobs: QueueView) -> PointStatus:
    finished = finished_jobs(point)
    folder = packs.get(point.id)
    log = folder / "log.txt" if folder is not None else RunDir(point, "prepare") / "log.txt"
    reason = failure_reason(point)
    state, step, figures = "waiting", "", ""
    missing = next((job for job in POINT_STAGES if job not in finished), None)
    on_cluster = jobs.of(point, missing) if missing is not None else None
    if on_cluster is not None and on_cluster.is_failed:
        reason = reason or on_cluster.reason
    elif on_cluster is not None and on_cluster.is_live:
        reason = None  # it is being tried again
    if reason is not None:
        state, figures = "failed", reason
    elif len(finished) == len(POINT_STAGES):
        state, figures = "done", _last_figures(point)
    elif finished or folder is not None:
        progress = _progress(folder) if missing == "train" and folder is not None else None
        begun = missing != "train" or folder is not None
        state = f"{missing} {'running' if held and begun else 'to do'}"
        step, figures = _step(progress), " ".join(_figures(progress))
        if "train" in finished:
            figures = _last_figures(point)
    elif held:
        state = "waiting (prepare running)"
        progress = _progress(RunDir(point, "prepare").path)
        step, figures = _step(progress), " ".join(_figures(progress))
    attempts = node = ""
    tries = jobs.tries(point) if missing is None else None
    if tries is not None:
        attempts, node = str(tries[0]), tries[1]
    if on_cluster is not None:
        state = state if reason is not None else on_cluster.state
        attempts, node = str(on_cluster.attempts), on_cluster.node
        is_of_it = log.is_file() and (folder is not None or missing == "prepare") and not on_cluster.is_failed
        log = log if is_of_it else on_cluster.log
    return PointStatus(point.label, point.id, state, step, figures, attempts, node, str(log) if log.is_file() else "")


def report_state(study: Study, jobs: QueueView) -> tuple[str, bool]:
    """What there is to say of the report, and whether it is over: no job that waits or runs will make it."""
    on_cluster = jobs.of(study.points[0], "report")
    try:
        if (on_cluster is None or not on_cluster.is_live) and report_is_done(study):
            return f"done, {study.directory / 'report' / 'report.html'}", True
    except Failure as damage:
        return f"damaged: {damage}", True
    if on_cluster is None:
        return "to do", True
    if on_cluster.is_failed:
        return f"failed: {on_cluster.reason}", True
    return on_cluster.state, not on_cluster.is_live


def _step(progress: Progress | None) -> str:
    return f"{progress['step']}/{progress['num_steps']}" if progress else ""


def _figures(progress: Progress | None) -> Iterator[str]:
    if progress is None:
        return
    yield from (f"{name} {float(value):.4g}" for name, value in progress["figures"].items())
    yield f"{progress['images_per_second']:.0f} images/s {progress['seconds_left']:.0f} s left"


def _last_figures(point: Point) -> str:
    """Accuracy and cost on validation at the end of the training."""
    rows = RunDir(point, "train").read_lines(METRICS)
    if not rows or "validation_accuracy" not in rows[-1]:
        return ""
    last = rows[-1]
    return (
        f"validation {100 * last['validation_accuracy']:.2f} % at {last['validation_relative_macs']:.3f} relative MACs"
    )


def _progress(folder: Path) -> Progress | None:
    try:
        content: Progress = read_json(folder / PROGRESS, Progress)
    except FileNotFoundError:
        return None
    return content


def _pack_folders(study_dir: Path) -> dict[str, Path]:
    """The newest folder of a pack that each point is or was a member of."""
    lists = [folder / MEMBERS for folder in folders_in_place(study_dir / "pack")]
    by_age = sorted((path for path in lists if path.is_file()), key=lambda path: path.stat().st_mtime)
    return {identity: path.parent for path in by_age for identity in read_json(path, list[str])}


def table(statuses: list[PointStatus], report: str) -> str:
    """The states as a table of text, with what is said of the report and a line of counts."""
    names = [field.name for field in dataclasses.fields(PointStatus)]
    cells = [names, *([getattr(status, name) for name in names] for status in statuses)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    counts: dict[str, int] = {}
    for status in statuses:
        counts[status.state] = counts.get(status.state, 0) + 1
    return "\n".join([*lines, f"report: {report}", ", ".join(f"{count} {state}" for state, count in counts.items())])
