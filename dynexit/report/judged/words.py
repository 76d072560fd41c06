"""Intervals in words, and what a reader of a report should be warned of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import numpy as np

from dynexit.core.cost import place_name
from dynexit.core.statistics import Interval
from dynexit.errors import counted
from dynexit.report.judged.outcomes import Judgements, Outcomes
from dynexit.report.table import FrontPoint, backbone_accuracy
from dynexit.run_dir import RunDir
from dynexit.search.operating_points import ReportRow
from dynexit.study.grid import Point

FEW_ORIGINALS = 1000
_COLLAPSED = 0.9
_NAMED = 3
YES, NO, UNCLEAR = "yes", "no", "too few samples to tell"


def share_text(share: Interval) -> str:
    """An accuracy with its interval, as `98.17 % (96.42 to 99.07)`; it breaks before the bracket alone."""
    return _joined(f"{100 * share.value:.2f} %") + " " + _joined(f"({100 * share.low:.2f} to {100 * share.high:.2f})")


def difference_text(difference: Interval) -> str:
    """A difference of accuracies in points with its interval, as `+0.17 (−0.17, +0.50)`."""
    low, high = (f"{100 * limit:+.2f}" for limit in (difference.low, difference.high))
    return (f"{100 * difference.value:+.2f} " + _joined(f"({low}, {high})")).replace("-", "−")


def percent_range(shares: Sequence[float]) -> str:
    """The mean of accuracies with the least and the greatest, as `98.20 % (98.00 to 98.40)`; one alone."""
    low, high = (f"{100 * limit:.2f}" for limit in (min(shares), max(shares)))
    spread = " " + _joined(f"({low} to {high})") if len(shares) > 1 else ""
    return _joined(f"{100 * sum(shares) / len(shares):.2f} %") + spread


def points_range(low: float, high: float, count: int) -> str:
    """The spread of differences over `count` seeds, as `; seeds −0.17 to +0.50`; nothing for one."""
    return f"; seeds {100 * low:+.2f} to {100 * high:+.2f}".replace("-", "−") if count > 1 else ""


def _joined(text: str) -> str:
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def at_most(measured: Interval, limit: float) -> str:
    """Whether a figure keeps a limit: yes or no where the whole interval says so."""
    if measured.high <= limit:
        return YES
    return NO if measured.low > limit else UNCLEAR


def at_least(measured: Interval, limit: float) -> str:
    """Whether a figure reaches a limit; see `at_most`."""
    if measured.low >= limit:
        return YES
    return NO if measured.high < limit else UNCLEAR


def drop_to_test(front: Sequence[FrontPoint], rows: Sequence[ReportRow]) -> str:
    """The loss of accuracy from validation, which chose the points, to test, and the backbone's own; "" without any."""
    before, after = (backbone_accuracy(rows, split) for split in ("validation", "test"))
    drops = [100 * (point.validation.accuracy - point.test.accuracy) for point in front]
    if not drops or before is None or after is None:
        return ""
    own = 100 * (before - after)
    return (
        f"From validation, which chose the points, to test the front’s accuracies change by {-median(drops):+.2f} "
        f"points in the median, the backbone’s own by {-own:+.2f}."
    ).replace("-", "−")


def warnings(
    points: Sequence[Point],
    rows: Sequence[ReportRow],
    front: Sequence[FrontPoint],
    judged: Judgements,
) -> Iterator[str]:
    """What makes the figures misleading, a sentence each."""
    costs = {point.id: RunDir(point, "record").costs() for point in points}

    def names(row: ReportRow) -> list[str]:
        return [*map(place_name, costs[row.point_id].positions), "backbone"]

    labels = {point.id: point.label for point in points}
    outcomes = {split: Outcomes(points[0], split) for split in ("validation", "test")}
    yield from _few_originals(outcomes)
    yield from _collapsed(rows, labels, names)
    yield from _unused(front, names)
    yield from _better_exit(points)
    yield from _disagreement(front, judged)


def _few_originals(outcomes: Mapping[str, Outcomes]) -> Iterator[str]:
    for split, one in outcomes.items():
        count = len(np.unique(one.origin_N))
        if count < FEW_ORIGINALS:
            views = f" ({len(one.origin_N):,} views of them)" if len(one.origin_N) > count else ""
            yield (
                f"Few originals: {split} has {count} original images{views}, so an accuracy near 95 % is known to "
                f"about ± {100 * 1.96 * (0.95 * 0.05 / count) ** 0.5:.1f} points."
            )


def _collapsed(
    rows: Sequence[ReportRow], labels: Mapping[str, str], names: Callable[[ReportRow], list[str]]
) -> Iterator[str]:
    gates = [row for row in rows if row.source == "gates" and row.split == "test"]
    found: dict[str, list[str]] = {}
    for row in gates:
        for name, share in zip(names(row), row.exit_fractions, strict=True):
            if share > _COLLAPSED:
                found.setdefault(name, []).append(labels[row.point_id])
    for name, those in found.items():
        more = f" and {len(those) - _NAMED} more" if len(those) > _NAMED else ""
        yield (
            f"Gates collapsed: those of {len(those)} of {counted(len(gates), 'point')} send more than "
            f"{100 * _COLLAPSED:.0f} % of the test images to {_exit(name)} ({'; '.join(those[:_NAMED])}{more})."
        )


def _unused(front: Sequence[FrontPoint], names: Callable[[ReportRow], list[str]]) -> Iterator[str]:
    used: dict[str, bool] = {}
    for row in (point.test for point in front if point.test.source != "backbone"):
        for name, share in zip(names(row), row.exit_fractions, strict=True):
            used[name] = used.get(name, False) or share > 0
    unused = [_exit(name) for name, is_used in used.items() if not is_used]
    if unused:
        yield f"Unused: no point of the front lets a test image leave at {', '.join(unused)}."


def _better_exit(points: Sequence[Point]) -> Iterator[str]:
    """The exit that validation prefers to the backbone most is compared on test, so that one comparison is made."""
    best: tuple[float, Point, int] | None = None
    for point in {point.ids["record"]: point for point in points}.values():
        correct_RN = Outcomes(point, "validation").correct_RN
        gain_R = correct_RN[:-1].mean(1) - correct_RN[-1].mean()
        row = int(gain_R.argmax())
        if best is None or gain_R[row] > best[0]:
            best = float(gain_R[row]), point, row
    if best is None or best[0] <= 0:
        return
    _, point, row = best
    test = Outcomes(point, "test")
    difference = test.difference(test.correct_RN[row])
    if difference.low > 0:
        place = _exit(place_name(test.costs.positions[row // len(test.costs.head_types)]))
        yield (
            f"An exit is better than the backbone: if all test images left at {place} of {point.label}, accuracy would "
            f"change by {difference_text(difference)} points. The backbone’s own classifier may be fitted too little."
        )


def _disagreement(front: Sequence[FrontPoint], judged: Judgements) -> Iterator[str]:
    places = [[(point.test.key, split) for split in ("validation", "test")] for point in front]
    pairs = [[judged[place].difference for place in pair] for pair in places if all(place in judged for place in pair)]
    apart = sum(first.low > second.high or second.low > first.high for first, second in pairs)
    if apart:
        yield (
            f"Validation and test disagree: for {apart} of the front’s {counted(len(front), 'point')} the intervals of "
            "the difference to the backbone do not overlap. Validation chose them, which flatters it; or the splits "
            "differ."
        )


def _exit(name: str) -> str:
    return "the backbone’s classifier" if name == "backbone" else f"the exit after {name}"
