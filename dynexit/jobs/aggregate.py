"""Operating points of any number of studies as one table, from whatever of them is finished by now."""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from dynexit.baselines.rows import baselines_of
from dynexit.errors import Failure, UserError, counted
from dynexit.files import spreadsheet_text
from dynexit.jobs.finished import failure_reason, finished_jobs, report_is_done
from dynexit.jobs.reporting.rows import collect_rows
from dynexit.report.figures import pareto_figure
from dynexit.report.judged.areas import hypervolume_section
from dynexit.report.page import Figure, Page, PageSection, write_page
from dynexit.report.table import backbone_accuracy, front_of, percent, within_budgets
from dynexit.run_dir import STUDY, RunDir, write_text
from dynexit.search.operating_points import BASELINES, ReportRow, cells, read_csv
from dynexit.study.grid import Point
from dynexit.study.read import load_study

_SHARES = (0.2, 0.3, 0.4, 0.5, 0.75)
_TABLE = "operating_points.csv"


@dataclasses.dataclass(frozen=True)
class Missing:
    """A point, or with `label` empty a whole study, without operating points: its state and the reason."""

    study: str
    label: str
    point_id: str
    state: str
    reason: str


@dataclasses.dataclass
class Aggregate:
    """The operating points of several studies by their folders, and what is missing."""

    studies: dict[str, list[ReportRow]] = dataclasses.field(default_factory=dict)
    num_points: dict[str, int] = dataclasses.field(default_factory=dict)
    missing: list[Missing] = dataclasses.field(default_factory=list)

    @property
    def damaged(self) -> list[str]:
        """The folders in which something is damaged."""
        return list(dict.fromkeys(one.study for one in self.missing if one.state == "damaged"))

    def csv(self) -> str:
        """A row per operating point and split with the study's folder first, then one per missing point.

        `on_front` is within the study. Columns that a study does not have are empty.
        """
        tables = [(study, cells(found)) for study, found in self.studies.items()]
        headers = [next(table) for _, table in tables]
        longest = max(headers, key=len, default=[])
        names = dict.fromkeys(["study", *longest, *(name for header in headers for name in header), "state"])
        if self.missing:
            names |= dict.fromkeys(("point", "point_id", "reason"))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(names), lineterminator="\n", restval="")
        writer.writeheader()
        for (study, table), header in zip(tables, headers, strict=True):
            label = spreadsheet_text(study)
            rows = (zip(header, map(spreadsheet_text, row), strict=True) for row in table)
            writer.writerows({"study": label, **dict(row), "state": "done"} for row in rows)
        for one in self.missing:
            row = {"study": one.study, "state": one.state, "point": one.label, "point_id": one.point_id}
            writer.writerow({name: spreadsheet_text(value) for name, value in {**row, "reason": one.reason}.items()})
        return text.getvalue()

    def short(self) -> str:
        """A line per study and method: the test accuracy of the best point on validation within shares of the MACs."""
        lines = [["study", "method", "points", "backbone", *(f"within {share:g}" for share in _SHARES)]]
        for study, rows in self.studies.items():
            base, count = backbone_accuracy(rows), str(self.num_points[study])
            for method in sorted({row.method for row in rows if row.source not in ("backbone", *BASELINES)}):
                front = front_of([row for row in rows if row.method == method])
                bought = [within_budgets(front, [share]) for share in _SHARES]
                accuracies = ["".join(percent(point.test.accuracy) for point in points) or "-" for points in bought]
                lines.append([study, method, count, "" if base is None else percent(base), *accuracies])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([*text, *(f"{one.study} {one.label}: {one.state}, {one.reason}" for one in self.missing)])

    def write(self, folder: Path) -> None:
        """Writes the table, a figure and one page that compares the studies."""
        write_text(folder / _TABLE, self.csv())
        names = [Path(study).name for study in self.studies]
        labels = {
            study: name if names.count(name) == 1 else study for study, name in zip(self.studies, names, strict=True)
        }
        rows = [_labelled(row, labels[study]) for study, found in self.studies.items() for row in found]
        points = [dataclasses.asdict(one) for one in self.missing]
        hypervolumes = hypervolume_section(rows)
        if self._have_one_backbone():
            figure = _figure(rows, folder, _CAPTION)
            page = Page("Studies", rows, [figure], points_table=points, notes=_NOTES, sections=hypervolumes)
        else:
            figure = _figure([row for row in rows if row.source != "backbone"], folder, f"{_CAPTION} {_APART}")
            table = [_against_backbone(labels[study], found) for study, found in self.studies.items()]
            sections = [PageSection("Each study against its own backbone", _OWN, table, figure), *hypervolumes]
            headline = f"{len(self.studies)} studies of different backbones or data. {_APART}"
            page = Page("Studies", points_table=points, notes=_NOTES, sections=sections, headline=headline)
        write_page(folder / "report.html", page)

    def _have_one_backbone(self) -> bool:
        """Whether the backbones of all studies are equally accurate, so that their fronts can be one."""
        found = {
            frozenset((row.split, row.accuracy) for row in rows if row.source == "backbone")
            for rows in self.studies.values()
        }
        return len(found) <= 1


