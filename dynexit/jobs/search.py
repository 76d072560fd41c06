"""The search job: from a point's records to its configurations, point by point or several at a time."""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

from dynexit.baselines.search import search_networks
from dynexit.errors import end_if_stopped
from dynexit.jobs.finished import SPLITS, recorded_splits
from dynexit.progress import Progress
from dynexit.record.shards import Record
from dynexit.run_dir import BUDGETS, HEADS, RunDir
from dynexit.search.budgets import Budget, Unattainable, budgets_of, latency_costs
from dynexit.search.driver import SearchDriver, SearchEntry, SearchRequest
from dynexit.search.held_back import calibration_samples
from dynexit.search.methods import fixed_configurations
from dynexit.search.problem import Problem
from dynexit.study.grid import Point
from dynexit.study.keys import parse_weights
from dynexit.study.methods import METHODS

CONFIGURATIONS, FIXED = "configurations.json", "fixed.json"


def run_search(points: Sequence[Point]) -> None:
    """Finds exit configurations for preferences and budgets from records alone; chosen on validation, judged on test.

    Leaves configurations.json, budgets.json and fixed.json per point, networks.json per static network; notes a budget
    that a point cannot attain. The result does not depend on the number of processes.
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
    if point.networks:
        return search_networks(point)
    settings = point.config.search
    source, checkpoint = RunDir(point, "record"), RunDir(point, "train").digest(HEADS)
    costs = source.costs()
    problems = {
        split: Problem.from_record(Record.open(source / split, checkpoint), costs, settings.confidence)
        for split in recorded_splits(point.config.record)
        if split != "train" or settings.risk is not None
    }
    held_back = calibration_samples(point.config.data, settings.calibration_share, problems["validation"].num_samples)
    problems["validation"] = problems["validation"].of(~held_back)
    how = SearchRequest(
        accuracy_weights=parse_weights(settings.accuracy_weights),
        budgets=budgets_of(dict(settings)),
        risk=settings.risk,
        risk_confidence=settings.risk_confidence,
        method=settings.method,
        normalize=settings.normalize,
        refine=settings.refine,
        starts=settings.num_random_starts,
        additive=METHODS[point.config.train.method].is_additive,
    )
    times = None if settings.latency is None else latency_costs(settings.latency, costs)
    driver = SearchDriver({split: problems[split] for split in SPLITS}, how, times)
    budgets = [_budget_json(*each) for each in zip(how.budgets, driver.budgets(), strict=True)]
    if settings.risk is not None:
        budgets.append(_entry_json(driver.risk(problems["train"], problems["validation"])))
    fixed = [driver.entry(found) for found in fixed_configurations(problems["validation"])]
    directory = RunDir(point, "search")
    directory.write_json(CONFIGURATIONS, [_entry_json(entry) for entry in driver.weights()])
    directory.write_json(BUDGETS, budgets)
    directory.write_json(FIXED, [_judged_json(replace(entry, relative_latency=None)) for entry in fixed])
    directory.mark_done([CONFIGURATIONS, BUDGETS, FIXED])
    return problems["validation"].num_samples


def _budget_json(budget: Budget, entry: SearchEntry | Unattainable) -> dict[str, Any]:
    """The entry of a budget; if it is unattainable here, the error message instead of a configuration."""
    if isinstance(entry, Unattainable):
        return {"budget": {budget.kind: budget.value}, "unattainable": str(entry), "nearest": entry.nearest}
    return _entry_json(entry)


def _entry_json(entry: SearchEntry) -> dict[str, Any]:
    if entry.asked is None:
        return {"accuracy_weight": entry.accuracy_weight, "objective": entry.objective, **_judged_json(entry)}
    return {"budget": entry.asked, "accuracy_weight": entry.accuracy_weight, **_judged_json(entry)}


def _judged_json(entry: SearchEntry) -> dict[str, Any]:
    judged: dict[str, Any] = {"exits": entry.configuration.to_json()}
    for split, point in entry.points.items():
        judged[split] = {
            "accuracy": point.accuracy,
            "macs": point.macs,
            "relative_macs": point.relative_macs,
            "exit_fractions": list(point.exit_fractions),
        }
        for name, values in (("risk", entry.risk), ("relative_latency", entry.relative_latency)):
            if values is not None:
                judged[split][name] = values[split]
    return judged
