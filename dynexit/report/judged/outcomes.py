"""Operating points on the recorded samples: whether each sample is right, what it costs, and the intervals of both.

Shapes: N samples of a split, R rows of a record.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dynexit.core.exit_policy import exit_index_from_gates
from dynexit.core.statistics import Interval, accuracy_interval, mean_interval, paired_interval, verdict
from dynexit.core.tradeoff import Configuration, apply_configuration, configuration_macs_L
from dynexit.record.held_back import calibration_samples, originals
from dynexit.record.shards import Record
from dynexit.run_dir import RunDir
from dynexit.search.operating_points import BASELINES, ReportRow, RowKey
from dynexit.search.problem import Problem
from dynexit.study.grid import Point


@dataclass(frozen=True)
class Judgement:
    """The intervals of an operating point on one split. `difference` is its accuracy minus that of its backbone;
    `relative_macs` is None where it was not asked for."""

    accuracy: Interval
    difference: Interval
    relative_macs: Interval | None
    num_originals: int

    @property
    def verdict(self) -> str:
        """What the difference shows, in words."""
        return verdict(self.difference)


Judgements = Mapping[tuple[RowKey, str], Judgement]
"""Judgements by the key of an operating point and the split."""


def choosing_samples(point: Point, split: str, num_samples: int) -> np.ndarray:
    """Mask (N,) of a split's samples that its rows are made of: what is held back of validation chooses nothing."""
    if split != "validation":
        return np.ones(num_samples, dtype=bool)
    return ~calibration_samples(point.config.data, point.config.search.calibration_share, num_samples)


@dataclass(frozen=True)
class Route:
    """Where samples leave: the exit of each (N,), and for each of L exits its row of the record (-1 where none is
    enabled) and the MACs of leaving there."""

    exit_N: np.ndarray
    rows_L: np.ndarray
    macs_L: np.ndarray


class Outcomes:
    """What a point's record says of one split. Of validation only the samples that choose operating points count."""

    def __init__(self, point: Point, split: str) -> None:
        source = RunDir(point, "record")
        self.point, self.costs = point, source.costs()
        self.record = Record.open(source / split)
        num_samples = self.record.num_samples
        self.kept_N = choosing_samples(point, split, num_samples)
        self.origin_N = originals(point.config.data, split, num_samples)[self.kept_N]

    @cached_property
    def correct_RN(self) -> np.ndarray:  # noqa: N802
        """Whether each head is right, the backbone's own classifier last."""
        return self.record.correct_RN[:, self.kept_N]

    @cached_property
    def _problem(self) -> Problem:
        problem = Problem.from_record(self.record, self.costs, self.point.config.search.confidence)
        return problem if self.kept_N.all() else problem.of(self.kept_N)

    def route(self, row: ReportRow) -> "Route":
        """Where each sample leaves under the operating point."""
        num_samples, last = self.correct_RN.shape[1], len(self.costs.positions)
        heads = np.zeros(last, dtype=np.int64)
        if row.source == "backbone":
            exit_N, macs_L = np.full(num_samples, last), np.full(last + 1, self.costs.full_macs)
        elif row.configuration:
            way, problem = Configuration.from_json(json.loads(row.configuration)), self._problem
            exit_N, _ = apply_configuration(way, problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N)
            heads, macs_L = np.array([head for head, _ in way.exits]), configuration_macs_L(way, problem.costs)
        else:
            gate = torch.from_numpy(np.ascontiguousarray(self.record.gate))
            exit_N, macs_L = exit_index_from_gates(gate).numpy()[self.kept_N], self.costs.macs_L()
        rows_P = np.where(heads < 0, -1, np.arange(last) * len(self.costs.head_types) + heads)
        return Route(exit_N, np.append(rows_P, len(self.correct_RN) - 1), macs_L)

    def of(self, row: ReportRow) -> tuple[np.ndarray, np.ndarray]:
        """Whether the operating point is right on each sample (N,), and the MACs of each (N,)."""
        route = self.route(row)
        correct_N = self.correct_RN[route.rows_L[route.exit_N], np.arange(len(route.exit_N))]
        return correct_N, route.macs_L[route.exit_N]

    def judge(self, row: ReportRow, with_macs: bool = True) -> Judgement:
        """The intervals of one operating point."""
        correct_N, macs_N = self.of(row)
        return Judgement(
            accuracy_interval(correct_N, self.origin_N),
            self.difference(correct_N),
            mean_interval(macs_N / self.costs.full_macs, self.origin_N) if with_macs else None,
            len(np.unique(self.origin_N)),
        )

    def difference(self, correct_N: np.ndarray) -> Interval:
        """The accuracy of these answers minus that of the backbone's own, on the same samples."""
        return paired_interval(correct_N, self.correct_RN[-1], self.origin_N)


def judge(
    points: Sequence[Point], rows: Iterable[ReportRow], with_macs: Collection[RowKey] | None = None
) -> Judgements:
    """The judgements of the operating points in `rows`, which are the points' own. The intervals of MACs take most of
    the time; with `with_macs` only those points have one.
    """
    return {
        (row.key, row.split): outcomes.judge(row, with_macs is None or row.key in with_macs)
        for row, outcomes in with_outcomes(points, rows)
    }


def with_outcomes(points: Sequence[Point], rows: Iterable[ReportRow]) -> Iterator[tuple[ReportRow, Outcomes]]:
    """Each operating point in `rows` that is the points' own, once, and its record's outcomes; record by record, so
    that one at a time is held in memory.
    """
    by_id = {identity: point for point in reversed(points) for identity in point.ids.values()}
    own = {(row.key, row.split): row for row in rows if row.source not in BASELINES}
    current: tuple[tuple[str, ...], Outcomes] | None = None
    for row in sorted(own.values(), key=lambda row: _group(by_id[row.chosen_by], row)):
        point = by_id[row.chosen_by]
        group = _group(point, row)
        if current is None or current[0] != group:
            current = group, Outcomes(point, row.split)
        yield row, current[1]


def _group(point: Point, row: ReportRow) -> tuple[str, ...]:
    return point.ids["record"], point.ids["search"], row.split
