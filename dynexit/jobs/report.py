"""The report of a study: every point's records and configurations -> one table, figures, a page.

Nothing here needs a model or a data set: records and configurations say all.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from dynexit.baselines.rows import baselines_of, describe_baseline, judge_baselines
from dynexit.core.cost import ExitCosts
from dynexit.errors import Failure
from dynexit.jobs.finished import (
    class_names,
    is_recorded,
    missing_reason,
    report_identity,
    unattained_budgets,
)
from dynexit.jobs.reporting.rows import collect_rows, entries_of_search
from dynexit.jobs.reporting.sections import downloads, sections_of
from dynexit.jobs.reporting.tracked import track
from dynexit.provenance import provenance_of
from dynexit.report.budgets import budget_answers, budget_cells
from dynexit.report.chart.data import chart_data
from dynexit.report.chart.groups import fronts_of, groups_of
from dynexit.report.figures import exit_share_figure, pareto_figure
from dynexit.report.judged.cards import cards
from dynexit.report.judged.front import FRONT_CSV, entries_of, write_front
from dynexit.report.judged.outcomes import judge
from dynexit.report.judged.provenance_section import provenance_section
from dynexit.report.judged.words import drop_to_test, warnings
from dynexit.report.page import Figure, Page, describe_configuration, write_page
from dynexit.report.published import ORIGIN, PublishedPoint, published_points
from dynexit.report.table import front_of
from dynexit.report.times import measured_batch_sizes
from dynexit.run_dir import DONE, PROVENANCE, RunDir, mark_done
from dynexit.search.operating_points import BASELINES, ReportRow, write_csv
from dynexit.study.baselines import static_points
from dynexit.study.grid import Point


def run_report(points: Sequence[Point]) -> Path:
    """Puts all finished `points` side by side: table, figures, page, MLflow; returns the report's folder.

    Names the points that are missing.
    Raises Failure where no point is finished.
    """
    ready = [point for point in points if RunDir(point, "search").is_done() and is_recorded(point)]
    failed = [missing_reason(point) for point in points if point not in ready]
    static = [point for point in static_points(points) if not RunDir(point, "search").is_done()]
    failed += [missing_reason(point) for point in static]
    if not ready:
        raise Failure(f"nothing to report: no point is finished; {failed[0]}")
    directory = points[0].study_dir / "report"
    for name in (DONE, PROVENANCE):
        (directory / name).unlink(missing_ok=True)
    rows = write_report(ready, failed)
    if points[0].config.report.mlflow:
        track(ready, rows)
    mark_done(
        directory,
        report_identity(points),
        ["operating_points.csv", FRONT_CSV, "uncertainty.csv", "pareto.png", "report.html"],
    )
    return directory


def write_report(
    points: Sequence[Point],
    failed: Sequence[str],
) -> list[ReportRow]:
    """Writes report/ in the study's folder: tables, figures and report.html; returns the rows of operating_points.csv.

    `points` are recorded and searched; `failed` has an error message for each missing point.
    """
    since, baselines = time.monotonic(), baselines_of(points)
    rows = collect_rows(points, baselines)
    study_dir = points[0].study_dir
    directory = study_dir / "report"
    write_csv(directory / "operating_points.csv", rows)
    costs = _costs_by_id(points)
    describe = partial(_describe, costs=costs)
    entries = {point.ids["search"]: entries_of_search(point, "budgets.json") for point in points}
    published = published_beside(points[0])
    figures = _figures(directory, rows, published, costs)
    front = front_of(rows)
    answers = budget_answers(rows, entries)
    fronts = fronts_of(rows, [None, *measured_batch_sizes(rows)])
    groups = groups_of(rows, fronts, list(answers.values()))
    drawn = [row for group in groups for point in group.points for row in (point.validation, point.test)]
    drawn += [row for point in front for row in (point.validation, point.test)]
    limited = {point.test.key for point in (*front, *answers.values())}
    judged = {
        **judge(points, [*drawn, *(row for row in rows if row.source == "backbone")], limited),
        **judge_baselines(baselines, {row.key for row in drawn}),
    }
    table = entries_of(front, rows, judged, describe)
    write_front(directory, table)
    labels = {point.id: point.label for point in points}
    offered = cards(table, points[0].config.search.relative_macs, labels, study_dir)
    page = Page(
        points[0].config.report.title or study_dir.name,
        rows,
        figures,
        (study_dir / "study.yaml").read_text(encoding="utf-8"),
        points_table=[{**point.values, "id": point.id} for point in points],
        notes=[*_NOTES, *_classes(points[0]), *beyond_published(points), *([ORIGIN] if published else [])],
        budgets=budget_cells(rows, entries, describe, judged),
        sections=[
            *sections_of(points, rows, baselines, judged, table, offered, describe),
            provenance_section(points, provenance_of("report", since, len(points))),
        ],
        describe=describe,
        judged=judged,
        warnings=[*map("Not attained: {}.".format, unattained_budgets(points)), *warnings(points, rows, front, judged)],
        remarks=[drop_to_test(front, rows)],
        cards=offered,
        missing=failed,
        chart=chart_data(
            groups, rows, fronts, judged, published, describe=describe, labels=labels, study_dir=study_dir
        ),
        downloads=downloads(directory),
    )
    write_page(directory / "report.html", page)
    return rows


def _figures(
    directory: Path, rows: Sequence[ReportRow], published: Sequence[PublishedPoint], costs: Mapping[str, ExitCosts]
) -> list[Figure]:
    """Draws the front and where samples leave along it, for light and dark pages and for papers."""
    figures = []
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
    for kind in ("svg", "pdf"):
        pareto_figure(rows, directory / f"pareto.{kind}", published)
    return figures


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


def beyond_published(points: Sequence[Point]) -> list[str]:
    """Returns what of the trainings goes beyond the methods as published, as sentences."""
    trainings = [one for one in (point.config.train for point in points) if one.distillation and one.method != "probe"]
    if not trainings:  # probe fits labels alone
        return []
    methods, weights = sorted({one.method for one in trainings}), sorted({one.distillation for one in trainings})
    return [
        f"Exits of {', '.join(methods)} also learned from the backbone's own classifier (train.distillation = "
        f"{', '.join(map(str, weights))}), which goes beyond the methods as published; 0 trains them as published."
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
    if row.source in BASELINES:
        return describe_baseline(row)
    own = costs[row.point_id]
    return describe_configuration(row.configuration, own.positions, own.head_types)
