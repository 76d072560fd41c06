"""The report's page: one HTML file with everything in it, which a browser opens from disk without a network."""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from dynexit.core.cost import place_name
from dynexit.report.table import FrontPoint, Hypervolume, Summary, at_tenths, backbone_accuracy, percent, summary
from dynexit.run_dir import write_text
from dynexit.search.operating_points import BASELINES, ReportRow


@dataclass(frozen=True)
class Figure:
    """A PNG to embed, what it shows for those who cannot see it, its caption, and a twin for dark pages (or None)."""

    path: Path
    alt: str
    caption: str
    dark_path: Path | None = None


@dataclass(frozen=True)
class PageSection:
    """A part of the page of its own: one mapping per row of its table, as for `budgets`, and maybe a figure."""

    heading: str
    remark: str
    table: Sequence[Mapping[str, Any]]
    figure: Figure | None = None


@dataclass(frozen=True)
class Page:
    """What the page shows; all text is escaped.

    The first figure stands on top, the others after the table of the front. `points_table`, `budgets` and the tables of
    `sections` hold one mapping per row; their keys are the columns, and a missing or None value is an empty cell. A
    budget's keys are as a rule budget, configuration, validation, test and holds (True or False, shown as yes or no).
    `study_text` is the resolved study. `describe` puts a row's configuration into words, by default its tradeoff,
    weight and seed.
    """

    title: str
    rows: Sequence[ReportRow]
    figures: Sequence[Figure] = ()
    study_text: str = ""
    points_table: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    budgets: Sequence[Mapping[str, Any]] = ()
    sections: Sequence[PageSection] = ()
    describe: Callable[[ReportRow], str] | None = None


def write_page(path: Path, page: Page) -> None:
    """Writes the page to `path`, atomically."""
    rows = page.rows
    read = summary(rows)
    text = _template().render(
        title=page.title,
        headline=headline(read),
        tiles=_tiles(read, backbone_accuracy(rows, "validation")),
        figures=[_embedded(figure) for figure in page.figures],
        front=[_front_cells(point, page.describe or _describe_row) for point in at_tenths(read.front)],
        name_methods=len({row.method for row in rows if row.source not in ("backbone", *BASELINES)}) > 1,
        num_front=len(read.front),
        num_points=len({row.key for row in rows if row.source not in BASELINES}),
        hypervolumes=[_area_cells(area) for area in read.hypervolumes],
        spread=any(len(area.per_seed) > 1 for area in read.hypervolumes),
        budgets=_table(page.budgets),
        sections=[_section_cells(section) for section in page.sections],
        points=_table(page.points_table),
        notes=page.notes,
        study_text=page.study_text,
    )
    write_text(path, text)


def _section_cells(section: PageSection) -> dict[str, Any]:
    return {
        "heading": section.heading,
        "remark": section.remark,
        "table": _table(section.table),
        "figure": _embedded(section.figure) if section.figure else None,
    }


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def headline(read: Summary, budget: float = 0.5) -> str:
    """One sentence: what the best point within a budget of relative MACs (on validation) keeps of the backbone."""
    affordable = [point for point in read.front if point.validation.relative_macs <= budget]
    if not affordable or read.backbone_accuracy is None:
        return f"{len(read.front)} operating points on the front."
    point = affordable[-1]
    return (
        f"With {percent(point.test.relative_macs, 0)} of the backbone’s MACs this study reaches "
        f"{percent(point.test.accuracy)} test accuracy, "
        f"{_against(point.accuracy_drop)} {percent(read.backbone_accuracy)}."
    )


def _against(drop: float) -> str:
    points = round(100 * drop, 2)
    if points == 0:
        return "equal to the backbone’s"
    return f"{abs(points):.2f} points {'below' if points > 0 else 'above'} the backbone’s"


