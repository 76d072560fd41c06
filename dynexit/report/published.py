"""Operating points that others recorded, to draw beside a study's own."""

import csv
from dataclasses import dataclass
from pathlib import Path

from dynexit.errors import UserError


@dataclass(frozen=True)
class PublishedPoint:
    """`accuracy` in [0, 1]; `relative_macs` over the same authors' cost of their full backbone, by their counter."""

    method: str
    accuracy: float
    relative_macs: float


def read_published(path: Path, folder: str, full_cost: float) -> list[PublishedPoint]:
    """The points of one `folder` (data set and backbone) of a published_*.csv, by rising cost.

    Read are the columns `folder` and, under the names of either file, the accuracy in percent on the whole test set,
    the mean cost and the method (`jei_dnn` where there is no such column). `full_cost` is the full backbone's cost in
    the file's unit: the authors count a linear layer for one token, so only their relative costs can be compared.
    Raises UserError where the file has no such column or folder.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    accuracy = _column(path, columns, "acc_whole_test(last)", "acc_mean_of_10_splits")
    cost = _column(path, columns, "cost_whole_test", "cost_Mops")
    of = _column(path, columns, "folder")
    points = [
        PublishedPoint(row.get("method") or "jei_dnn", float(row[accuracy]) / 100, float(row[cost]) / full_cost)
        for row in rows
        if row[of] == folder
    ]
    if not points:
        known = ", ".join(sorted({row[of] for row in rows}))
        raise UserError(f"{path} has no points of {folder!r}; it has: {known}")
    return sorted(points, key=lambda point: (point.method, point.relative_macs))


def _column(path: Path, columns: list[str], *names: str) -> str:
    for name in names:
        if name in columns:
            return name
    raise UserError(f"{path} has no column {' or '.join(map(repr, names))}; its columns are: {', '.join(columns)}")
