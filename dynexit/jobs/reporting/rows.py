"""Operating points of a study's points from their records and configurations.

Shapes: N samples, L exits.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dynexit.baselines.rows import Baseline
from dynexit.contents import Found
from dynexit.core.cost import ExitCosts
from dynexit.core.exit_policy import exit_index_from_gates
from dynexit.core.tradeoff import OperatingPoint, operating_point
from dynexit.jobs.finished import SPLITS, measured_times
from dynexit.record.shards import Record
from dynexit.report.budgets import budget_text
from dynexit.report.judged.outcomes import choosing_samples
from dynexit.report.table import mark_front
from dynexit.report.times import PointTimes, with_times
from dynexit.run_dir import RunDir
from dynexit.search.operating_points import ReportRow
from dynexit.study.grid import Point


def collect_rows(points: Sequence[Point], baselines: Iterable[Baseline]) -> list[ReportRow]:
    """Operating points of all `points` and of `baselines` on both splits, `on_front` marked."""
    rows: list[ReportRow] = []
    seen: set[tuple[str, str]] = set()  # backbones serve many points, and a training many searches
    for point in points:
        source = RunDir(point, "record")
        costs = source.costs()
        for split in SPLITS:
            record = Record.open(source / split)
            samples = choosing_samples(point, split, record.num_samples)
            if (point.ids["prepare"], split) not in seen:
                rows.append(_backbone_row(point, split, record, costs, samples))
            if record.gate is not None and (point.id, split) not in seen:
                rows.append(_gates_row(point, split, record, costs, samples))
            seen |= {(point.ids["prepare"], split), (point.id, split)}
        files = [("search", "configurations.json"), ("search", "budgets.json"), ("fixed", "fixed.json")]
        files += [("search", "by_time.json")] if point.is_by_time else []
        searched: list[ReportRow] = []
        for source_name, file in files:
            known = {row.configuration for row in searched} if file == "by_time.json" else set()
            found = _configuration_rows(point, source_name, entries_of_search(point, file))
            searched += [row for row in found if row.configuration not in known]
        rows += searched
    for baseline in baselines:
        rows += [baseline.validation, baseline.test]
    return mark_front(with_times(rows, point_times(points)))


def point_times(points: Sequence[Point]) -> dict[str, PointTimes]:
    """The times that the points' searches read, by the ids of their rows; nothing of points searched by MACs alone."""
    found: dict[str, PointTimes] = {}
    for point in points:
        if point.is_by_time:
            times = PointTimes(measured_times(point, "search"), point.config.search.confidence == "gate")
            for stage in ("search", "train", "prepare"):
                found.setdefault(point.ids[stage], times)
    return found


def _row(point: Point, source: str, split: str, measured: OperatingPoint, **more: object) -> ReportRow:
    own = {
        "method": point.method,
        "seed": point.config.seed,
        "ce_ic_tradeoff": point.config.jei_dnn.ce_ic_tradeoff if point.config.train.method == "jei_dnn" else None,
        "accuracy_weight": None,
        "point_id": point.id,
        **more,
    }
    return ReportRow.of(measured, source=source, split=split, **own)


def _backbone_row(point: Point, split: str, record: Record, costs: ExitCosts, samples_N: np.ndarray) -> ReportRow:
    """The bare backbone: everybody goes to the end and no head is computed."""
    correct_LN = record.correct_RN[_one_head_rows(costs)][:, samples_N]
    macs_L = np.array([*costs.backbone_macs, costs.full_macs], dtype=np.int64)
    last_N = np.full(correct_LN.shape[1], len(macs_L) - 1, dtype=np.int64)
    measured = operating_point(last_N, correct_LN, macs_L, costs.full_macs)
    anonymous = {"method": "backbone", "seed": None, "ce_ic_tradeoff": None, "point_id": point.ids["prepare"]}
    return _row(point, "backbone", split, measured, **anonymous)


def _gates_row(point: Point, split: str, record: Record, costs: ExitCosts, samples_N: np.ndarray) -> ReportRow:
    exit_N = exit_index_from_gates(torch.from_numpy(np.ascontiguousarray(record.gate))).numpy()[samples_N]
    correct_LN = record.correct_RN[_one_head_rows(costs)][:, samples_N]
    measured = operating_point(exit_N, correct_LN, costs.macs_L(), costs.full_macs)
    return _row(point, "gates", split, measured)


def _one_head_rows(costs: ExitCosts) -> list[int]:
    """The rows of the first head type at every position, then the backbone's."""
    num_types = len(costs.head_types)
    return [p * num_types for p in range(len(costs.positions))] + [-1]


def entries_of_search(point: Point, file: str) -> list[dict[str, Any]]:
    """What the point's search found, as `file` has it."""
    entries: list[dict[str, Any]] = RunDir(point, "search").read_json(file, list[Found])
    return entries


def _configuration_rows(point: Point, source: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[ReportRow]:
    for entry in entries:
        if "exits" not in entry:
            continue  # a budget that this point cannot attain
        for split in SPLITS:
            figures = entry[split]
            measured = OperatingPoint(
                accuracy=figures["accuracy"],
                macs=figures["macs"],
                relative_macs=figures["relative_macs"],
                exit_fractions=tuple(figures["exit_fractions"]),
                num_samples=0,
            )
            yield _row(
                point,
                source,
                split,
                measured,
                accuracy_weight=entry.get("accuracy_weight"),
                search_id=point.ids["search"],
                configuration=json.dumps(entry["exits"], separators=(",", ":")),
                budget=budget_text(entry["budget"]) if "budget" in entry else "",
                time_batch_size=entry.get("batch_size", entry.get("budget", {}).get("batch_size")),
            )
