"""The parts of a study's page, and the files that go with them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from dynexit.baselines.comparison import BASELINES_CSV, compare, comparison_section, write_comparisons
from dynexit.baselines.rows import Baseline
from dynexit.jobs.finished import class_names, kept_row
from dynexit.jobs.reporting.rows import point_times
from dynexit.record.shards import Record
from dynexit.report.judged.areas import area_intervals, hypervolume_section
from dynexit.report.judged.cards import Card
from dynexit.report.judged.classes import CLASSES_CSV, classes_section
from dynexit.report.judged.curves import Training, curves_section
from dynexit.report.judged.exits import exits_section
from dynexit.report.judged.front import FRONT_CSV, FRONT_MD, FRONT_TEX, FrontEntry
from dynexit.report.judged.methods import compare_methods, methods_section
from dynexit.report.judged.outcomes import Judgements
from dynexit.report.judged.verdicts import within_half
from dynexit.report.page import Download, PageSection
from dynexit.report.times import time_sections
from dynexit.report.uncertainty import uncertainties, write_uncertainty
from dynexit.report.uncertainty_section import uncertainty_section
from dynexit.run_dir import METRICS, RunDir
from dynexit.search.operating_points import ReportRow
from dynexit.study.grid import Point

_FILES = {
    FRONT_CSV: "every point of the front once, with intervals, ids and configurations",
    FRONT_TEX: "the table of the front for LaTeX (booktabs)",
    FRONT_MD: "the same for Markdown",
    CLASSES_CSV: "accuracy and MACs of every class",
    "pareto.pdf": "the figure of the front for one column of a paper",
    "pareto.svg": "the same as SVG",
    "pareto.png": "the same for slides",
    "operating_points.csv": "every operating point that was compared",
    "uncertainty.csv": "calibration and prediction sets",
    BASELINES_CSV: "static networks and cascades against this study",
}
_MOST_EMBEDDED = 200_000  # bytes


def sections_of(
    points: Sequence[Point],
    rows: Sequence[ReportRow],
    baselines: Sequence[Baseline],
    judged: Judgements,
    entries: Sequence[FrontEntry],
    cards: Sequence[Card],
    describe: Callable[[ReportRow], str],
) -> list[PageSection]:
    """Returns the page's parts after the front but that on provenance. Writes their tables and figures into report/."""
    budgets = points[0].config.search.relative_macs
    chosen = _chosen(points, entries, cards)
    return [
        *methods_section(compare_methods(points, rows, budgets)),
        *hypervolume_section(rows, area_intervals(points, rows)),
        *_times(points, rows, describe),
        *_comparisons(points, rows, baselines),
        *exits_section(points, chosen),
        *curves_section(_trainings(points, chosen)),
        _uncertainty(points, rows, judged),
        *_classes(points, chosen),
    ]


def downloads(directory: Path) -> list[Download]:
    """The report's files; the small tables go into the page."""
    found = [(directory / name, what) for name, what in _FILES.items() if (directory / name).is_file()]
    return [
        Download(path, what, path.name in list(_FILES)[:4] and path.stat().st_size <= _MOST_EMBEDDED)
        for path, what in found
    ]


def _chosen(points: Sequence[Point], entries: Sequence[FrontEntry], cards: Sequence[Card]) -> dict[str, ReportRow]:
    """The headline's point, then those of the cards, by what they are called."""
    labels = {point.id: point.label for point in points}
    found = {id(one): one for one in (*within_half(entries)[-1:], *(card.entry for card in cards))}
    return {
        f"{one.test.source} of {labels[one.test.point_id]} at {one.test.relative_macs:.3f} of the MACs, "
        f"{one.accuracy}": one.test
        for one in found.values()
        if one.test.source != "backbone"
    }


def _trainings(points: Sequence[Point], chosen: Mapping[str, ReportRow]) -> list[Training]:
    """The trainings of the chosen points, then the first of every other method."""
    ids = dict.fromkeys(row.point_id for row in chosen.values())
    by_id = {point.id: point for point in points}
    shown = [by_id[identity] for identity in ids]
    for point in points:
        if point.method not in {one.method for one in shown}:
            shown.append(point)
    found = []
    for point in shown:
        lines = RunDir(point, "train").read_lines(METRICS)
        kept = kept_row(point, lines)
        name = f"{point.label} ({point.id})"
        found.append(Training(name, lines, None if kept is None else int(kept["epoch"])))
    return found


def _classes(points: Sequence[Point], chosen: Mapping[str, ReportRow]) -> Iterator[PageSection]:
    by_id = {identity: point for point in reversed(points) for identity in point.ids.values()}
    for title, row in list(chosen.items())[:1]:
        point = by_id[row.chosen_by]
        yield classes_section(point, title, row, class_names(point), points[0].study_dir / "report")


def _times(
    points: Sequence[Point], rows: Sequence[ReportRow], describe: Callable[[ReportRow], str]
) -> list[PageSection]:
    """Writes time.png, and gives the page's part on times; nothing if none were measured."""
    measured = list(point_times(points).values())
    if not measured:
        return []
    return time_sections(rows, measured[0].table, points[0].study_dir / "report", describe)


def _comparisons(
    points: Sequence[Point], rows: Sequence[ReportRow], baselines: Sequence[Baseline]
) -> Iterator[PageSection]:
    """Writes baselines.csv, and gives the page's part on them; nothing without baselines."""
    found = compare(points, rows, baselines)
    path = points[0].study_dir / "report" / BASELINES_CSV
    path.unlink(missing_ok=True)
    if found:
        write_comparisons(path, found)
        yield comparison_section(found)


def _uncertainty(points: Sequence[Point], rows: Sequence[ReportRow], judged: Judgements) -> PageSection:
    """Writes uncertainty.csv and uncertainty.png, and gives the page's part on them."""
    directory = points[0].study_dir / "report"
    found = uncertainties(points, rows)
    write_uncertainty(directory / "uncertainty.csv", found)
    record = Record.open(RunDir(points[0], "record") / "test")
    classes = (record.layout.topk, int(record.header["num_classes"]))
    share = points[0].config.search.calibration_share
    return uncertainty_section(found, share, classes, directory / "uncertainty.png", judged)
