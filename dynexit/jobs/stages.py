"""The jobs: plain functions from configurations to run directories.

Each can be called again at any time, does only what is missing, and writes DONE last. A job that serves many points
(train, record) takes them together, since one pass of the backbone serves them all. What a job needs is imported when
it is called: a search or a report starts without the seconds that the backbones' library takes.
"""

from collections.abc import Sequence
from pathlib import Path

from dynexit.errors import Failure
from dynexit.jobs.finished import check_budgets, missing_reason, report_identity
from dynexit.run_dir import DONE, is_done, job_dir, mark_done
from dynexit.study.grid import Point


def prepare(points: Sequence[Point], study_dir: Path) -> None:
    """Fits the backbone that the points share to the data set: backbone.safetensors, costs.json, metrics.jsonl."""
    from dynexit.jobs.prepare import run_prepare

    run_prepare(points, study_dir)


def train(points: Sequence[Point], study_dir: Path) -> None:
    """Trains exit heads and gates of all `points` as one pack, and leaves heads.safetensors in a folder per point.

    A member whose loss is not finite is stopped; its folder gets FAILED.json and what was last good of it. The others
    are finished, then Failure is raised, naming it.
    """
    from dynexit.jobs.train import run_train

    run_train(points, study_dir)


def record(points: Sequence[Point], study_dir: Path) -> None:
    """Records what every exit of all `points` says of every split asked for, from one pass of the backbone."""
    from dynexit.jobs.record import run_record

    run_record(points, study_dir)


def search(points: Sequence[Point], study_dir: Path) -> None:
    """Finds exit configurations for preferences and budgets from records alone; chosen on validation, judged on test.

    Leaves configurations.json, budgets.json and fixed.json per point; a budget that a point cannot attain is noted.
    """
    from dynexit.jobs.search import run_search

    run_search(points, study_dir)


def report(points: Sequence[Point], study_dir: Path) -> None:
    """Puts all finished `points` side by side: table, figures, page, MLflow. Points that are missing are named.

    Raises UserError for a budget that no point attains.
    """
    from dynexit.jobs.report import track, write_report

    directory = study_dir / "report"
    ready, failed = [], []
    for point in points:
        if is_done(job_dir(study_dir, "search", point.ids["search"]), point.ids["search"]):
            ready.append(point)
        else:
            failed.append(missing_reason(point, study_dir))
    if not ready:
        raise Failure(f"nothing to report: none of the {len(points)} points is finished; {failed[0]}")
    check_budgets(ready, study_dir)
    (directory / DONE).unlink(missing_ok=True)
    rows = write_report(ready, failed, study_dir)
    if points[0].config.report.mlflow:
        track(ready, rows, study_dir)
    mark_done(
        directory,
        report_identity(points, study_dir),
        ["operating_points.csv", "uncertainty.csv", "pareto.png", "report.html"],
    )


def infer(points: Sequence[Point], study_dir: Path) -> None:
    """Classifies a split with the best configuration within infer.relative_macs, really leaving early.

    Leaves predictions.csv and summary.json in infer/<id> and prints the summary. Raises UserError where no operating
    point is within the budget, Failure where the predictions differ from the record by more than near-ties.
    """
    from dynexit.jobs.infer import run_infer

    run_infer(points, study_dir)


JOBS = {"prepare": prepare, "train": train, "record": record, "search": search, "report": report, "infer": infer}
