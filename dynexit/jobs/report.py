"""The report of a study: every point's records and configurations -> one table, figures, a page.

Nothing here needs a model or a data set: records and configurations say all.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynexit.baselines.comparison import BASELINES_CSV, compare, comparison_section, write_comparisons
from dynexit.baselines.rows import baselines_of
from dynexit.contents import Found, MetricsRow
from dynexit.core.cost import ExitCosts
from dynexit.core.exit_policy import exit_index_from_gates
from dynexit.core.tradeoff import OperatingPoint, operating_point
from dynexit.errors import Failure
from dynexit.jobs.finished import (
    SPLITS,
    check_budgets,
    class_names,
    measured_times,
    missing_reason,
    report_identity,
)
from dynexit.record.held_back import calibration_samples
from dynexit.record.shards import Record
from dynexit.report.budgets import budget_cells, budget_text
from dynexit.report.figures import exit_share_figure, pareto_figure
from dynexit.report.page import Figure, Page, PageSection, describe_configuration, write_page
from dynexit.report.published import ORIGIN, PublishedPoint, published_points
from dynexit.report.table import mark_front
from dynexit.report.times import PointTimes, time_sections, with_times
from dynexit.report.uncertainty import uncertainties, write_uncertainty
from dynexit.report.uncertainty_section import uncertainty_section
from dynexit.run_dir import DONE, METRICS, RunDir, mark_done
from dynexit.search.operating_points import ReportRow, write_csv
from dynexit.study.baselines import static_points
from dynexit.study.grid import Point


def run_report(points: Sequence[Point]) -> None:
    """Puts all finished `points` side by side: table, figures, page, MLflow. Names the points that are missing.

    Raises Failure where no point is finished, UserError for a budget that no point attains.
    """
    ready = [point for point in points if RunDir(point, "search").is_done()]
    failed = [missing_reason(point) for point in points if point not in ready]
    static = [point for point in static_points(points) if not RunDir(point, "search").is_done()]
    failed += [missing_reason(point) for point in static]
    if not ready:
        raise Failure(f"nothing to report: none of the {len(points)} points is finished; {failed[0]}")
    check_budgets(ready)
    directory = points[0].study_dir / "report"
    (directory / DONE).unlink(missing_ok=True)
    rows = write_report(ready, failed)
    if points[0].config.report.mlflow:
        track(ready, rows)
    mark_done(
        directory, report_identity(points), ["operating_points.csv", "uncertainty.csv", "pareto.png", "report.html"]
    )


def collect_rows(points: Sequence[Point]) -> list[ReportRow]:
    """Operating points of all `points` on both splits, `on_front` marked: backbones, gates, thresholds, baselines."""
    rows: list[ReportRow] = []
    seen: set[tuple[str, str]] = set()  # backbones serve many points, and a training many searches
    for point in points:
        source = RunDir(point, "record")
        costs = source.costs()
        for split in SPLITS:
            record = Record.open(source / split)
            samples = choosing_samples(point, split, record.num_samples)
            if (point.ids["prepare"], split) not in seen:
                rows.append(_backbone_row(point, split, record, costs, samples))
            if record.gate is not None and (point.id, split) not in seen:
                rows.append(_gates_row(point, split, record, costs, samples))
            seen |= {(point.ids["prepare"], split), (point.id, split)}
        files = [("search", "configurations.json"), ("search", "budgets.json"), ("fixed", "fixed.json")]
        files += [("search", "by_time.json")] if point.is_by_time else []
        searched: list[ReportRow] = []
        for source_name, file in files:
            known = {row.configuration for row in searched} if file == "by_time.json" else set()
            found = _configuration_rows(point, source_name, _entries(point, file))
            searched += [row for row in found if row.configuration not in known]
        rows += searched
    for baseline in baselines_of(points):
        rows += [baseline.validation, baseline.test]
    return mark_front(with_times(rows, point_times(points)))


def point_times(points: Sequence[Point]) -> dict[str, PointTimes]:
    """The times that the points' searches read, by the ids of their rows; nothing of points searched by MACs alone."""
    found: dict[str, PointTimes] = {}
    for point in points:
        if point.is_by_time:
            times = PointTimes(measured_times(point, "search"), point.config.search.confidence == "gate")
            for stage in ("search", "train", "prepare"):
                found.setdefault(point.ids[stage], times)
    return found


