"""The page's part on single classes, and classes.csv.

Shapes: N samples, K classes.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynexit.core.statistics import accuracy_interval, paired_interval
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
    "with its 95 % interval) and the mean MACs, which show how hard the class is. {shown}A class has few images, so "
    "most single differences are luck. {file} has all."
)


@dataclass(frozen=True)
class ClassAnswers:
    """Of N samples: the class, whether the point and its backbone are right, the MACs over the backbone's, and the
    original."""

    label_N: np.ndarray
    correct_N: np.ndarray
    base_N: np.ndarray
    relative_macs_N: np.ndarray
    origin_N: np.ndarray


def classes_section(
    point: Point, title: str, row: ReportRow, names: Sequence[str] | None, directory: Path
) -> PageSection:
    """The section on the test row `row`, worst loss first, 20 classes at most; writes classes.csv."""
    outcomes = Outcomes(point, "test")
    correct_N, macs_N = outcomes.of(row)
    answers = ClassAnswers(
        np.asarray(outcomes.record.label)[outcomes.kept_N],
        correct_N,
        outcomes.correct_RN[-1],
        macs_N / outcomes.costs.full_macs,
        outcomes.origin_N,
    )
    table = class_table(answers, names)
    _write(directory / CLASSES_CSV, table)
    table.sort(key=lambda cells: (cells["accuracy"] - cells["backbone_accuracy"], cells["class"]))
    shown = f"The {_MOST_ROWS} of {len(table)} classes that lose most. " if len(table) > _MOST_ROWS else ""
    remark = _WHAT.format(title=title, shown=shown, file=CLASSES_CSV)
    return PageSection("Classes", remark, [_cells(one, answers) for one in table[:_MOST_ROWS]])


def class_table(answers: ClassAnswers, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """The rows of classes.csv: every class that has images, by label."""
    num_classes = int(answers.label_N.max()) + 1
    weights = (np.ones(len(answers.label_N)), answers.correct_N, answers.base_N, answers.relative_macs_N)
    count_K, right_K, base_K, macs_K = (
        np.bincount(answers.label_N, weights=values_N, minlength=num_classes) for values_N in weights
    )
    return [
        {
            "class": label,
            "name": names[label] if names else "",
            "images": int(count_K[label]),
            "accuracy": float(right_K[label] / count_K[label]),
            "backbone_accuracy": float(base_K[label] / count_K[label]),
            "relative_macs": float(macs_K[label] / count_K[label]),
        }
        for label in np.flatnonzero(count_K).tolist()
    ]


def _cells(one: dict[str, Any], answers: ClassAnswers) -> dict[str, Any]:
    mask_N = answers.label_N == one["class"]
    correct_N, origin_N = answers.correct_N[mask_N], answers.origin_N[mask_N]
    difference = paired_interval(correct_N, answers.base_N[mask_N], origin_N)
    return {
        "class": one["name"] or str(one["class"]),
        "images": one["images"],
        "accuracy": share_text(accuracy_interval(correct_N, origin_N)),
        "vs backbone, points": difference_text(difference),
        "relative MACs": f"{one['relative_macs']:.3f}",
    }


def _write(path: Path, table: Sequence[dict[str, Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: spreadsheet_text(value) for name, value in cells.items()} for cells in table)
