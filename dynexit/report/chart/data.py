"""The JSON that the page's script draws its figure from and fills its cards with."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import markupsafe

from dynexit.report.chart.groups import Costs, Fronts, LegendGroup, base_accuracy
from dynexit.report.chart.offers import offers_of
from dynexit.report.judged.cards import INFER, commands_by_risk
from dynexit.report.judged.outcomes import Judgement, Judgements
from dynexit.report.judged.words import difference_text, share_text
from dynexit.report.published import PublishedPoint
from dynexit.report.table import FrontPoint, percent
from dynexit.search.operating_points import BASELINES, ReportRow, RowKey, RowTime

_SPLITS = ("validation", "test")
_DIGITS = 5
_DASHES = ("", "7 3", "2 3", "8 3 2 3", "12 4", "4 2")  # of SVG
_PLUS = 7  # the last of the script's markers


def chart_data(
    groups: Sequence[LegendGroup],
    rows: Sequence[ReportRow],
    fronts: Fronts,
    judged: Judgements,
    published: Sequence[PublishedPoint],
    *,
    describe: Callable[[ReportRow], str],
    labels: Mapping[str, str],
    study_dir: Path,
) -> dict[str, Any]:
    """Returns the figure's points, curves and legend, and what buys them, as numbers and texts for JSON.

    A point has for each split its costs (in the order of `fronts`, None where unknown), its milliseconds a batch beside
    the relative times among them, accuracy and limits. `offers` are by cost the points of the study's front in order of
    cost on validation, with the commands that save and run them; `risks` the certified ones.
    """
    costs, base = list(fronts), base_accuracy(rows)
    colours = {method: index for index, method in enumerate(sorted({g.method for g in groups if g.source == "search"}))}
    numbers: dict[RowKey, int] = {}
    points: list[dict[str, Any]] = []
    series: list[dict[str, Any]] = []
    for group in groups:
        number = len(series)
        for point in group.points:
            numbers.setdefault(point.validation.key, len(points))
            points.append(_point(point, number, costs, judged, describe, labels))
        curves = {
            f"{index}{split}": [
                [round(value, _DIGITS) for value in step] for step in group.curves.get((cost, split), ())
            ]
            for index, cost in enumerate(costs)
            for split in _SPLITS
        }
        variant = sum(one["kind"] == group.source for one in series)
        series.append(
            {"name": _name(group), "kind": group.source, **_look(group.source, colours.get(group.method, -1), variant)}
            | ({"curves": curves} if group.curves else {})
        )
    methods = sorted({point.method for point in published}, key=lambda name: (name != "jei_dnn", name))
    for variant, method in enumerate(methods):
        line = sorted((one.relative_macs, one.accuracy) for one in published if one.method == method)
        series.append(
            {"name": f"published: {method}", "kind": "published", **_look("published", -1, variant), "line": line}
        )
    whole = {split: [r.accuracy for r in rows if r.source == "backbone" and r.split == split] for split in _SPLITS}
    return {
        "costs": [_cost(rows, cost) for cost in costs],
        "backbone": whole,
        "series": series,
        "points": points,
        "offers": [offers_of(fronts[cost], cost, rows, base, numbers, study_dir) for cost in costs],
        "risks": _risks(points, rows, study_dir),
    }


def json_script(data: Any) -> markupsafe.Markup:
    """JSON for a script element, which no text in it can end."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return markupsafe.Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _look(source: str, colour: int, variant: int) -> dict[str, Any]:
    """Its colour (-1 for none of a method), its marker, and the dashes of its line (None without one).

    Every method has another dash and marker, so that prints in grey tell them apart; baselines differ by `variant`.
    """
    if source in ("search", "gates", "fixed"):
        dash = _DASHES[colour % len(_DASHES)] if source == "search" else None
        return {"colour": colour, "shape": _PLUS if source == "fixed" else max(colour, 0) % _PLUS, "dash": dash}
    if source == "static":
        return {"colour": -1, "shape": variant % _PLUS, "dash": None}
    return {"colour": -1, "shape": 0, "dash": _DASHES[(variant + (source == "cascade")) % len(_DASHES)]}


def _name(group: LegendGroup) -> str:
    words = {"fixed": "MSDNet’s thresholds", "static": "static networks", "cascade": "cascades"}
    return f"{words.get(group.source, group.source.replace('_', ' '))}, {group.method}"


def _cost(rows: Sequence[ReportRow], cost: int | None) -> dict[str, Any]:
    if cost is None:
        return {"name": "MACs", "axis": "relative MACs (bare backbone = 1)"}
    whole = [time.latency_ms / time.relative_time for row in rows for time in row.times if time.batch_size == cost]
    span = dict.fromkeys((f"{min(whole):.3g}", f"{max(whole):.3g}"))  # every search has the times that it was given
    axis = f"time of a batch of {cost} over the plain backbone’s ({' to '.join(span)} ms)"
    return {"name": f"time, batch {cost}", "axis": axis}


def _point(
    point: FrontPoint,
    number: int,
    costs: Costs,
    judged: Judgements,
    describe: Callable[[ReportRow], str],
    labels: Mapping[str, str],
) -> dict[str, Any]:
    row = point.test
    judgement = judged.get((row.key, "test"))
    words, is_baseline = describe(row), row.source in BASELINES
    cells = {
        "series": number,
        "seed": row.seed,
        "label": words if is_baseline else labels.get(row.point_id, row.method),
        "id": row.point_id,
        "search": row.search_id,
        "words": "" if is_baseline else words,
        "shares": [round(share, 4) for share in row.exit_fractions],
        "difference": difference_text(judgement.difference) if judgement else "",
        "verdict": judgement.verdict if judgement else "",
        "risk": row.certified_risk,
    }
    return cells | {
        side.split: _figures(side, costs, judged.get((side.key, side.split))) for side in (point.validation, row)
    }


def _figures(row: ReportRow, costs: Costs, judgement: Judgement | None) -> dict[str, Any]:
    times: dict[int | None, RowTime] = {time.batch_size: time for time in row.times}
    known = [row.relative_macs if cost is None else cost in times and times[cost].relative_time for cost in costs]
    return {
        "costs": [round(float(value), 8) if value is not False else None for value in known],
        "milliseconds": [float(f"{times[cost].latency_ms:.3g}") if cost in times else None for cost in costs],
        "accuracy": round(row.accuracy, _DIGITS),
        "text": share_text(judgement.accuracy) if judgement else percent(row.accuracy),
    }


def _risks(points: Sequence[Mapping[str, Any]], rows: Sequence[ReportRow], study_dir: Path) -> list[dict[str, Any]]:
    """The certified points, with their commands; `infer` runs only the cheapest within a risk."""
    certified = [row for row in rows if row.split == "validation" and row.certified_risk is not None]
    found = []
    for index, point in enumerate(points):
        if point["risk"] is None:
            continue
        given = commands_by_risk(point["search"], point["risk"], study_dir)
        within = [row for row in certified if row.certified_risk is not None and row.certified_risk <= point["risk"]]
        if min(within, key=lambda row: (row.macs, -row.accuracy)).search_id != point["search"]:
            del given[INFER]
        found.append({"point": index, "commands": given})
    return found
