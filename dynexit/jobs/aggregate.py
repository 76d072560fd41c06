"""Operating points of any number of studies as one table, from whatever of them is finished by now."""

import csv
import io
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from dynexit.errors import Failure, UserError
from dynexit.jobs.finished import finished_jobs
from dynexit.jobs.reporting.rows import collect_rows
from dynexit.run_dir import STUDY, RunDir
from dynexit.search.operating_points import write_csv
from dynexit.study.read import load_study


def study_folders(directories: Sequence[Path]) -> list[Path]:
    """The folders of studies that `directories` are or hold, each once. Raises UserError for one without any."""
    found: dict[Path, Path] = {}
    for directory in directories:
        folders = sorted(path.parent for path in directory.rglob(STUDY))
        if not folders:
            raise UserError(f"there is no study in {directory}; give a folder that holds a {STUDY}, or runs/")
        found |= {folder.resolve(): folder for folder in folders}
    return list(found.values())


def aggregate(directories: Sequence[Path], say: Callable[[str], None]) -> tuple[str, list[Path]]:
    """CSV: a row per operating point and split of every finished point, the study's folder first; and who is not in it.

    `on_front` is within the study. Columns that a study does not have are empty. `say` receives how much of each study
    is included, and why one is left out.
    """
    rows: list[dict[str, str]] = []
    left_out = []
    for folder in study_folders(directories):
        try:
            rows += _rows(folder, say)
        except (Failure, UserError, OSError) as fault:
            say(f"{folder}: left out, since {fault}")
            left_out.append(folder)
    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue(), left_out


def _rows(folder: Path, say: Callable[[str], None]) -> list[dict[str, str]]:
    points = load_study(folder / STUDY).at(folder).points
    ready = [point for point in points if "search" in finished_jobs(point)]
    say(f"{folder}: {len(ready)} of {len(points)} points are finished")
    for point, stage in itertools.product(ready, ("record", "search")):
        RunDir(point, stage).is_done()  # raises where a file is missing
    if not ready:
        return []
    with tempfile.TemporaryDirectory() as scratch:
        write_csv(Path(scratch) / "rows.csv", collect_rows(ready))
        with (Path(scratch) / "rows.csv").open(encoding="utf-8", newline="") as file:
            return [{"study": str(folder), **row} for row in csv.DictReader(file)]
