"""What of a study goes to MLflow."""

import datetime
import re
from collections.abc import Sequence
from pathlib import Path

from dynexit.contents import MetricsRow
from dynexit.jobs.finished import kept_row
from dynexit.provenance import read_provenance
from dynexit.report.table import front_of, summary, within_budgets
from dynexit.report.tracking import TrackedPoint, default_tracking_uri, flatten, log_study
from dynexit.run_dir import METRICS, RunDir
from dynexit.search.operating_points import ReportRow
from dynexit.study.grid import Point

_LONGEST_TAG = 4000
_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.75)


def track(points: Sequence[Point], rows: Sequence[ReportRow]) -> None:
    """Writes the study and its points to MLflow; reporting again changes nothing there.

    A point's `final/...` are the figures of the weights that were kept, the other metrics are those of its epochs.
    """
    config = points[0].config
    own: dict[str, dict[str, float]] = {point.id: {} for point in points}
    for row in rows:
        if row.source == "gates":
            own[row.point_id][f"{row.split}_accuracy"] = row.accuracy
            own[row.point_id][f"{row.split}_relative_macs"] = row.relative_macs
    tracked: list[TrackedPoint] = []
    for point in {point.id: point for point in points}.values():
        lines = RunDir(point, "train").read_lines(METRICS)
        kept = kept_row(point, lines)
        final = own[point.id] | ({} if kept is None else {"best_epoch": float(kept["epoch"])})
        metrics = {f"final/{name}": value for name, value in final.items()}
        one: TrackedPoint = {**tracked_point(point), "metrics": metrics, "history": history(lines)}
        tracked.append(_with_origin(one, [point]))
    base = next(row for row in rows if row.source == "backbone" and row.split == "test")
    swept = {f"sweep.{name}": [point.swept.get(name) for point in points] for name in points[0].sweep_keys}
    study: TrackedPoint = {
        "id": config.name,
        "name": config.name,
        "params": {name: sorted({str(value) for value in values}) for name, values in swept.items()},
        "metrics": {"backbone_test_accuracy": base.accuracy, "num_points": float(len(points)), **_of_study(rows)},
    }
    log_study(tracking_uri(points[0]), _with_origin(study, points), tracked, points[0].study_dir / "report")


def tracking_uri(point: Point) -> str:
    """Returns where the study's results go."""
    return point.config.report.tracking_uri or default_tracking_uri(Path(point.config.runs_dir))


def tracked_point(point: Point) -> TrackedPoint:
    """Returns what is known of a point before it is trained."""
    params = flatten(point.config.model_dump(mode="json", exclude={"dist", "report", "infer"}))
    tags = {"dynexit.method": point.config.train.method}
    return {"id": point.id, "name": point.label, "params": params, "tags": tags}


def _of_study(rows: Sequence[ReportRow]) -> dict[str, float]:
    """Hypervolumes, and the test accuracy that each budget of relative MACs buys."""
    found = {f"hypervolume/{one.source}/{_name(one.method)}": one.all_seeds for one in summary(rows).hypervolumes}
    front = front_of(rows)
    for share in _SHARES:
        for point in within_budgets(front, [share]):
            found[f"accuracy_within/{share:g}"] = point.test.accuracy
    return found


def _name(text: str) -> str:
    return re.sub(r"[^\w. -]", "_", text)


def _with_origin(tracked: TrackedPoint, points: Sequence[Point]) -> TrackedPoint:
    """Adds tags on where, when and by whom the points were trained; the method alone for those of earlier versions."""
    tags = {"dynexit.method": ", ".join(sorted({point.config.train.method for point in points}))}
    jobs = [job for point in points if (job := read_provenance(RunDir(point, "train").path)) is not None]
    if not jobs:
        return {**tracked, "tags": tags}
    each = {(job["host"], job["started"]): job for job in jobs}  # points that one job trained share its time
    starts = [datetime.datetime.fromisoformat(job["started"]).timestamp() for job in each.values()]
    ends = [start + job["seconds"] for start, job in zip(starts, each.values(), strict=True)]
    last = jobs[-1]
    tags |= {
        "dynexit.version": last["dynexit"],
        "dynexit.seconds": f"{sum(job['seconds'] for job in each.values()):.1f}",
        "dynexit.gpu_hours": f"{sum(job['gpu_hours'] for job in each.values()):.4f}",
        "dynexit.slurm_job": ", ".join(dict.fromkeys(job["slurm_job"] for job in jobs))[:_LONGEST_TAG],
        "dynexit.host": ", ".join(dict.fromkeys(job["host"] for job in jobs))[:_LONGEST_TAG],
        "dynexit.cpu": f"{last['cpu']} ({last['instruction_set']})",
        "dynexit.gpu": f"{last['gpu']} {last.get('driver', '')}".strip(),
        "dynexit.packages": ", ".join(f"{name} {version}" for name, version in last["packages"].items()),
        "mlflow.user": last.get("user", ""),
        "mlflow.source.git.commit": last["commit"],
        "mlflow.source.name": last["command"],
        "mlflow.source.type": "JOB" if last["slurm_job"] else "LOCAL",
    }
    if len(points) == 1:
        tags |= {f"dynexit.sha256.{name}": digest for name, digest in last.get("digests", {}).items()}
    return {**tracked, "tags": tags, "span": (min(starts), max(ends))}


def history(rows: Sequence[MetricsRow]) -> dict[str, list[tuple[int, float]]]:
    """The per-epoch figures of a training, as (epoch, value) by name; those of exits by exit."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            values = {name: value}
            if name in ("exit_accuracy", "exit_fractions") and isinstance(value, list):
                values = {f"{name}/{exit_}": one for exit_, one in enumerate(value)}
            for curve, one in values.items():
                if isinstance(one, float):
                    curves.setdefault(curve, []).append((row["epoch"], one))
    return curves
