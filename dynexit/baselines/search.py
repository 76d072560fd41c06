"""The search of a static network: its operating points, and the cascades of two or three networks that end in it."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynexit.baselines.cascades import Network, cascade_problem, check_same_samples, find_cascades
from dynexit.core.confidence import CONFIDENCES
from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import Configuration, OperatingPoint, configuration_macs_L, operating_point, pareto_front
from dynexit.errors import Failure
from dynexit.record.shards import Record
from dynexit.run_dir import RunDir
from dynexit.search.held_back import calibration_samples
from dynexit.study.grid import Point
from dynexit.study.keys import parse_weights

NETWORKS = "networks.json"
OWN = "own classifier"
BUDGETS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""Shares of the backbone's MACs that the best cascade is searched for, where the study asks for none."""
_SPLITS = ("validation", "test")
_LENGTHS = (2, 3)  # of cascades
_MOST_OF_THREE = 7  # networks up to which cascades of three are searched too


@dataclass(frozen=True)
class RecordedNetwork:
    """A static network's records and costs, by the id of its record."""

    identity: str
    records: dict[str, Record]
    costs: ExitCosts

    @classmethod
    def of(cls, point: Point, identity: str) -> "RecordedNetwork":
        """The network of that record in the point's study. Raises Failure if it is not recorded."""
        source = RunDir(point, "record", identity)
        if not source.is_done():
            raise Failure(
                f"static network {identity} is not recorded, and {point.label} is compared with it; "
                "run `dynexit record` on the study"
            )
        records = {split: Record.open(source / split) for split in _SPLITS}
        return cls(identity, records, source.costs())

    def heads(self) -> dict[str, tuple[int, int]]:
        """By name the row of each classifier at its end, and the MACs of the network with it."""
        ends = [int(configuration_macs_L(Configuration(((i, -1.0),)), self.costs)[0]) for i in range(self._num_types)]
        return {OWN: (-1, self.costs.full_macs), **dict(zip(self.costs.head_types, enumerate(ends), strict=True))}

    @property
    def _num_types(self) -> int:
        return len(self.costs.head_types)


def search_networks(point: Point) -> int:
    """Writes the operating points of a static network, and of the cascades that end in it if the study asks for them.

    Returns the number of validation samples. Raises Failure where another network that it is compared with is not
    recorded, UserError where that one's samples are others.
    """
    networks = {identity: RecordedNetwork.of(point, identity) for identity in point.networks}
    own, backbone = networks[point.ids["record"]], networks[point.networks[-1]]
    for split in _SPLITS:
        check_same_samples({name: network.records[split] for name, network in networks.items()})
    full_macs = backbone.costs.full_macs
    num_samples = own.records["validation"].num_samples
    held_back_N = calibration_samples(point.config.data, point.config.search.calibration_share, num_samples)
    samples = {"validation": ~held_back_N, "test": np.ones(own.records["test"].num_samples, dtype=bool)}
    static = []
    for head, (row, macs) in own.heads().items():
        if own is backbone and head == OWN:
            continue  # the study's own backbone
        correct = {split: own.records[split].correct_RN[row][samples[split]] for split in _SPLITS}
        points = {split: _alone(correct[split], macs, full_macs) for split in _SPLITS}
        static.append({"head": head, **_judged(points)})
    cascades: list[dict[str, Any]] = []
    if point.config.baselines.cascade:
        for head in own.heads():
            cascades += _cascades(point, [*networks.values()], own, head, samples, full_macs)
    directory = RunDir(point, "search")
    directory.write_json(NETWORKS, {"static": static, "cascades": cascades})
    directory.mark_done([NETWORKS])
    return int(samples["validation"].sum())


def confidence_of(point: Point) -> str:
    """The confidence that networks of a cascade are compared by: the study's, if it is one of logits."""
    name = point.config.search.confidence
    return "max_probability" if CONFIDENCES[name].reads == "gates" else name


def _alone(correct_N: np.ndarray, macs: int, full_macs: int) -> OperatingPoint:
    leaves_N = np.zeros(len(correct_N), dtype=np.int64)
    return operating_point(leaves_N, correct_N[None], np.array([macs]), full_macs)


def _cascades(
    point: Point,
    networks: Sequence[RecordedNetwork],
    own: RecordedNetwork,
    head: str,
    samples: dict[str, np.ndarray],
    full_macs: int,
) -> list[dict[str, Any]]:
    """The cascades with this head that end in `own`, of networks with rising MACs; only those that no other beats."""
    settings = point.config.search
    budgets = settings.relative_macs or BUDGETS
    found = []
    for chain in _chains(networks, own, head):
        problems = {}
        for split in _SPLITS:
            parts = [Network.of(one.records[split], *one.heads()[head], confidence_of(point)) for one in chain]
            problems[split] = cascade_problem([part.chosen(samples[split]) for part in parts])
        share = full_macs / problems["validation"].costs.full_macs
        weights = parse_weights(settings.accuracy_weights)
        for configuration in find_cascades(problems["validation"], weights, [share * value for value in budgets]):
            points = {split: problem.evaluate(configuration) for split, problem in problems.items()}
            if max(points["validation"].exit_fractions) == 1:
                continue  # one network alone
            judged = _judged(points, share)
            ids = [one.identity for one in chain]
            found.append({"head": head, "networks": ids, "exits": configuration.to_json(), **judged})
    of_validation = [entry["validation"] for entry in found]
    front = pareto_front([one["accuracy"] for one in of_validation], [one["macs"] for one in of_validation])
    return [entry for entry, kept in zip(found, front, strict=True) if kept]


def _chains(
    networks: Sequence[RecordedNetwork], own: RecordedNetwork, head: str
) -> Iterator[tuple[RecordedNetwork, ...]]:
    """Two or three networks in order of MACs, the last of them `own`."""

    def macs(network: RecordedNetwork) -> int:
        return network.heads()[head][1]

    cheaper = sorted((one for one in networks if macs(one) < macs(own)), key=macs)
    for length in _LENGTHS if len(networks) <= _MOST_OF_THREE else _LENGTHS[:1]:
        yield from ((*before, own) for before in itertools.combinations(cheaper, length - 1))


def _judged(points: dict[str, OperatingPoint], share: float = 1.0) -> dict[str, Any]:
    """Figures of both splits; relative MACs are multiplied by 1 / `share`."""
    return {
        split: {
            "accuracy": point.accuracy,
            "macs": point.macs,
            "relative_macs": point.relative_macs / share,
            "exit_fractions": list(point.exit_fractions),
        }
        for split, point in points.items()
    }
