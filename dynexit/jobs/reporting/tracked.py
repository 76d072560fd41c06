"""What of a study goes to MLflow."""

from collections.abc import Sequence
from pathlib import Path

from dynexit.contents import MetricsRow
from dynexit.run_dir import METRICS, RunDir
from dynexit.search.operating_points import ReportRow
from dynexit.study.grid import Point


def track(points: Sequence[Point], rows: Sequence[ReportRow]) -> None:
    """Writes the study and its points to MLflow; reporting again changes nothing there."""
    from dynexit.report.tracking import default_tracking_uri, flatten, log_study

    config = points[0].config
    uri = config.report.tracking_uri or default_tracking_uri(Path(config.runs_dir))
    own: dict[str, dict[str, float]] = {point.id: {} for point in points}
    for row in rows:
        if row.source == "gates":
            own[row.point_id][f"{row.split}_accuracy"] = row.accuracy
            own[row.point_id][f"{row.split}_relative_macs"] = row.relative_macs
    tracked = [
        {
            "id": point.id,
            "name": point.label,
            "params": flatten(point.config.model_dump(mode="json", exclude={"dist", "report", "infer"})),
            "metrics": own[point.id],
            "history": _history(RunDir(point, "train").read_lines(METRICS)),
            "tags": {"dynexit.method": point.config.train.method},
        }
        for point in points
    ]
    base = next(row for row in rows if row.source == "backbone" and row.split == "test")
    metrics = {"backbone_test_accuracy": base.accuracy, "num_points": float(len(points))}
    log_study(uri, config.name, config.name, tracked, points[0].study_dir / "report", {}, metrics)  # type: ignore[arg-type]


def _history(rows: Sequence[MetricsRow]) -> dict[str, list[tuple[int, float]]]:
    """The per-epoch figures of a training, as (epoch, value) by name."""
    history: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float):
                history.setdefault(name, []).append((row["epoch"], value))
    return history
