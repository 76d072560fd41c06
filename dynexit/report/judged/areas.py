"""Hypervolumes of a study's fronts, with intervals over the test images.

Shapes: K points of a front, N samples, G originals, R resamples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynexit.core.statistics import LEVEL
from dynexit.core.tradeoff import hypervolume
from dynexit.report.judged.outcomes import with_outcomes
from dynexit.report.page import PageSection
from dynexit.report.table import Hypervolume, front_of, summary
from dynexit.search.operating_points import BASELINES, ReportRow
from dynexit.study.grid import Point

NUM_RESAMPLES = 1000
_CHUNK = 50
_WHAT = (
    "Area under the front’s test accuracy, left of relative MACs 1 (at most 1, more is better), of all seeds together "
    "and of each alone.{} Compare only sources with the same number of points: a staircase’s area grows with its steps."
)
_COUNTS = ("one seed", "all seeds the same")
_BRACKETS = (
    " The brackets of the first are a 95 % bootstrap interval over the test images, for the points that validation "
    "chose."
)

Limits = Mapping[tuple[str, str], tuple[float, float]]
"""Intervals by source and method."""


def area_intervals(points: Sequence[Point], rows: Sequence[ReportRow]) -> Limits:
    """Returns the intervals of the hypervolumes of each source and method, all seeds together.

    Percentile bootstrap over original images, 1,000 resamples, in each the area of the same points. Nothing for fronts
    whose points were tested on different images.
    """
    fronts = {
        place: [point.test for point in front_of(row for row in rows if (row.source, row.method) == place)]
        for place in sorted({(row.source, row.method) for row in rows if row.source not in ("backbone", *BASELINES)})
    }
    sums: dict[Any, tuple[str, np.ndarray]] = {}
    for row, outcomes in with_outcomes(points, [row for front in fronts.values() for row in front]):
        correct_N, macs_N = outcomes.of(row)
        count_G = np.bincount(outcomes.origin_N)
        values = (correct_N, macs_N / outcomes.costs.full_macs, np.ones(len(correct_N)))
        sums_3G = np.stack([np.bincount(outcomes.origin_N, weights=one, minlength=len(count_G)) for one in values])
        sums[row.key] = outcomes.point.config.data.model_dump_json(), sums_3G
    by_images: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    for place, front in fronts.items():
        images = {sums[row.key][0] for row in front}
        if len(images) == 1:
            by_images.setdefault(images.pop(), {})[place] = np.stack([sums[row.key][1] for row in front])
    return {place: limits for own in by_images.values() for place, limits in intervals_of(own).items()}


def intervals_of(sums: Mapping[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], tuple[float, float]]:
    """The intervals of areas from the sums (K, 3, G) of correct answers, relative MACs and samples of each original."""
    num_originals = next(iter(sums.values())).shape[-1]
    random = np.random.default_rng(0)
    areas: dict[tuple[str, str], list[float]] = {place: [] for place in sums}
    for _ in range(NUM_RESAMPLES // _CHUNK):
        drawn_RG = random.integers(0, num_originals, (_CHUNK, num_originals))
        counts_RG = np.stack([np.bincount(drawn_G, minlength=num_originals) for drawn_G in drawn_RG]).astype(float)
        for place, sums_K3G in sums.items():
            correct_RK, macs_RK, count_RK = (counts_RG @ sums_K3G[:, which].T for which in range(3))
            areas[place] += [
                float(hypervolume(accuracy_K, cost_K))
                for accuracy_K, cost_K in zip(correct_RK / count_RK, macs_RK / count_RK, strict=True)
            ]
    limits = {place: np.quantile(own, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) for place, own in areas.items()}
    return {place: (float(low), float(high)) for place, (low, high) in limits.items()}


def hypervolume_section(rows: Sequence[ReportRow], limits: Limits | None = None) -> list[PageSection]:
    """The page's part on hypervolumes; nothing without any."""
    table = [_cells(area, (limits or {}).get((area.source, area.method))) for area in summary(rows).hypervolumes]
    remark = _WHAT.format(_BRACKETS if limits else "")
    return [PageSection("Hypervolume", remark, table)] if table else []


def _cells(area: Hypervolume, limits: tuple[float, float] | None) -> dict[str, str]:
    low, high = min(area.per_seed), max(area.per_seed)
    mean = sum(area.per_seed) / len(area.per_seed)
    return {
        "source": area.source,
        "method": area.method,
        "all seeds together": f"{area.all_seeds:.4f}" + (f" ({limits[0]:.4f} to {limits[1]:.4f})" if limits else ""),
        "mean over seeds (least to greatest)": f"{mean:.4f}"
        + (f" ({low:.4f} to {high:.4f})" if low < high else f", {_COUNTS[len(area.per_seed) > 1]}"),
    }
