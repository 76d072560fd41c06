"""Runs what a study chose by time on its test images: is it ever slower than the plain backbone, and as fast as said?

    OMP_NUM_THREADS=1 python tests/benchmarks/by_time.py runs/digits [--batch 64] [--points 12] [--rounds 7]

For each measured batch size a dozen configurations of the front by time, spread over it: realised is the plain
backbone's time over the engine's on the same batches in turn (medians of rounds, process time), predicted by the times
of stage bench for the exits that the images took, and by MACs. Exit status 1 if one chosen for its batch size is
slower than the plain backbone.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from dynexit.bench.measure import interleaved_seconds
from dynexit.core.tradeoff import Configuration
from dynexit.data import load_data
from dynexit.deploy.engine import Engine
from dynexit.dist import Ranks
from dynexit.jobs.finished import measured_times
from dynexit.jobs.load import load_heads, load_model, quickened
from dynexit.report.table import front_of
from dynexit.search.operating_points import ReportRow, read_csv
from dynexit.study.grid import Point
from launch.api import load_study


def spread(rows: list[ReportRow], batch: int, count: int) -> list[ReportRow]:
    """Validation rows of the front by time that were chosen for this batch size, evenly spread."""
    mine = [row for row in rows if row.time_batch_size == batch and row.configuration]
    front = [point.validation for point in front_of(mine, batch)]
    return [front[i] for i in sorted(set(np.linspace(0, len(front) - 1, min(count, len(front))).astype(int).tolist()))]


def measure(study_dir: Path, sizes: list[int], num_points: int, rounds: int) -> bool:
    """Prints a line for every configuration; whether one is slower than the plain backbone."""
    study = load_study(study_dir)
    by_search: dict[str, Point] = {point.ids["search"]: point for point in study.points}
    rows = read_csv(study.directory / "report" / "operating_points.csv")
    any_slower = False
    data = load_data(study.points[0].config.data)
    images = data.test.__getitems__(list(range(min(len(data.test), 4096))))[1]
    engines: dict[str, Engine] = {}
    tables = {identity: measured_times(point, "search") for identity, point in by_search.items()}
    for batch in sizes or next(iter(tables.values())).batch_sizes:
        batches = [part for part in torch.split(images, batch) if len(part) == batch][: max(8, 128 // batch)]
        seen = []
        for row in spread(rows, batch, num_points):
            point, table = by_search[row.chosen_by], tables[row.chosen_by]
            if point.id not in engines:
                model, costs = load_model(point, Ranks(0, 1, torch.device("cpu")))
                model = quickened(model, point.config.exits)
                engines[point.id] = Engine(model, costs.head_types, *load_heads([point], model))
            engine = engines[point.id]
            way = Configuration.from_json(json.loads(row.configuration))
            router = engine.router(way, point.config.search.confidence)
            taken = np.concatenate([router.classify(part).exit_index_B for part in batches])
            shares = (np.bincount(taken, minlength=len(table.positions) + 1) / len(taken)).tolist()
            with torch.inference_mode():
                seconds = interleaved_seconds(
                    [
                        lambda engine=engine, batches=batches: [engine.plain(part) for part in batches],
                        lambda router=router, batches=batches: [router.classify(part) for part in batches],
                    ],
                    torch.device("cpu"),
                    1,
                    rounds,
                )
            realised = float(np.median(seconds[:, 0] / seconds[:, 1]))
            predicted = 1 / table.relative([head for head, _ in way.exits], shares, batch)
            seen.append(realised / predicted)
            slower = realised < 1
            any_slower |= slower
            print(
                f"batch {batch}: validation accuracy {row.accuracy:.4f}, realised {realised:.3f}, predicted by time "
                f"{predicted:.3f}, realised / predicted {seen[-1]:.3f}, by MACs {1 / row.relative_macs:.3f}"
                + " SLOWER"
                * slower,
                flush=True,
            )
        if seen:
            print(f"batch {batch}: realised / predicted by time, median {np.median(seen):.3f}, least {min(seen):.3f}")
    return any_slower


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    parser.add_argument("--batch", type=int, nargs="*", default=[])
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.exit(measure(options.study, options.batch, options.points, options.rounds))


if __name__ == "__main__":
    main()
