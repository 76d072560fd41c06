"""What a study's own operating points are worth against its baselines, on the same test samples."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynexit.baselines.rows import Baseline, describe_baseline
from dynexit.baselines.search import BUDGETS
from dynexit.core.statistics import Interval, accuracy_interval, mean_interval, verdict
from dynexit.report.judged.outcomes import Outcomes
from dynexit.report.judged.words import difference_text, share_text
from dynexit.report.page import PageSection
from dynexit.report.table import FrontPoint, front_of, percent, within_budgets
from dynexit.run_dir import atomic_write
from dynexit.search.operating_points import ReportRow
from dynexit.study.grid import Point

BASELINES_CSV = "baselines.csv"
_NONE = "none as cheap"
_HEADING = "Against baselines"
_WHAT = (
    "Static networks are of the same family, fitted by the same recipe, with their own classifier or with heads that "
    "read their last block as the exits read theirs; cascades run several of them in turn, with exact thresholds; one "
    "threshold is the same for all exits of a point. For each static network the point of this study that is best on "
    "validation with no more MACs there; for the others both are the best within the same share of the backbone's "
    "MACs. The difference of the two is on the same test images, with its 95 % interval, in points. {file} has all "
    "figures."
)


@dataclass(frozen=True)
class Comparison:
    """A baseline, the point of the study with no more MACs on validation, and by how much that one is more accurate on
    test; both None where none is as cheap. `budget` is the share of MACs within which the baseline was chosen, None for
    a static network.
    """

    baseline: Baseline
    budget: float | None
    ours: FrontPoint | None
    difference: Interval | None
    accuracies: tuple[Interval, Interval] | None = None
    """The intervals of the baseline's test accuracy and of the study's point's; None with `ours`."""

    @property
    def verdict(self) -> str:
        """What the difference shows, in words."""
        return _NONE if self.difference is None else verdict(self.difference)

    def cells(self) -> dict[str, Any]:
        """The row of baselines.csv."""
        theirs, ours, difference = self.baseline.test, self.ours and self.ours.test, self.difference
        return {
            "source": theirs.source,
            "networks": describe_baseline(theirs),
            "classifier": theirs.method,
            "budget": self.budget,
            "relative_macs": theirs.relative_macs,
            "accuracy": theirs.accuracy,
            "our_source": ours and ours.source,
            "our_method": ours and ours.method,
            "our_point_id": ours and ours.point_id,
            "our_search_id": ours and ours.search_id,
            "our_configuration": ours and ours.configuration,
            "our_relative_macs": ours and ours.relative_macs,
            "our_accuracy": ours and ours.accuracy,
            "difference": difference and difference.value,
            "low": difference and difference.low,
            "high": difference and difference.high,
            "verdict": self.verdict,
        }


def compare(points: Sequence[Point], rows: Sequence[ReportRow], baselines: Iterable[Baseline]) -> list[Comparison]:
    """Returns a comparison for each static network, and for each budget of relative MACs one with the best cascade and
    one with the best single threshold, of each head.

    `rows` are the study's, `points` those that they are of.
    """
    by_id = {identity: point for point in reversed(points) for identity in point.ids.values()}
    fronts: dict[str, list[FrontPoint]] = {}
    for backbone in {point.ids["prepare"] for point in points}:
        own = [row for row in rows if row.chosen_by in by_id and by_id[row.chosen_by].ids["prepare"] == backbone]
        fronts[backbone] = front_of(own)
    budgets = points[0].config.search.relative_macs or BUDGETS
    chosen: list[tuple[Baseline, float | None, float]] = []
    groups: dict[tuple[str, str, str], list[Baseline]] = {}
    for one in baselines:
        if one.validation.source == "static":
            chosen.append((one, None, one.validation.relative_macs))
        else:
            groups.setdefault((one.validation.source, one.backbone, one.head), []).append(one)
    for group in groups.values():
        for budget in budgets:
            within = [one for one in group if one.validation.relative_macs <= budget]
            if within:
                best = max(within, key=lambda one: (one.validation.accuracy, -one.validation.macs))
                chosen.append((best, budget, budget))
    found = []
    for one, asked, most in chosen:
        affordable = within_budgets(fronts[one.backbone], [most])
        if not affordable:
            found.append(Comparison(one, asked, None, None))
        for ours in affordable:
            point = by_id[ours.test.chosen_by]
            test = Outcomes(point, "test")
            theirs_N, ours_N = one.correct(), test.of(ours.test)[0]
            difference = mean_interval(ours_N.astype(np.int64) - theirs_N, test.origin_N)
            accuracies = accuracy_interval(theirs_N, test.origin_N), accuracy_interval(ours_N, test.origin_N)
            found.append(Comparison(one, asked, ours, difference, accuracies))
    return found


def write_comparisons(path: Path, found: Sequence[Comparison]) -> None:
    """Writes a row per comparison; fractions and relative MACs as in operating_points.csv."""
    table = [one.cells() for one in found]
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def comparison_section(found: Sequence[Comparison]) -> PageSection:
    """The page's part on the comparisons."""
    table = [_page_cells(one) for one in found]
    return PageSection(_HEADING, _WHAT.format(file=BASELINES_CSV), table)


def _page_cells(one: Comparison) -> dict[str, str]:
    theirs = one.baseline.test
    their_accuracy, our_accuracy = one.accuracies or (None, None)
    within = "" if one.budget is None else f" within {one.budget:g}"
    return {
        "compared with": f"{theirs.source}{within}: {describe_baseline(theirs)}",
        "classifier": theirs.method,
        "test MACs and accuracy": _at(theirs, their_accuracy),
        "ours": _at(one.ours.test, our_accuracy) if one.ours else "",
        "difference": difference_text(one.difference) if one.difference else "",
        "ours is": one.verdict,
    }


def _at(row: ReportRow, accuracy: Interval | None) -> str:
    return f"{row.relative_macs:.3f} at {percent(row.accuracy) if accuracy is None else share_text(accuracy)}"