def _figure(rows: Sequence[ReportRow], folder: Path, caption: str) -> Figure:
    paths = {theme: folder / f"pareto{suffix}.png" for theme, suffix in (("light", ""), ("dark", "_dark"))}
    for theme, path in paths.items():
        pareto_figure(rows, path, theme=theme)
    return Figure(paths["light"], "Accuracy against relative MACs", caption, paths["dark"])


def _against_backbone(label: str, rows: Sequence[ReportRow]) -> dict[str, str]:
    """A study's line: its backbone's test accuracy, and that of the best point on validation within each share."""
    base, front = backbone_accuracy(rows), front_of(rows)
    cells = {"study": label, "backbone": "" if base is None else percent(base)}
    for share in _SHARES:
        cells[f"within {share:g} of the MACs"] = "".join(
            f"{percent(point.test.accuracy)} ({-100 * point.accuracy_drop:+.2f})".replace("-", "−")
            for point in within_budgets(front, [share])
        )
    return cells


_CAPTION = (
    "Test accuracy against mean MACs relative to each study's own bare backbone; each front was chosen on validation."
)
_APART = "Fronts of different data cannot be compared: look at each study against its own backbone."
_OWN = (
    "Test accuracy of the point that was best on validation within a share of the study's own backbone's MACs, and in "
    "parentheses by how many points it is above that backbone."
)
_NOTES = ("MACs are relative to each study's own backbone. Studies of other test images cannot be compared.",)


def study_folders(directories: Sequence[Path]) -> list[Path]:
    """The folders of studies that `directories` are or hold, each once. Raises UserError for one without any.

    A study file that is a link to a file outside the directory is refused: messages would show that file's lines.
    """
    found: dict[Path, Path] = {}
    for directory in directories:
        folders = sorted(path.parent for path in directory.rglob(STUDY))
        if not folders:
            raise UserError(f"there is no study in {directory}; give a folder that holds a {STUDY}, or runs/")
        for folder in folders:
            if not (folder / STUDY).resolve().is_relative_to(directory.resolve()):
                raise UserError(f"{folder / STUDY} is a link to a file outside {directory}; remove it or copy the file")
            found[folder.resolve()] = folder
    return list(found.values())


def aggregate(directories: Sequence[Path], say: Callable[[str], None]) -> Aggregate:
    """Returns the operating points of every finished point, and why others are missing.

    `say` receives how much of each study is finished.
    """
    found = Aggregate()
    for folder in study_folders(directories):
        try:
            points = load_study(folder / STUDY).at(folder).points
        except (Failure, UserError, OSError) as fault:
            say(f"{folder}: damaged, since {fault}")
            found.missing.append(Missing(str(folder), "", "", "damaged", str(fault)))
            continue
        ready = [point for point in points if _is_ready(point, folder, found)]
        rows = _reported(points) if len(ready) == len(points) else []
        rows = rows or _rows(ready, folder, found)
        say(f"{folder}: {len(ready)} of {counted(len(points), 'point is', 'points are')} finished")
        if rows:
            found.studies[str(folder)] = rows
            found.num_points[str(folder)] = len(ready)
    return found


def _reported(points: Sequence[Point]) -> list[ReportRow]:
    """The rows of the study's report if it is whole and has all points as they are now; else none."""
    try:
        if not report_is_done(points):
            return []
        for point in points:  # a report may be whole where what it was made from is damaged
            RunDir(point, "record").is_done()
            RunDir(point, "search").is_done()
        rows = read_csv(points[0].study_dir / "report" / _TABLE)
    except (Failure, OSError):
        return []
    return rows if {row.search_id for row in rows} >= {point.ids["search"] for point in points} else []


def _is_ready(point: Point, folder: Path, found: Aggregate) -> bool:
    """Whether all of the point is there; notes it as missing otherwise."""
    try:
        if "search" in finished_jobs(point):
            return all(RunDir(point, stage).is_done() for stage in ("record", "search"))
        reason = failure_reason(point)
        state = "unfinished" if reason is None else "failed"
        todo = next(stage for stage in point.stages if not RunDir(point, stage).is_marked)
        found.missing.append(Missing(str(folder), point.label, point.id, state, reason or f"{todo} is not done"))
    except (Failure, OSError) as fault:
        found.missing.append(Missing(str(folder), point.label, point.id, "damaged", str(fault)))
    return False


def _rows(ready: Sequence[Point], folder: Path, found: Aggregate) -> list[ReportRow]:
    """The rows of the points; if one is damaged inside, those of the others."""
    if not ready:
        return []
    try:
        return collect_rows(ready, baselines_of(ready))
    except (Failure, UserError, OSError) as fault:
        if len(ready) == 1:
            found.missing.append(Missing(str(folder), ready[0].label, ready[0].id, "damaged", str(fault)))
            return []
    whole = []
    for point in ready:
        before = len(found.missing)
        _rows([point], folder, found)
        whole += [point] if len(found.missing) == before else []
    return collect_rows(whole, baselines_of(whole)) if whole else []


def _labelled(row: ReportRow, label: str) -> ReportRow:
    """The row with the study in the name of its method."""
    return row if row.source == "backbone" else dataclasses.replace(row, method=f"{label}: {row.method}")
