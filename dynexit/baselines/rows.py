"""Static networks and cascades as rows of the table of operating points, and whether each is right on test samples."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynexit.baselines.cascades import Network, cascade_problem
from dynexit.baselines.search import NETWORKS, OWN, RecordedNetwork, confidence_of
from dynexit.contents import JudgedNetworks, Networks
from dynexit.core.tradeoff import Configuration, apply_configuration, pareto_front
from dynexit.run_dir import RunDir
from dynexit.search.operating_points import ReportRow
from dynexit.study.baselines import network_name, static_points
from dynexit.study.grid import Point


@dataclass(frozen=True)
class Baseline:
    """A static network, or a cascade of several: its rows on validation and test."""

    point: Point
    head: str
    networks: tuple[str, ...]
    """Ids of the networks' records, in the order in which they run."""
    exits: Configuration
    """A threshold for every network but the last."""
    backbone: str
    """Id of the prepared backbone that it is compared with."""
    validation: ReportRow
    test: ReportRow

    def correct(self) -> np.ndarray:
        """Whether it is right on each test sample (N,)."""
        recorded = [RecordedNetwork.of(self.point, identity) for identity in self.networks]
        confidence = confidence_of(self.point)
        parts = [Network.of(one.records["test"], *one.heads()[self.head], confidence) for one in recorded]
        if len(parts) == 1:
            return parts[0].correct_N
        problem = cascade_problem(parts)
        arrays = problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N
        return apply_configuration(self.exits, *arrays)[1]


def baselines_of(points: Sequence[Point]) -> list[Baseline]:
    """Returns the baselines of a study's points, so far as they are searched; of its cascades those that no other one
    with the same head beats on validation.
    """
    static = static_points(points)
    by_record = {point.ids["record"]: point for point in static}
    found: dict[Any, Baseline] = {}
    for point in static:
        if RunDir(point, "search").is_done():
            for one in _baselines(point, by_record):
                # points with other readers have the same own classifiers
                key = (one.backbone, one.head, one.validation.configuration, one.test.accuracy, one.test.macs)
                found.setdefault(key, one)
    groups: dict[Any, list[Baseline]] = {}
    for one in found.values():
        alone = one.networks if len(one.networks) == 1 else ()
        groups.setdefault((one.backbone, one.head, alone), []).append(one)
    return [one for group in groups.values() for one in _front(group)]


def _front(group: Sequence[Baseline]) -> list[Baseline]:
    rows = [one.validation for one in group]
    mask = pareto_front([row.accuracy for row in rows], [row.macs for row in rows])
    return [one for one, kept in zip(group, mask, strict=True) if kept]


def _baselines(point: Point, by_record: Mapping[str, Point]) -> Iterator[Baseline]:
    content: Networks = RunDir(point, "search").read_json(NETWORKS, Networks)
    backbone = by_record[point.networks[-1]].ids["prepare"]
    for entry in content["static"]:
        rows = _rows(point, "static", entry, [[network_name(point), None]])
        yield Baseline(point, entry["head"], (point.ids["record"],), Configuration(()), backbone, *rows)
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
        yield Baseline(point, entry["head"], tuple(entry["networks"]), exits, backbone, *rows)


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


def describe_networks(row: ReportRow) -> str:
    """The networks of a baseline's row in words."""
    parts = [
        f"{name}" if threshold is None else f"{name} above {threshold:.3g}"
        for name, threshold in json.loads(row.configuration)
    ]
    return ", else ".join(parts)
