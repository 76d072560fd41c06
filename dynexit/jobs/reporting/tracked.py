"""What of a study goes to MLflow."""

import re
from collections.abc import Sequence
from pathlib import Path

from dynexit.contents import MetricsRow
from dynexit.jobs.finished import kept_row
from dynexit.provenance import read_provenance
from dynexit.report.table import front_of, summary, within_budgets
from dynexit.run_dir import METRICS, RunDir
from dynexit.search.operating_points import ReportRow
from dynexit.study.grid import Point

_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.75)


def track(points: Sequence[Point], rows: Sequence[ReportRow]) -> None:
    """Writes the study and its points to MLflow; reporting again changes nothing there.

    A point's `final/...` are the figures of the weights that were kept, the other metrics are those of its epochs.
    """
    from dynexit.report.tracking import TrackedPoint, default_tracking_uri, flatten, log_study

    config = points[0].config
    uri = config.report.tracking_uri or default_tracking_uri(Path(config.runs_dir))
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
        tracked.append(
            {
                "id": point.id,
                "name": point.label,
                "params": flatten(point.config.model_dump(mode="json", exclude={"dist", "report", "infer"})),
                "metrics": {f"final/{name}": value for name, value in final.items()},
                "history": _history(lines),
                "tags": {"dynexit.method": point.config.train.method, **_origin(point)},
            }
        )
    base = next(row for row in rows if row.source == "backbone" and row.split == "test")
    metrics = {"backbone_test_accuracy": base.accuracy, "num_points": float(len(points)), **_of_study(rows)}
    swept = {f"sweep.{name}": [point.swept.get(name) for point in points] for name in points[0].sweep_keys}
    unique = {name: sorted({str(value) for value in values}) for name, values in swept.items()}
    log_study(uri, config.name, config.name, tracked, points[0].study_dir / "report", unique, metrics)


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


def _origin(point: Point) -> dict[str, str]:
    """The tags on where the training was done; none for one of earlier versions."""
    found = read_provenance(RunDir(point, "train").path)
    if found is None:
        return {}
    return {
        "dynexit.version": found["dynexit"],
        "dynexit.seconds": f"{found['seconds']:.1f}",
        "dynexit.gpu_hours": f"{found['gpu_hours']:.4f}",
        "dynexit.slurm_job": found["slurm_job"],
        "dynexit.cpu": f"{found['cpu']} ({found['instruction_set']})",
        "dynexit.gpu": found["gpu"],
        "mlflow.source.git.commit": found["commit"],
        "mlflow.source.name": found["command"],
    }


def _history(rows: Sequence[MetricsRow]) -> dict[str, list[tuple[int, float]]]:
    """The per-epoch figures of a training, as (epoch, value) by name; those of exits by exit."""
    history: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            values = {name: value}
            if name == "exit_accuracy" and isinstance(value, list):
                values = {f"{name}/{exit_}": one for exit_, one in enumerate(value)}
            for curve, one in values.items():
                if isinstance(one, float):
                    history.setdefault(curve, []).append((row["epoch"], one))
    return history
