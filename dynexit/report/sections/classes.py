"""The page's part on single classes, and classes.csv."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynexit.core.statistics import accuracy_interval, mean_interval
from dynexit.files import spreadsheet_text
from dynexit.report.judged.outcomes import Outcomes
from dynexit.report.judged.words import difference_text, share_text
from dynexit.report.page import PageSection
from dynexit.run_dir import atomic_write
from dynexit.search.operating_points import ReportRow
from dynexit.study.grid import Point

CLASSES_CSV = "classes.csv"
_MOST_ROWS = 20
_WHAT = (
    "Of {title}, on the test images of each class: the accuracy, the difference to the backbone in points (paired, "
    "with its 95 % interval) and the mean MACs, which show how hard the class is. {shown} A class has few images, so "
    "most single differences are luck. {file} has all."
)


def classes_section(
    point: Point, title: str, row: ReportRow, names: Sequence[str] | None, directory: Path
) -> PageSection:
    """The section on the test row `row`, worst loss first, 20 classes at most; writes classes.csv."""
    outcomes = Outcomes(point, "test")
    label_N = np.asarray(outcomes.record.label)[outcomes.kept_N]
    correct_N, macs_N = outcomes.of(row)
    base_N = outcomes.correct_RN[-1]
    num_classes = int(outcomes.record.header["num_classes"])
    count_K, right_K, base_K, macs_K = (
        np.bincount(label_N, weights=values_N, minlength=num_classes)
        for values_N in (np.ones(len(label_N)), correct_N, base_N, macs_N / outcomes.costs.full_macs)
    )
    table: list[dict[str, Any]] = [
        {"class": label, "name": names[label] if names else "", "images": int(count_K[label])}
        | {
            name: float(sums_K[label] / count_K[label])
            for name, sums_K in (("accuracy", right_K), ("backbone_accuracy", base_K), ("relative_macs", macs_K))
        }
        for label in np.flatnonzero(count_K).tolist()
    ]
    _write(directory / CLASSES_CSV, table)
    table.sort(key=lambda cells: (cells["accuracy"] - cells["backbone_accuracy"], cells["class"]))
    shown = f"The {_MOST_ROWS} of {len(table)} classes that lose most." if len(table) > _MOST_ROWS else ""
    remark = _WHAT.format(title=title, shown=shown, file=CLASSES_CSV).replace("  ", " ")

    def cells(one: dict[str, Any]) -> dict[str, Any]:
        mask_N = label_N == one["class"]
        origin_N = outcomes.origin_N[mask_N]
        difference = mean_interval(correct_N[mask_N].astype(np.int64) - base_N[mask_N], origin_N)
        return {
            "class": one["name"] or str(one["class"]),
            "images": one["images"],
            "accuracy": share_text(accuracy_interval(correct_N[mask_N], origin_N)),
            "vs backbone, points": difference_text(difference),
            "relative MACs": f"{one['relative_macs']:.3f}",
        }

    return PageSection("Classes", remark, [cells(one) for one in table[:_MOST_ROWS]])


def _write(path: Path, table: Sequence[dict[str, Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: spreadsheet_text(value) for name, value in cells.items()} for cells in table)
