"""The report's page: one HTML file with everything in it, which a browser opens from disk without a network."""

import base64
import hashlib
import json
import mimetypes
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from dynexit.core.cost import place_name
from dynexit.report.chart.data import json_script
from dynexit.report.figures import THEMES
from dynexit.report.judged.cards import Card
from dynexit.report.judged.front import FRONT_CSV, FrontEntry, entries_of, even_steps
from dynexit.report.judged.outcomes import Judgements
from dynexit.report.judged.verdicts import headline, tiles
from dynexit.report.table import Summary, backbone_accuracy, percent, summary
from dynexit.run_dir import write_text
from dynexit.search.operating_points import BASELINES, ReportRow, RowTime


@dataclass(frozen=True)
class Figure:
    """A PNG to embed, what it shows for those who cannot see it, its caption, and a twin for dark pages (or None)."""

    path: Path
    alt: str
    caption: str
    dark_path: Path | None = None


@dataclass(frozen=True)
class PageSection:
    """A part of the page of its own: one mapping per row of its table, as for `budgets`, and maybe a figure.

    `drawings` are inline SVG, `folded` further tables by what to click on.
    """

    heading: str
    remark: str
    table: Sequence[Mapping[str, Any]]
    figure: Figure | None = None
    drawings: Sequence[markupsafe.Markup] = ()
    folded: Sequence[tuple[str, Sequence[Mapping[str, Any]]]] = ()


@dataclass(frozen=True)
class Download:
    """A file of the report's folder, embedded in the page or linked, and what it holds."""

    path: Path
    what: str
    embedded: bool = False


@dataclass(frozen=True)
class Page:
    """What the page shows; all text is escaped.

    The first figure is on top, the others after the table of the front. `judged` holds the intervals of rows, which
    show none without it; `warnings` and `remarks` are sentences, `missing` has one for each point without results,
    `cards` are the budgets to choose from. With `chart` (dynexit.report.chart) the script draws the front's figure, and
    the first picture is for browsers without scripts. `points_table`,
    `budgets` and the tables of `sections` hold one mapping per row; their keys are the columns, and a missing or None
    value is an empty cell. A budget's keys are as a rule budget, configuration, validation, test and holds (True or
    False, shown as yes or no). `study_text` is the resolved study. With a `headline` of its own the page is of studies
    that have no common front, and shows none. `describe` puts a row's configuration into words, by default its
    tradeoff, weight and seed.
    """

    title: str
    rows: Sequence[ReportRow] = ()
    figures: Sequence[Figure] = ()
    study_text: str = ""
    points_table: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    budgets: Sequence[Mapping[str, Any]] = ()
    sections: Sequence[PageSection] = ()
    describe: Callable[[ReportRow], str] | None = None
    judged: Judgements = field(default_factory=dict)
    warnings: Sequence[str] = ()
    remarks: Sequence[str] = ()
    cards: Sequence[Card] = ()
    missing: Sequence[str] = ()
    chart: Mapping[str, Any] | None = None
    downloads: Sequence[Download] = ()
    headline: str = ""


def write_page(path: Path, page: Page) -> None:
    """Writes the page to `path`, atomically."""
    rows = page.rows
    read = summary(rows)
    entries = entries_of(read.front, rows, page.judged, page.describe or _describe_row)
    script = _asset("page.js") if page.cards or page.chart else ""
    css = _theme_css() + _asset("page.css")
    text = _template().render(
        title=page.title,
        headline=page.headline or headline(entries),
        has_front=not page.headline,
        has_intervals=bool(page.judged),
        has_front_file=any(one.path.name == FRONT_CSV for one in page.downloads),
        missing=page.missing,
        warnings=page.warnings,
        remarks=page.remarks,
        cards=[_card_cells(card) for card in page.cards],
        script=markupsafe.Markup(script),
        script_hash=_sha256(script),
        css=markupsafe.Markup(css),
        css_hash=_sha256(css),
        shade=shade,
        chart=json_script(page.chart) if page.chart else "",
        caption=page.figures[0].caption if page.figures else "",
        downloads=[_download_cells(one) for one in page.downloads],
        tiles=tiles(read, entries, backbone_accuracy(rows, "validation")),
        figures=[_embedded(figure) for figure in page.figures],
        num_shown=sum(entry.validation.on_front for entry in even_steps(entries)),
        front=[_front_cells(entry) for entry in even_steps(entries)],
        name_methods=len({row.method for row in rows if row.source not in ("backbone", *BASELINES)}) > 1,
        time_sizes=" / ".join(str(time.batch_size) for time in _timed(read)),
        num_front=len(read.front),
        num_points=len({row.key for row in rows if row.source not in BASELINES}),
        budgets=_table(page.budgets),
        sections=[_section_cells(section) for section in page.sections],
        points=_table(page.points_table),
        notes=page.notes,
        study_text=page.study_text,
    )
    write_text(path, text)


