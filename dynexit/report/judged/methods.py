"""Methods at equal budgets, over their seeds: each against the backbone and against the best one, on the same images.

Shapes: N samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from dynexit.core.statistics import Interval, verdict
from dynexit.report.judged.outcomes import with_outcomes
from dynexit.report.judged.seeds import SAME_ANSWERS, SeedAnswers, count_text, gain, num_distinct, paired
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

    `num_distinct` of the seeds differ in an answer. `against_best` is None of the best method itself; the spreads are
    (least, greatest) of the seeds'.
    """

    budget: float
    method: str
    points: tuple[FrontPoint, ...]
    num_distinct: int
    against_backbone: Interval
    backbone_spread: tuple[float, float]
    against_best: Interval | None
    best_spread: tuple[float, float] | None


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
    answers: dict[RowKey, tuple[SeedAnswers, SeedAnswers]] = {}
    for row, outcomes in with_outcomes(points, tests):
        images = outcomes.point.config.data.model_dump_json()
        both = (outcomes.of(row)[0], outcomes.correct_RN[-1])
        ours, whole = (SeedAnswers(images, correct_N, outcomes.origin_N) for correct_N in both)
        answers[row.key] = ours, whole
    return [one for budget, by_method in chosen.items() for one in _at_budget(budget, by_method, answers)]


def _at_budget(
    budget: float,
    by_method: Mapping[str, tuple[FrontPoint, ...]],
    answers: Mapping[RowKey, tuple[SeedAnswers, SeedAnswers]],
) -> Iterator[MethodAtBudget]:
    """`answers` are those of a point and of its backbone."""
    best = max(by_method, key=lambda method: fmean(point.validation.accuracy for point in by_method[method]))
    seeds = {point.test.seed: answers[point.test.key][0] for point in by_method[best]}
    for method, bought in by_method.items():
        ours, whole = zip(*(answers[point.test.key] for point in bought), strict=True)
        gains = [gain(*both) for both in zip(ours, whole, strict=True)]
        base = paired(ours, whole)
        assert base is not None
        pairs = [(one, seeds.get(point.test.seed)) for one, point in zip(ours, bought, strict=True)]
        is_random = max(num_distinct(ours), num_distinct(list(seeds.values()))) > 1
        spread = [gain(a, b) for a, b in pairs if b is not None and a.images == b.images]
        yield MethodAtBudget(
            budget,
            method,
            bought,
            num_distinct(ours),
            base,
            (min(gains), max(gains)),
            None if method == best else paired(ours, list(seeds.values())),
            (min(spread), max(spread)) if method != best and spread and is_random else None,
        )


def methods_section(found: Sequence[MethodAtBudget]) -> list[PageSection]:
    """The page's part on methods at equal budgets; nothing without any."""
    same = SAME_ANSWERS if any(one.num_distinct < len(one.points) for one in found) else ""
    return [PageSection("Methods at equal budgets", _WHAT + same, [_cells(one) for one in found])] if found else []


def _cells(one: MethodAtBudget) -> dict[str, str]:
    tests = [point.test for point in one.points]
    accuracies = [row.accuracy for row in tests]
    cells = {
        "budget": f"{one.budget:g}",
        "method": one.method,
        "seeds": count_text(len(tests), one.num_distinct),
        "relative MACs": f"{fmean(row.relative_macs for row in tests):.3f}",
        "test accuracy": percent_range(accuracies if one.num_distinct > 1 else accuracies[:1]),
        "vs backbone, points": difference_text(one.against_backbone)
        + points_range(*one.backbone_spread, one.num_distinct),
        "against it": verdict(one.against_backbone),
        "vs best, points": "the best on validation" if one.against_best is None else difference_text(one.against_best),
        "against the best": "" if one.against_best is None else verdict(one.against_best),
    }
    if one.best_spread is not None:
        cells["vs best, points"] += points_range(*one.best_spread, len(tests))
    return cells
