"""How long a large study takes to get into MLflow: python -m tests.benchmarks.tracking [POINTS] [ROWS].

Each point has 1,000 rows of one figure. Prints the seconds of the first report, of the same report again, which must
write nothing, and of a report after one point changed.
"""

import sys
import tempfile
import time
from pathlib import Path

from dynexit.report.tracking import TrackedPoint, default_tracking_uri, log_study


def main(num_points: int = 1000, num_rows: int = 1000) -> None:
    points: list[TrackedPoint] = [
        {
            "id": f"p{i}",
            "params": {"seed": i, "jei_dnn.ce_ic_tradeoff": 0.1},
            "metrics": {"final/test_accuracy": i / num_points},
            "history": {"train_head_loss": [(epoch, 1 / (1 + epoch + i)) for epoch in range(num_rows)]},
        }
        for i in range(num_points)
    ]
    with tempfile.TemporaryDirectory() as folder:
        report_dir = Path(folder) / "report"
        report_dir.mkdir()
        for what in ("first report", "again, unchanged", "again, one point changed"):
            begun, used = time.monotonic(), time.process_time()
            log_study(default_tracking_uri(Path(folder)), {"id": "s", "name": "digits"}, points, report_dir)
            seconds, used = time.monotonic() - begun, time.process_time() - used
            print(f"{what}: {num_points} points x {num_rows} rows in {seconds:.1f} s ({used:.1f} s of the processor)")
            if what.startswith("again"):
                points[0] = {**points[0], "metrics": {"final/test_accuracy": 2.0}}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