def _timed(read: Summary) -> Sequence[RowTime]:
    return next((point.test.times for point in read.front if point.test.times), ())


def _section_cells(section: PageSection) -> dict[str, Any]:
    return {
        "heading": section.heading,
        "remark": section.remark,
        "table": _table(section.table),
        "figure": _embedded(section.figure) if section.figure else None,
        "drawings": section.drawings,
        "folded": [(title, _table(table)) for title, table in section.folded],
    }


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _theme_css() -> str:
    """The colours of the methods, as in the pictures."""
    light, dark = (
        "".join(f"--c{index}: {colour}; " for index, colour in enumerate(THEMES[theme].methods))
        for theme in ("light", "dark")
    )
    return f"\n:root {{ {light}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"


def shade(depth: float) -> str:
    """The colour of an exit by its depth in [0, 1), darker with depth for prints in grey; page.js has the same."""
    return f"hsl({75 + 200 * depth:.0f} 48% {70 - 38 * depth:.0f}%)"


def _download_cells(one: Download) -> dict[str, Any]:
    name, kind = one.path.name, mimetypes.guess_type(one.path.name)[0] or "text/plain"
    encoded = base64.b64encode(one.path.read_bytes()).decode("ascii") if one.embedded else ""
    address = f"data:{kind};base64,{encoded}" if one.embedded else urllib.parse.quote(name)
    return {"name": name, "what": one.what, "embedded": one.embedded, "address": address}


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html")


def _front_cells(entry: FrontEntry) -> dict[str, Any]:
    row = entry.test
    return {
        "relative_macs": f"{row.relative_macs:.3f}",
        "time": " / ".join(f"{time.relative_time:.2f}" for time in row.times),
        "accuracy": entry.accuracy,
        "difference": entry.difference,
        "verdict": entry.verdict,
        "source": row.source,
        "method": row.method if row.source != "backbone" else "",
        "configuration": entry.words,
        "point": row.point_id,
        "search": row.search_id,
        "shares": [100 * share for share in row.exit_fractions],
    }


def _card_cells(card: Card) -> dict[str, Any]:
    validation = card.entry.validation
    return {
        **_front_cells(card.entry),
        "budget": card.budget,
        "label": card.label,
        "validation": f"{validation.relative_macs:.3f}, {percent(validation.accuracy)}".replace(
            " %", "\N{NO-BREAK SPACE}%"
        ),
        "commands": card.commands,
    }


def _describe_row(row: ReportRow) -> str:
    parts = {"ce_ic_tradeoff": row.ce_ic_tradeoff, "accuracy_weight": row.accuracy_weight, "seed": row.seed}
    return ", ".join(f"{name} {value:g}" for name, value in parts.items() if value is not None)


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numeric = {column: all(_is_number(row.get(column)) for row in rows) for column in columns}
    return {
        "columns": [column.replace("_", " ") if " " not in column else column for column in columns],
        "numeric": list(numeric.values()),
        "rows": [[_look(_cell(row.get(column)), numeric[column]) for column in columns] for row in rows],
    }


def _look(text: str, is_number: bool) -> dict[str, str]:
    """A cell and its CSS class: numbers are aligned, a broken budget stands out, long text has room."""
    if is_number:
        return {"text": text, "look": "number"}
    if text == "no":
        return {"text": text, "look": "no"}
    if max(map(len, text.split()), default=0) > 22:
        return {"text": text, "look": "long"}
    return {"text": text, "look": "words" if len(text) > 60 else ""}


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
    are not reached and not said; where nobody leaves (a threshold of 1) it says `never`. Head types are named where
    there are several. An empty text gives an empty one.
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
        parts.append(f"{place} above {threshold_text(threshold)}" if threshold < 1 else f"{place} never")
    return f"exit {', '.join(parts)}" if parts else "the whole backbone"


def threshold_text(threshold: float) -> str:
    """Two decimals, or as many as it takes that a threshold inside (0, 1) does not read as 0 or 1."""
    for decimals in range(2, 9):
        text = f"{threshold:.{decimals}f}"
        if 0 < float(text) < 1 or threshold == 0:
            break
    return text