def _tiles(read: Summary, validation_base: float | None, most_lost: float = 0.01) -> list[dict[str, str]]:
    tiles = []
    if read.backbone_accuracy is not None:
        tiles.append({"value": percent(read.backbone_accuracy), "label": "test accuracy of the whole backbone"})
    if read.front:
        tiles.append({"value": f"{read.front[0].test.relative_macs:.2f}×", "label": "MACs where the front starts"})
    close = [
        point
        for point in read.front
        if validation_base is not None and point.validation.accuracy >= validation_base - most_lost
    ]
    if close:
        label = f"MACs for a loss within 1 point on validation ({100 * close[0].accuracy_drop:.2f} on test)"
        tiles.append({"value": f"{close[0].test.relative_macs:.2f}×", "label": label})
    if read.gates_span:
        low, high = read.gates_span
        tiles.append({"value": f"{low:.2f}–{high:.2f}×", "label": "MACs spanned by the gates"})
    return tiles


def _front_cells(point: FrontPoint, describe: Callable[[ReportRow], str]) -> dict[str, Any]:
    row = point.test
    return {
        "relative_macs": f"{row.relative_macs:.3f}",
        "accuracy": percent(row.accuracy),
        "gain": "" if math.isnan(point.accuracy_drop) else f"{-100 * point.accuracy_drop:+.2f} pt".replace("-", "−"),
        "source": row.source,
        "method": row.method if row.source != "backbone" else "",
        "configuration": describe(row),
        "shares": [100 * share for share in row.exit_fractions],
    }


def _area_cells(area: Hypervolume) -> dict[str, str]:
    low, high = min(area.per_seed), max(area.per_seed)
    mean = sum(area.per_seed) / len(area.per_seed)
    return {
        "source": area.source,
        "method": area.method,
        "all_seeds": f"{area.all_seeds:.4f}",
        "per_seed": f"{mean:.4f}" + (f" ({low:.4f} to {high:.4f})" if len(area.per_seed) > 1 else ""),
    }


def _describe_row(row: ReportRow) -> str:
    parts = {"ce_ic_tradeoff": row.ce_ic_tradeoff, "accuracy_weight": row.accuracy_weight, "seed": row.seed}
    return ", ".join(f"{name} {value:g}" for name, value in parts.items() if value is not None)


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return {
        "columns": [column.replace("_", " ") if " " not in column else column for column in columns],
        "numeric": [all(_is_number(row.get(column)) for row in rows) for column in columns],
        "rows": [[_cell(row.get(column)) for column in columns] for row in rows],
    }


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _embedded(figure: Figure) -> dict[str, str | None]:
    return {
        "alt": figure.alt,
        "caption": figure.caption,
        "source": _data_uri(figure.path),
        "dark": _data_uri(figure.dark_path) if figure.dark_path else None,
    }


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def describe_configuration(configuration: str, positions: Sequence[int], head_types: Sequence[str]) -> str:
    """A configuration `[[head type or -1, threshold], ...]`, one per position, in words.

    Positions are named by their block as in the study. Exits behind one where everybody leaves (a threshold below 0)
    are not reached and not said; head types are named where there are several. An empty text gives an empty one.
    """
    if not configuration:
        return ""
    parts: list[str] = []
    for position, (head_type, threshold) in zip(positions, json.loads(configuration), strict=True):
        if head_type < 0:
            continue
        place = f"after {place_name(position)}" + (f" ({head_types[head_type]})" if len(head_types) > 1 else "")
        if threshold < 0:
            return f"exit {', '.join(parts)}, the rest {place}" if parts else f"everybody leaves {place}"
        parts.append(f"{place} above {_threshold(threshold)}")
    return f"exit {', '.join(parts)}" if parts else "the whole backbone"


def _threshold(threshold: float) -> str:
    """Two decimals, or as many as it takes that a threshold inside (0, 1) does not read as 0 or 1."""
    for decimals in range(2, 9):
        text = f"{threshold:.{decimals}f}"
        if 0 < float(text) < 1 or threshold in (0, 1):
            break
    return text
