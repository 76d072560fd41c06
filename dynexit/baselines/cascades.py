"""Cascades of whole networks: every sample runs the first, and the next where that one is not sure; their exact search.

A cascade is a problem of the search on exits whose stages are networks: leaving at network k costs all that ran so far.
Shapes: N samples, P networks before the last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import Configuration, pareto_front
from dynexit.errors import UserError
from dynexit.record.shards import Record
from dynexit.search.budgets import Budget, Unattainable, within
from dynexit.search.exact import Front
from dynexit.search.problem import Problem


@dataclass(frozen=True)
class Network:
    """What one whole network says of each sample: whether it is right (N,), its confidence (N,), and its MACs."""

    correct_N: np.ndarray
    confidence_N: np.ndarray
    macs: int

    @classmethod
    def of(cls, record: Record, row: int, macs: int, confidence: str = "max_probability") -> "Network":
        """The network whose outputs are a row of `record`, -1 for its own classifier."""
        return cls(record.correct_RN[row], record.read_row(row, confidence), macs)

    def chosen(self, samples_N: np.ndarray) -> "Network":
        """The same on the samples in the mask."""
        return Network(self.correct_N[samples_N], self.confidence_N[samples_N], self.macs)


def cascade_problem(networks: Sequence[Network]) -> Problem:
    """The problem of running the networks in this order. Any but the last may be left out by a configuration.

    Its costs are over those of the last network.
    """
    *before, last = networks
    costs = ExitCosts(
        full_macs=last.macs,
        positions=tuple(range(len(before))),
        backbone_macs=(0,) * len(before),
        head_types=("network",),
        head_macs=tuple((network.macs,) for network in before),
        gate_macs=(0,) * len(before),
    )
    correct_PHN = np.stack([network.correct_N for network in before])[:, None]
    confidence_PHN = np.stack([network.confidence_N for network in before])[:, None]
    return Problem(correct_PHN, confidence_PHN, last.correct_N, costs)


def find_cascades(
    problem: Problem, accuracy_weights: Sequence[float], relative_macs: Sequence[float], workers: int = 1
) -> list[Configuration]:
    """The configurations that no other one beats among all that the exact search met for these weights and budgets."""
    front = Front(problem, lowest=0.0, workers=workers)
    front.solve(accuracy_weights)
    for value in relative_macs:
        try:
            within(front, Budget("relative_macs", value))
        except Unattainable:
            continue  # too little for the cheapest network
    candidates = list(front.pool.values())
    mask = pareto_front([one.correct for one in candidates], [one.macs for one in candidates])
    return [Configuration(one.exits) for one, kept in zip(candidates, mask, strict=True) if kept]


def check_same_samples(records: Mapping[str, Record]) -> None:
    """Raises UserError unless the records, by their name, are of the same samples in the same order."""
    (first, reference), *others = records.items()
    for name, record in others:
        why = ""
        if record.num_samples != reference.num_samples:
            why = f"they have {reference.num_samples} and {record.num_samples} samples"
        elif not np.array_equal(record.index, reference.index):
            why = "their samples are in another order"
        elif (record.label != reference.label).any():
            where = int(np.argmax(record.label != reference.label))
            why = f"the label of sample {where} is {reference.label[where]} and {record.label[where]}"
        elif record.header.get("class_names") != reference.header.get("class_names"):
            why = "their classes have other names"
        if why:
            raise UserError(
                f"{first} and {name} are not records of the same samples: {why}; record both models on the same data, "
                "with the same split and data.seed"
            )