def _row(point: Point, source: str, split: str, measured: OperatingPoint, **more: object) -> ReportRow:
    own = {
        "method": point.method,
        "seed": point.config.seed,
        "ce_ic_tradeoff": point.config.jei_dnn.ce_ic_tradeoff if point.config.train.method == "jei_dnn" else None,
        "accuracy_weight": None,
        "point_id": point.id,
        **more,
    }
    return ReportRow(
        source=source,
        split=split,
        accuracy=measured.accuracy,
        macs=measured.macs,
        relative_macs=measured.relative_macs,
        exit_fractions=measured.exit_fractions,
        **own,  # type: ignore[arg-type]
    )


def choosing_samples(point: Point, split: str, num_samples: int) -> np.ndarray:
    """Mask (N,) of a split's samples that its rows are made of: what is held back of validation chooses nothing."""
    if split != "validation":
        return np.ones(num_samples, dtype=bool)
    return ~calibration_samples(point.config.data, point.config.search.calibration_share, num_samples)


def _backbone_row(point: Point, split: str, record: Record, costs: ExitCosts, samples_N: np.ndarray) -> ReportRow:
    """The bare backbone: everybody goes to the end and no head is computed."""
    correct_LN = record.correct_RN[_one_head_rows(costs)][:, samples_N]
    macs_L = np.array([*costs.backbone_macs, costs.full_macs], dtype=np.int64)
    last_N = np.full(correct_LN.shape[1], len(macs_L) - 1, dtype=np.int64)
    measured = operating_point(last_N, correct_LN, macs_L, costs.full_macs)
    anonymous = {"method": "backbone", "seed": None, "ce_ic_tradeoff": None, "point_id": point.ids["prepare"]}
    return _row(point, "backbone", split, measured, **anonymous)


def _gates_row(point: Point, split: str, record: Record, costs: ExitCosts, samples_N: np.ndarray) -> ReportRow:
    exit_N = exit_index_from_gates(torch.from_numpy(np.ascontiguousarray(record.gate))).numpy()[samples_N]
    correct_LN = record.correct_RN[_one_head_rows(costs)][:, samples_N]
    measured = operating_point(exit_N, correct_LN, costs.macs_L(), costs.full_macs)
    return _row(point, "gates", split, measured)


def _one_head_rows(costs: ExitCosts) -> list[int]:
    """The rows of the first head type at every position, then the backbone's."""
    num_types = len(costs.head_types)
    return [p * num_types for p in range(len(costs.positions))] + [-1]


