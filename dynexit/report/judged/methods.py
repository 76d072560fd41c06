"""Methods at equal budgets, over their seeds: each against the backbone and against the best one, on the same images.

Shapes: N samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from dynexit.core.statistics import Interval, mean_interval, verdict
from dynexit.report.judged.outcomes import with_outcomes
from dynexit.report.judged.words import difference_text, percent_range, points_range
from dynexit.report.page import PageSection
from dynexit.report.table import FrontPoint, by_seed, front_of, within_budgets
from dynexit.search.operating_points import ReportRow, RowKey
from dynexit.study.grid import Point

_BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.75)
_WHAT = (
    "For each budget of relative MACs and each method every seed takes its point that is best on validation. Accuracy "
    "on test is the mean over seeds, with the least and the greatest. Differences are paired, on the same test images: "
    "of each image the mean over seeds, with a 95 % bootstrap interval over images, which does not hold the luck of "
    "the seeds; their spread follows. The last columns compare with the method that is best on validation at the "
    "budget."
)


@dataclass(frozen=True)
class MethodAtBudget:
    """A method's points within a budget, one per seed, and its differences in test accuracy, in [-1, 1].

    `against_best` is None of the best method itself; the spreads are (least, greatest) of the seeds'.
    """

    budget: float
    method: str
    points: tuple[FrontPoint, ...]
    against_backbone: Interval
    backbone_spread: tuple[float, float]
    against_best: Interval | None
    best_spread: tuple[float, float] | None


@dataclass(frozen=True)
class _TestAnswers:
    """Of one point on test: what names its images, whether it and its backbone are right, and the originals."""

    images: str
    correct_N: np.ndarray
    base_N: np.ndarray
    origin_N: np.ndarray


def compare_methods(
    points: Sequence[Point], rows: Sequence[ReportRow], budgets: Sequence[float] = ()
) -> list[MethodAtBudget]:
    """Returns the searches of every method within each budget that all of its seeds can keep; nothing for a study of
    one method and one seed.
    """
    search = [row for row in rows if row.source == "search"]
    fronts = {
        method: [front_of(seed) for seed in by_seed(row for row in search if row.method == method)]
        for method in sorted({row.method for row in search})
    }
    if sum(map(len, fronts.values())) < 2:
        return []
    chosen: dict[float, dict[str, tuple[FrontPoint, ...]]] = {}
    for budget in budgets or _BUDGETS:
        for method, own in fronts.items():
            bought = [point for front in own for point in within_budgets(front, [budget])]
            if len(bought) == len(own):
                chosen.setdefault(budget, {})[method] = tuple(bought)
    tests = [point.test for by_method in chosen.values() for bought in by_method.values() for point in bought]
    answers: dict[RowKey, _TestAnswers] = {}
    for row, outcomes in with_outcomes(points, tests):
        images = outcomes.point.config.data.model_dump_json()
        answers[row.key] = _TestAnswers(images, outcomes.of(row)[0], outcomes.correct_RN[-1], outcomes.origin_N)
    return [one for budget, by_method in chosen.items() for one in _at_budget(budget, by_method, answers)]


def _at_budget(
    budget: float, by_method: Mapping[str, tuple[FrontPoint, ...]], answers: Mapping[RowKey, _TestAnswers]
) -> Iterator[MethodAtBudget]:
    best = max(by_method, key=lambda method: fmean(point.validation.accuracy for point in by_method[method]))
    theirs = [answers[point.test.key] for point in by_method[best]]
    for method, bought in by_method.items():
        ours = [answers[point.test.key] for point in bought]
        gains = [_gain(one.correct_N, one.base_N) for one in ours]
        base = _paired(ours, [_TestAnswers(one.images, one.base_N, one.base_N, one.origin_N) for one in ours])
        assert base is not None
        seeds = {point.test.seed: answers[point.test.key] for point in by_method[best]}
        pairs = [(answers[point.test.key], seeds.get(point.test.seed)) for point in bought]
        spread = [_gain(a.correct_N, b.correct_N) for a, b in pairs if b is not None and a.images == b.images]
        yield MethodAtBudget(
            budget,
            method,
            bought,
            base,
            (min(gains), max(gains)),
            None if method == best else _paired(ours, theirs),
            (min(spread), max(spread)) if spread and method != best else None,
        )


def _gain(correct_N: np.ndarray, other_N: np.ndarray) -> float:
    return float(correct_N.mean() - other_N.mean())


def _paired(ours: Sequence[_TestAnswers], theirs: Sequence[_TestAnswers]) -> Interval | None:
    """The difference of the means over seeds, image by image; None if no images are shared."""
    values: list[np.ndarray] = []
    origins: list[np.ndarray] = []
    for images in dict.fromkeys(one.images for one in ours):
        sides = [[one for one in side if one.images == images] for side in (ours, theirs)]
        if all(sides):
            ours_N, theirs_N = (np.mean([one.correct_N for one in side], axis=0) for side in sides)
            values.append(ours_N - theirs_N)
            origins.append(sides[0][0].origin_N + (origins[-1].max() + 1 if origins else 0))
    return mean_interval(np.concatenate(values), np.concatenate(origins)) if values else None


def methods_section(found: Sequence[MethodAtBudget]) -> list[PageSection]:
    """The page's part on methods at equal budgets; nothing without any."""
    return [PageSection("Methods at equal budgets", _WHAT, [_cells(one) for one in found])] if found else []


def _cells(one: MethodAtBudget) -> dict[str, str]:
    tests = [point.test for point in one.points]
    cells = {
        "budget": f"{one.budget:g}",
        "method": one.method,
        "seeds": str(len(tests)),
        "relative MACs": f"{fmean(row.relative_macs for row in tests):.3f}",
        "test accuracy": percent_range([row.accuracy for row in tests]),
        "vs backbone, points": difference_text(one.against_backbone) + points_range(*one.backbone_spread, len(tests)),
        "against it": verdict(one.against_backbone),
        "vs best, points": "the best on validation" if one.against_best is None else difference_text(one.against_best),
        "against the best": "" if one.against_best is None else verdict(one.against_best),
    }
    if one.best_spread is not None:
        cells["vs best, points"] += points_range(*one.best_spread, len(tests))
    return cells
