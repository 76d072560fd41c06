"""Baselines as rows of the table of operating points, and whether each is right on test samples."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from dynexit.baselines.cascades import Network, cascade_problem
from dynexit.baselines.search import NETWORKS, OWN, RecordedNetwork, confidence_of
from dynexit.baselines.thresholds import problem_of, threshold_rows
from dynexit.contents import JudgedNetworks, Networks
from dynexit.core.statistics import accuracy_interval
from dynexit.core.tradeoff import Configuration, apply_configuration, pareto_front
from dynexit.report.judged.outcomes import Judgement, Judgements, Outcomes, choosing_samples
from dynexit.report.page import threshold_text
from dynexit.run_dir import RunDir
from dynexit.search.operating_points import ONE_THRESHOLD, ReportRow, RowKey
from dynexit.search.problem import Problem
from dynexit.study.baselines import network_name, static_points
from dynexit.study.grid import Point
from dynexit.study.stages import STAGES


@dataclass(frozen=True)
class Baseline:
    """What a study is compared with: a static network, a cascade of several, or a point with one threshold."""

    head: str
    base: Point
    """A recorded point of the backbone that it is compared with."""
    validation: ReportRow
    test: ReportRow
    correct: Callable[[str], np.ndarray]
    """Whether it is right on each sample (N,) of a split that its row is made of."""

    @property
    def backbone(self) -> str:
        """Id of the prepared backbone that it is compared with."""
        return self.base.ids["prepare"]

    @property
    def variant(self) -> str:
        """What the sweep varies of that backbone, as `key=value`; those with the same are seeds of one."""
        sections = STAGES["prepare"].sections
        keys = (key for key in self.base.swept if key.partition(".")[0] in sections and key != "data.seed")
        return ", ".join(f"{key}={self.base.swept[key]}" for key in keys)


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


def judge_baselines(baselines: Iterable[Baseline], keys: Collection[RowKey]) -> Judgements:
    """Returns the judgements of those baselines whose keys are in `keys`, against their own backbone; none of MACs."""
    found: dict[tuple[RowKey, str], Judgement] = {}
    by_base: dict[str, list[Baseline]] = {}
    for one in baselines:
        if one.test.key in keys:
            by_base.setdefault(one.base.ids["search"], []).append(one)
    for group in by_base.values():
        for split in ("validation", "test"):
            outcomes = Outcomes(group[0].base, split)
            num_originals = len(np.unique(outcomes.origin_N))
            for one in group:
                correct_N = one.correct(split)
                accuracy = accuracy_interval(correct_N, outcomes.origin_N)
                difference = outcomes.difference(correct_N)
                found[one.test.key, split] = Judgement(accuracy, difference, None, num_originals)
    return found


def _front(group: Sequence[Baseline]) -> list[Baseline]:
    rows = [one.validation for one in group]
    mask = pareto_front([row.accuracy for row in rows], [row.macs for row in rows])
    return [one for one, kept in zip(group, mask, strict=True) if kept]


def _thresholds(point: Point) -> Iterator[Baseline]:
    read = partial(problem_of, point)
    for configuration, validation, test in threshold_rows(point):
        yield Baseline(validation.method, point, validation, test, partial(_correct, read, configuration))


@lru_cache(maxsize=1)
def _latest(read: Callable[[str], Problem], split: str) -> Problem:
    """What was read last: baselines of one point are asked for in turn."""
    return read(split)


def _correct(read: Callable[[str], Problem], configuration: Configuration, split: str) -> np.ndarray:
    problem = _latest(read, split)
    return apply_configuration(configuration, problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N)[1]


def _networks(point: Point, by_record: Mapping[str, Point]) -> Iterator[Baseline]:
    content: Networks = RunDir(point, "search").read_json(NETWORKS, Networks)
    backbone = by_record[point.networks[-1]]
    for entry in content["static"]:
        rows = _rows(point, "static", entry, [[network_name(point), None]])
        yield Baseline(entry["head"], backbone, *rows, partial(_correct_alone, point, entry["head"]))
    reads: dict[tuple[str, ...], Callable[[str], Problem]] = {}
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
        chain = (entry["head"], *entry["networks"])
        read = reads.setdefault(chain, partial(_read_chain, point, *chain))
        yield Baseline(entry["head"], backbone, *rows, partial(_correct, read, exits))


def _correct_alone(point: Point, head: str, split: str) -> np.ndarray:
    return _network(point, point.ids["record"], head, split).correct_N


def _read_chain(point: Point, *chain: str) -> Problem:
    """The problem of a cascade on a split, the last of `chain`, after its head and the ids of its networks' records."""
    head, *networks, split = chain
    return cascade_problem([_network(point, identity, head, split) for identity in networks])


def _network(point: Point, identity: str, head: str, split: str) -> Network:
    recorded = RecordedNetwork.of(point, identity)
    network = Network.of(recorded.records[split], *recorded.heads()[head], confidence_of(point))
    return network.chosen(choosing_samples(point, split, len(network.correct_N)))


def _rows(point: Point, source: str, entry: JudgedNetworks, networks: list[Any]) -> tuple[ReportRow, ReportRow]:
    reader = point.config.exits.reader
    method = entry["head"] if entry["head"] == OWN or reader is None else f"{entry['head']} on {reader}"
    stage = "prepare" if entry["head"] == OWN else "train"
    validation, test = (
        ReportRow(
            source=source,
            method=method,
            seed=point.config.seed,
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
        threshold = cells[0][1]
        return f"all exits above {threshold_text(threshold)}" if threshold < 1 else "all exits, none taken"
    return ", else ".join(
        name if threshold is None else f"{name} above {threshold_text(threshold)}" for name, threshold in cells
    )