def _entries(point: Point, file: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = RunDir(point, "search").read_json(file, list[Found])
    return entries


def _configuration_rows(point: Point, source: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[ReportRow]:
    for entry in entries:
        if "exits" not in entry:
            continue  # a budget that this point cannot attain
        for split in SPLITS:
            figures = entry[split]
            measured = OperatingPoint(
                accuracy=figures["accuracy"],
                macs=figures["macs"],
                relative_macs=figures["relative_macs"],
                exit_fractions=tuple(figures["exit_fractions"]),
                num_samples=0,
            )
            yield _row(
                point,
                source,
                split,
                measured,
                accuracy_weight=entry.get("accuracy_weight"),
                point_id=point.ids["search"],
                configuration=json.dumps(entry["exits"], separators=(",", ":")),
                budget=budget_text(entry["budget"]) if "budget" in entry else "",
                time_batch_size=entry.get("batch_size", entry.get("budget", {}).get("batch_size")),
            )


def write_report(
    points: Sequence[Point],
    failed: Sequence[str],
) -> list[ReportRow]:
    """Writes report/ in the study's folder: tables, figures and report.html; returns the rows of operating_points.csv.

    `points` are recorded and searched; `failed` has an error message for each missing point.
    """
    rows = collect_rows(points)
    settings, study_dir = points[0].config.report, points[0].study_dir
    directory = study_dir / "report"
    study_text = (study_dir / "study.yaml").read_text(encoding="utf-8")
    write_csv(directory / "operating_points.csv", rows)
    figures = []
    costs = _costs_by_id(points)
    describe = partial(_describe, costs=costs)
    entries = {point.ids["search"]: _entries(point, "budgets.json") for point in points}
    published = published_beside(points[0])
    for name, draw, alt, caption in (
        ("pareto", partial(pareto_figure, published=published), "Accuracy against relative MACs", _PARETO_CAPTION),
        (
            "exit_shares",
            partial(exit_share_figure, places_of=lambda row: costs[row.point_id].positions),
            "Share leaving at each exit",
            _SHARES_CAPTION,
        ),
    ):
        paths = {theme: directory / f"{name}{suffix}.png" for theme, suffix in (("light", ""), ("dark", "_dark"))}
        for theme, path in paths.items():
            draw(rows, path, theme=theme)
        figures.append(Figure(paths["light"], alt, caption, paths["dark"]))
    page = Page(
        settings.title or study_dir.name,
        rows,
        figures,
        study_text,
        points_table=[{**point.values, "id": point.id} for point in points],
        notes=[*_NOTES, *_classes(points[0]), *_beyond(points), *([ORIGIN] if published else []), *failed],
        budgets=budget_cells(rows, entries, describe),
        sections=[*_times(points, rows, describe), *_comparisons(points, rows), _uncertainty(points, rows)],
        describe=describe,
    )
    write_page(directory / "report.html", page)
    return rows


def _times(
    points: Sequence[Point], rows: Sequence[ReportRow], describe: Callable[[ReportRow], str]
) -> list[PageSection]:
    """Writes time.png, and gives the page's part on times; nothing if none were measured."""
    measured = list(point_times(points).values())
    if not measured:
        return []
    return time_sections(rows, measured[0].table, points[0].study_dir / "report", describe)


def _comparisons(points: Sequence[Point], rows: Sequence[ReportRow]) -> Iterator[PageSection]:
    """Writes baselines.csv, and gives the page's part on them; nothing without baselines."""
    found = compare(points, rows, baselines_of(points))
    path = points[0].study_dir / "report" / BASELINES_CSV
    path.unlink(missing_ok=True)
    if found:
        write_comparisons(path, found)
        yield comparison_section(found)


def _uncertainty(points: Sequence[Point], rows: Sequence[ReportRow]) -> PageSection:
    """Writes uncertainty.csv and uncertainty.png, and gives the page's part on them."""
    directory = points[0].study_dir / "report"
    found = uncertainties(points, rows)
    write_uncertainty(directory / "uncertainty.csv", found)
    record = Record.open(RunDir(points[0], "record") / "test")
    classes = (record.layout.topk, int(record.header["num_classes"]))
    share = points[0].config.search.calibration_share
    return uncertainty_section(found, share, classes, directory / "uncertainty.png")


_MOST_CLASSES = 20  # that the page names
_PARETO_CAPTION = (
    "Test accuracy against mean MACs relative to the bare backbone. The front was chosen on validation and is drawn "
    "with its test values."
)
_SHARES_CAPTION = "Where test samples leave, along the front."
_NOTES = (
    "gates: the exit rule that JEI-DNN's gates learned at each ce_ic_tradeoff. search: exact thresholds on the exits' "
    "confidence, for each accuracy weight. fixed: thresholds set on validation by MSDNet's rule, a given share of the "
    "samples for each exit.",
)


def _beyond(points: Sequence[Point]) -> list[str]:
    """What of the training goes beyond the methods as published."""
    weights = sorted({point.config.train.distillation for point in points} - {0.0})
    if not weights:
        return []
    return [
        f"Exits also learned from the backbone's own classifier (train.distillation = {', '.join(map(str, weights))}), "
        "which goes beyond the methods as published; 0 trains them as published."
    ]


def _classes(point: Point) -> list[str]:
    """The names of the classes, if they are known: all of few, else the first."""
    names = class_names(point)
    if names is None:
        return []
    more = f" and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else ""
    return [f"{len(names)} classes: {', '.join(names[:_MOST_CLASSES])}{more}."]


def published_beside(point: Point) -> list[PublishedPoint]:
    """What a paper's authors recorded for the point's data set and backbone; nothing where it is not wanted."""
    data, backbone = point.config.data, point.config.backbone
    if point.config.report.published == "none" or backbone.module is not None:
        return []
    return published_points(data.name, backbone.name, data.image_size, thin_test=data.thin_test)


def _costs_by_id(points: Sequence[Point]) -> dict[str, ExitCosts]:
    """By the id that a row of the table can have: a point's backbone, which several share, training or search."""
    found: dict[str, ExitCosts] = {}
    for point in points:
        costs = RunDir(point, "record").costs()
        for identity in point.ids.values():
            found.setdefault(identity, costs)
    return found


def _describe(row: ReportRow, costs: Mapping[str, ExitCosts]) -> str:
    if row.source == "backbone":
        return "everything runs to the end"
    if row.source == "gates":
        return f"the gates of ce_ic_tradeoff {row.ce_ic_tradeoff:g}, seed {row.seed}"
    own = costs[row.point_id]
    return describe_configuration(row.configuration, own.positions, own.head_types)


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
