"""The search job: from a point's records to its configurations, point by point or several at a time."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from dynexit.core.cost import ExitCosts
from dynexit.errors import end_if_stopped
from dynexit.jobs.finished import recorded_splits
from dynexit.progress import Progress
from dynexit.record.shards import Record
from dynexit.run_dir import BUDGETS, COSTS, HEADS, RunDir
from dynexit.search.budgets import KINDS, Budget
from dynexit.search.held_back import calibration_samples
from dynexit.search.problem import Problem
from dynexit.search.study_points import PointSearch, Search, fixed_points
from dynexit.study.grid import Point
from dynexit.study.keys import parse_weights
from dynexit.study.methods import METHODS

CONFIGURATIONS, FIXED = "configurations.json", "fixed.json"


def run_search(points: Sequence[Point]) -> None:
    """Finds exit configurations for preferences and budgets from records alone; chosen on validation, judged on test.

    Leaves configurations.json, budgets.json and fixed.json per point; notes a budget that a point cannot attain. The
    result does not depend on the number of processes.
    """
    missing = [p for p in points if not RunDir(p, "search").is_done()]
    if missing:
        progress = Progress("search", missing[0].study_dir / "search", missing[0].config.dist.log_seconds)
        progress.start(len(missing))
        for num_samples in _search_all(missing):
            progress.advance(num_samples, {})
            end_if_stopped()
        progress.finish()


def _search_all(points: Sequence[Point]) -> Iterator[int]:
    workers = min(points[0].config.search.workers, len(points))
    if workers == 1:
        yield from (_search_point(point) for point in points)
        return
    # forked processes would inherit torch's and numba's threads in whatever state they are
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as processes:
        yield from processes.map(_search_point, points)


def _search_point(point: Point) -> int:
    """Searches one point; the number of samples it was searched on."""
    settings = point.config.search
    source, checkpoint = RunDir(point, "record"), RunDir(point, "train").digest(HEADS)
    costs = ExitCosts.from_json(source.read_json(COSTS))
    problems = {
        split: Problem.from_record(Record.open(source / split, checkpoint), costs, settings.confidence)
        for split in recorded_splits(point.config.record)
        if split != "train" or settings.risk is not None
    }
    held_back = calibration_samples(point.config.data, settings.calibration_share, problems["validation"].num_samples)
    problems["validation"] = problems["validation"].of(~held_back)
    how = Search(
        method=settings.method,
        normalize=settings.normalize,
        refine=settings.refine,
        starts=settings.num_random_starts,
        additive=METHODS[point.config.train.method].is_additive,
        latency=settings.latency,
    )
    asked = [Budget(kind, value) for kind in KINDS for value in getattr(settings, kind)]
    weights = parse_weights(settings.accuracy_weights)
    search = PointSearch(problems["validation"], problems["test"], how, weights, asked)
    budgets = search.budgets()
    if settings.risk is not None:
        budgets.append(search.risk(problems["train"], settings.risk, settings.risk_confidence))
    directory = RunDir(point, "search")
    directory.write_json(CONFIGURATIONS, search.weights())
    directory.write_json(BUDGETS, budgets)
    directory.write_json(FIXED, fixed_points(problems["validation"], problems["test"]))
    directory.mark_done([CONFIGURATIONS, BUDGETS, FIXED])
    return problems["validation"].num_samples
