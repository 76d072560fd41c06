"""Baselines as rows of the table of operating points, and whether each is right on test samples."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dynexit.baselines.cascades import Network, cascade_problem
from dynexit.baselines.search import NETWORKS, OWN, RecordedNetwork, confidence_of
from dynexit.baselines.thresholds import problem_of, threshold_rows
from dynexit.contents import JudgedNetworks, Networks
from dynexit.core.tradeoff import Configuration, apply_configuration, pareto_front
from dynexit.run_dir import RunDir
from dynexit.search.operating_points import ONE_THRESHOLD, ReportRow
from dynexit.search.problem import Problem
from dynexit.study.baselines import network_name, static_points
from dynexit.study.grid import Point


@dataclass(frozen=True)
class Baseline:
    """What a study is compared with: a static network, a cascade of several, or a point with one threshold."""

    head: str
    backbone: str
    """Id of the prepared backbone that it is compared with."""
    validation: ReportRow
    test: ReportRow
    correct: Callable[[], np.ndarray]
    """Whether it is right on each test sample (N,)."""


def baselines_of(points: Sequence[Point]) -> list[Baseline]:
    """Returns the baselines of a study's recorded points, of static networks those that are searched; of cascades and
    of single thresholds those that no other one with the same head beats on validation.
    """
    static = static_points(points)
    by_record = {point.ids["record"]: point for point in static}
    every = [one for point in static if RunDir(point, "search").is_done() for one in _networks(point, by_record)]
    trained = {point.id: point for point in points if point.config.baselines.one_threshold}
    every += [one for point in trained.values() for one in _thresholds(point)]
    found: dict[Any, Baseline] = {}
    for one in every:
        # points with other readers have the same own classifiers
        row = one.validation
        key = (row.source, one.backbone, one.head, row.configuration, one.test.accuracy, one.test.macs)
        found.setdefault(key, one)
    groups: dict[Any, list[Baseline]] = {}
    for one in found.values():
        alone = one.validation.point_id if one.validation.source == "static" else ""
        groups.setdefault((one.validation.source, one.backbone, one.head, alone), []).append(one)
    return [one for group in groups.values() for one in _front(group)]


def _front(group: Sequence[Baseline]) -> list[Baseline]:
    rows = [one.validation for one in group]
    mask = pareto_front([row.accuracy for row in rows], [row.macs for row in rows])
    return [one for one, kept in zip(group, mask, strict=True) if kept]


def _thresholds(point: Point) -> Iterator[Baseline]:
    for configuration, validation, test in threshold_rows(point):
        correct = partial(_correct_with_one, point, configuration)
        yield Baseline(validation.method, point.ids["prepare"], validation, test, correct)


def _correct_with_one(point: Point, configuration: Configuration) -> np.ndarray:
    return _applied(problem_of(point, "test"), configuration)


def _networks(point: Point, by_record: Mapping[str, Point]) -> Iterator[Baseline]:
    content: Networks = RunDir(point, "search").read_json(NETWORKS, Networks)
    backbone = by_record[point.networks[-1]].ids["prepare"]
    for entry in content["static"]:
        rows = _rows(point, "static", entry, [[network_name(point), None]])
        correct = partial(_correct_in_turn, point, [point.ids["record"]], entry["head"], Configuration(()))
        yield Baseline(entry["head"], backbone, *rows, correct)
    for entry in content["cascades"]:
        exits = Configuration.from_json(entry["exits"])
        names = [network_name(by_record[identity]) for identity in entry["networks"]]
        cells = []
        for name, (head, threshold) in zip(names, [*exits.exits, (0, -1.0)], strict=True):
            if head >= 0:  # the others are left out
                cells.append([name, None if threshold < 0 else threshold])
            if head >= 0 and threshold < 0:
                break  # everybody leaves here
        rows = _rows(point, "cascade", entry, cells)
        correct = partial(_correct_in_turn, point, entry["networks"], entry["head"], exits)
        yield Baseline(entry["head"], backbone, *rows, correct)


def _correct_in_turn(point: Point, networks: Sequence[str], head: str, exits: Configuration) -> np.ndarray:
    """Of networks that run in turn, by the ids of their records; a threshold for each but the last."""
    recorded = [RecordedNetwork.of(point, identity) for identity in networks]
    confidence = confidence_of(point)
    parts = [Network.of(one.records["test"], *one.heads()[head], confidence) for one in recorded]
    return parts[0].correct_N if len(parts) == 1 else _applied(cascade_problem(parts), exits)


def _applied(problem: Problem, configuration: Configuration) -> np.ndarray:
    return apply_configuration(configuration, problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N)[1]


def _rows(point: Point, source: str, entry: JudgedNetworks, networks: list[Any]) -> tuple[ReportRow, ReportRow]:
    reader = point.config.exits.reader
    method = entry["head"] if entry["head"] == OWN or reader is None else f"{entry['head']} on {reader}"
    stage = "prepare" if entry["head"] == OWN else "train"
    validation, test = (
        ReportRow(
            source=source,
            method=method,
            seed=None,
            ce_ic_tradeoff=None,
            accuracy_weight=None,
            split=split,
            accuracy=entry[split]["accuracy"],
            macs=entry[split]["macs"],
            relative_macs=entry[split]["relative_macs"],
            exit_fractions=tuple(entry[split]["exit_fractions"]),
            point_id=point.ids[stage],
            search_id=point.ids["search"] if source == "cascade" else "",
            configuration=json.dumps(networks),
        )
        for split in ("validation", "test")
    )
    return validation, test


def describe_baseline(row: ReportRow) -> str:
    """A baseline's row in words: its networks, or its threshold."""
    cells = json.loads(row.configuration)
    if row.source == ONE_THRESHOLD:
        return f"all exits above {cells[0][1]:.3g}"
    return ", else ".join(name if threshold is None else f"{name} above {threshold:.3g}" for name, threshold in cells)
