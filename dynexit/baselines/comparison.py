"""What a study's own operating points are worth against its baselines, on the same test samples."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from dynexit.baselines.rows import Baseline, describe_baseline
from dynexit.baselines.search import BUDGETS
from dynexit.core.statistics import Interval, accuracy_interval, verdict
from dynexit.report.judged.outcomes import Outcomes
from dynexit.report.judged.seeds import SAME_ANSWERS, SeedAnswers, count_text, gain, num_distinct, paired
from dynexit.report.judged.words import difference_text, percent_range, points_range, share_text
from dynexit.report.page import PageSection
from dynexit.report.table import FrontPoint, front_of, within_budgets
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
    "MACs. The difference of the two is on the same test images, with its 95 % interval, in points. "
)
_SEEDS = (
    "Each seed has its own networks and its own choice within a budget: MACs are the mean over seeds, accuracies the "
    "mean with the least and the greatest, and the interval of the difference is over images, which does not hold the "
    "luck of the seeds; their spread follows. "
)


@dataclass(frozen=True)
class Comparison:
    """A baseline, the point of the study with no more MACs on validation, and what both answer on test: the study's
    point first; None where none is as cheap. `budget` is the share of MACs within which the baseline was chosen, None
    for a static network.
    """

    baseline: Baseline
    budget: float | None
    ours: FrontPoint | None = None
    answers: tuple[SeedAnswers, SeedAnswers] | None = None

    @cached_property
    def difference(self) -> Interval | None:
        """By how much the study's point is more accurate."""
        return self.answers and paired(self.answers[:1], self.answers[1:])

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
            "seed": theirs.seed,
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
            found.append(Comparison(one, asked))
        for ours in affordable:
            point = by_id[ours.test.chosen_by]
            test = Outcomes(point, "test")
            images = point.config.data.model_dump_json()
            mine, theirs = (
                SeedAnswers(images, right_N, test.origin_N) for right_N in (test.of(ours.test)[0], one.correct("test"))
            )
            found.append(Comparison(one, asked, ours, (mine, theirs)))
    return found


def write_comparisons(path: Path, found: Sequence[Comparison]) -> None:
    """Writes a row per comparison; fractions and relative MACs as in operating_points.csv."""
    table = [one.cells() for one in found]
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def comparison_section(found: Sequence[Comparison]) -> PageSection:
    """The page's part on the comparisons, seeds together."""
    groups: dict[tuple[str, ...], list[Comparison]] = {}
    for one in found:
        theirs = one.baseline.test
        network = theirs.configuration if theirs.source == "static" else f"within {one.budget:g}"
        groups.setdefault((theirs.source, network, theirs.method, one.baseline.variant), []).append(one)
    table = [_page_cells(group) for group in groups.values()]
    has_seeds = any(len(group) > 1 for group in groups.values())
    same = SAME_ANSWERS if any("equal" in cells["seeds"] for cells in table) else ""
    remark = f"{_WHAT}{_SEEDS if has_seeds else ''}{BASELINES_CSV} has all figures.{same}"
    return PageSection(_HEADING, remark, table if has_seeds else [_without_seeds(cells) for cells in table])


def _without_seeds(cells: dict[str, str]) -> dict[str, str]:
    return {name: cell for name, cell in cells.items() if name != "seeds"}


def _page_cells(group: Sequence[Comparison]) -> dict[str, str]:
    """The row of one baseline, over the seeds that have a point as cheap if any has."""
    compared = [one for one in group if one.answers] or group
    first, theirs = compared[0], [one.baseline.test for one in compared]
    within = "" if first.budget is None else f" within {first.budget:g}"
    names = list(dict.fromkeys(map(describe_baseline, theirs)))
    source = first.baseline.test.source.replace("_", " ")
    name = f"{source}{within}: {names[0]}" + ("; other seeds have their own" if names[1:] else "")
    cells = {
        "compared with": f"{name} ({first.baseline.variant})" if first.baseline.variant else name,
        "classifier": first.baseline.test.method,
        "seeds": str(len(compared)),
        "test MACs and accuracy": _at(theirs),
        "ours": "",
        "difference": "",
        "ours is": _NONE,
    }
    pairs = [one.answers for one in compared if one.answers]
    ours = [one.ours.test for one in compared if one.ours]
    if not pairs:
        return cells
    mine, other = zip(*pairs, strict=True)
    distinct = max(num_distinct(mine), num_distinct(other))
    gains = [gain(*pair) for pair in pairs]
    difference = paired(mine, other)
    assert difference is not None
    return cells | {
        "seeds": count_text(len(pairs), distinct),
        "test MACs and accuracy": _at(theirs, other),
        "ours": _at(ours, mine),
        "difference": difference_text(difference) + points_range(min(gains), max(gains), distinct),
        "ours is": verdict(difference),
    }


def _at(rows: Sequence[ReportRow], answers: Sequence[SeedAnswers] = ()) -> str:
    """Mean MACs and accuracy: of one seed with its interval, of several with their spread."""
    if len(rows) == 1 and answers:
        accuracy = share_text(accuracy_interval(answers[0].correct_N, answers[0].origin_N))
    else:
        accuracy = percent_range([row.accuracy for row in rows])
    return f"{fmean(row.relative_macs for row in rows):.3f} at {accuracy}"
