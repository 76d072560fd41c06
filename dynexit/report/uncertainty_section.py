"""The page's part on calibration and prediction sets: table, figure, and what can be promised of them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynexit.report.figures import uncertainty_figure
from dynexit.report.judged.outcomes import Judgements
from dynexit.report.judged.words import share_text
from dynexit.report.page import Figure, PageSection
from dynexit.report.table import at_tenths, percent
from dynexit.report.uncertainty import ALPHA, Uncertainty

_HEADING = "Calibration and prediction sets"
_WHAT = (
    "For points of the front, by relative MACs: expected calibration error (ECE, 15 bins) of the exits taken, over the "
    "whole test set, with bins of equal counts and of equal widths; the same with the logits of each exit divided by a "
    "temperature fitted on validation (scaled); and conformal sets made to hold the label of {level} of the samples, "
    "with one threshold for all exits (general) and with one per exit (from what leaves there, or from all where that "
    "is 20 samples or less). Coverage and, in brackets, the mean number of classes are of test; uncertainty.csv has "
    "all levels and exits. "
)
_SAME_DATA = (
    "Nothing of validation was held back (search.calibration_share is 0): the samples that chose thresholds and points "
    "also calibrate, so of these sets coverage is measured, not promised. Temperatures do not depend on thresholds."
)
_HELD_BACK = (
    "What calibrates is the share of validation, {share}, that no search saw and that chose no point "
    "(search.calibration_share); with samples that chose the thresholds, scores would look better than on new ones."
)
_BOUNDS = (
    " The record holds {topk} of {num_classes} classes: sizes are ranges where that leaves them open, and temperatures "
    "need all (record.topk={num_classes})."
)


def uncertainty_section(
    found: Sequence[Uncertainty], share: float, classes: tuple[int, int], path: Path, judged: Judgements
) -> PageSection:
    """The section on `found`, by rising cost. `share` of validation was held back, `classes` are (recorded, all).

    The figure is written to `path` and, for dark pages, beside it.
    """
    remark = _WHAT.format(level=percent(1 - ALPHA, 0))
    remark += _HELD_BACK.format(share=percent(share, 0)) if share else _SAME_DATA
    if classes[0] < classes[1]:
        remark += _BOUNDS.format(topk=classes[0], num_classes=classes[1])
    shown = at_tenths([one.point for one in found])
    table = [_cells(one, judged) for one in found if one.point in shown]
    return PageSection(_HEADING, remark, table, _figure(found, path))


def _cells(one: Uncertainty, judged: Judgements) -> dict[str, str]:
    temperatures = one.temperatures()
    row = one.point.test
    judgement = judged.get((row.key, row.split))
    cells = {
        "MACs": f"{row.relative_macs:.3f}",
        "accuracy": share_text(judgement.accuracy) if judgement else percent(row.accuracy),
        "ECE": _percent(one.get("ece_quantile")),
        "equal widths": _percent(one.get("ece_width")),
        "scaled": _percent(one.get("ece_quantile_scaled")),
        "temperatures": _range(min(temperatures), max(temperatures)) if temperatures else "",
        "general sets": _sets(one, "general"),
        "sets per exit": _sets(one, "gated"),
    }
    return {name: text.replace(" ", "\N{NO-BREAK SPACE}") for name, text in cells.items()}


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value)


def _sets(one: Uncertainty, variant: str) -> str:
    coverage, least, greatest = (
        one.get(name, variant, ALPHA) or 0.0 for name in ("coverage", "set_size", "greatest_set_size")
    )
    return f"{percent(coverage)} ({_range(least, greatest)})"


def _range(least: float, greatest: float) -> str:
    texts = dict.fromkeys((f"{least:.2f}", f"{greatest:.2f}"))
    return " to ".join(texts)


def _figure(found: Sequence[Uncertainty], path: Path) -> Figure:
    found = sorted(found, key=lambda one: one.point.test.relative_macs)
    cost_N = [one.point.test.relative_macs for one in found]

    def along(*which: Any) -> list[float]:
        values = [one.get(*which) for one in found]
        return [math.nan if value is None else value for value in values]

    errors = {"as trained": along("ece_quantile"), "with temperatures": along("ece_quantile_scaled")}
    coverages = {
        "one threshold (general)": along("coverage", "general", ALPHA),
        "a threshold per exit": along("coverage", "gated", ALPHA),
    }
    errors = {label: values for label, values in errors.items() if not all(map(math.isnan, values))}
    dark_path = path.with_stem(f"{path.stem}_dark")
    for theme, target in (("light", path), ("dark", dark_path)):
        uncertainty_figure(cost_N, errors, coverages, 1 - ALPHA, target, theme=theme)
    caption = "Along the front: ECE with bins of equal counts, and coverage of the sets, both on test."
    return Figure(path, "Calibration error and coverage along the front", caption, dark_path)
