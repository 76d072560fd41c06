"""How long `dynexit aggregate` takes for a large study: python -m tests.benchmarks.aggregate [POINTS] [ROWS].

Each point has that many operating points on each split. Prints seconds and the most memory of the process.
"""

import dataclasses
import resource
import sys
import tempfile
import time
from pathlib import Path

from dynexit.jobs.aggregate import aggregate
from dynexit.jobs.finished import report_identity
from dynexit.run_dir import RunDir, mark_done, write_json, write_text
from dynexit.search.operating_points import ReportRow, write_csv
from dynexit.study.grid import Study
from dynexit.study.read import load_study, resolved_yaml

ROOT = Path(__file__).parents[2]


def make(study: Study, num_rows: int) -> None:
    """A finished study, by its DONE files and the table of its report."""
    write_text(study.directory / "study.yaml", resolved_yaml(study, with_meanings=False))
    rows = []
    for number, point in enumerate(study.points):
        for stage in ("train", "record", "search"):
            write_json(RunDir(point, stage) / "DONE", {"id": point.ids[stage], "files": {}})
        for i in range(num_rows):
            one = ReportRow(
                source="search",
                method="jei_dnn",
                seed=point.config.seed,
                ce_ic_tradeoff=point.config.jei_dnn.ce_ic_tradeoff,
                accuracy_weight=i / num_rows,
                split="validation",
                accuracy=0.5 + i / (2 * num_rows) - number * 1e-6,
                macs=1000.0 * (i + 1),
                relative_macs=(i + 1) / num_rows,
                exit_fractions=(0.25, 0.25, 0.5),
                point_id=point.id,
                search_id=point.ids["search"],
                configuration="[]",
            )
            rows += [one, dataclasses.replace(one, split="test")]
    write_csv(study.directory / "report" / "operating_points.csv", rows)
    mark_done(study.directory / "report", report_identity(study.points), ["operating_points.csv"])


def main(num_points: int = 10_000, num_rows: int = 10) -> None:
    seeds = list(range(num_points // 100))
    grid = [f"sweep.seed={seeds}", f"sweep.jei_dnn.ce_ic_tradeoff={[i / 10 for i in range(100)]}"]
    with tempfile.TemporaryDirectory() as folder:
        study = load_study(ROOT / "tests" / "tiny_study.yaml", [*grid, f"runs_dir={folder}"])
        make(study, num_rows)
        del study
        before = _most_memory()
        begun, used = time.monotonic(), time.process_time()
        found = aggregate([Path(folder)], say=print)
        text = found.csv()
        seconds, used = time.monotonic() - begun, time.process_time() - used
    print(f"{num_points} points, {text.count(chr(10)) - 1} rows: {seconds:.1f} s ({used:.1f} s of the processor)")
    print(f"most memory {_most_memory():.2f} GB; before, with the study made, {before:.2f} GB")


def _most_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
