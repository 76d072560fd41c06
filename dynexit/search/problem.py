"""What a search reads of a record, checked once, and the objective it minimises.

Shapes: N samples, P positions, H head types (see the contract of a record: rows are position-major, then the backbone).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dynexit.core.confidence import CONFIDENCES, LOGIT_CONFIDENCES
from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import (
    Configuration,
    OperatingPoint,
    apply_configuration,
    configuration_macs_L,
    operating_point,
)
from dynexit.errors import UserError

if TYPE_CHECKING:
    from dynexit.record.shards import Record

# At the ends of [0, 1] the objective ignores one of its two terms. A weight this far inside decides between equals by
# the ignored term, and is too small to outweigh one sample of the other (N < 1e8).
_TIE_BREAK = 1e-9


@dataclass(frozen=True)
class Problem:
    """Recorded outputs and costs: `correct_PHN` bool, `confidence_PHN` float32 in [0, 1], `base_correct_N` bool.

    `costs.head_macs` is what a sample pays at an enabled exit, taken or not; gates are included where they decide.
    Raises UserError for no samples, unequal shapes, a confidence that is NaN or outside [0, 1].
    """

    correct_PHN: np.ndarray
    confidence_PHN: np.ndarray
    base_correct_N: np.ndarray
    costs: ExitCosts

    def __post_init__(self) -> None:
        expected = (len(self.costs.positions), len(self.costs.head_types), self.base_correct_N.shape[0])
        for name in ("correct_PHN", "confidence_PHN"):
            shape = getattr(self, name).shape
            if shape != expected:
                raise UserError(
                    f"{name} has shape {shape}, costs and labels say (positions, head types, samples) = {expected}; "
                    "give the costs of the model that made the record"
                )
        if expected[2] == 0:
            raise UserError("the record holds no samples; record at least one")
        if self.confidence_PHN.dtype != np.float32:
            raise UserError(f"confidences are {self.confidence_PHN.dtype}, expected float32; record them again")
        for position, confidence_HN in enumerate(self.confidence_PHN):
            # min and max propagate NaN, and a comparison with NaN is false
            if not (confidence_HN.min() >= 0 and confidence_HN.max() <= 1):
                raise UserError(
                    f"a confidence at position {self.costs.positions[position]} is "
                    f"{_first_outside(confidence_HN)}, allowed is 0 to 1; record again with softmax outputs"
                )

    @classmethod
    def from_record(cls, record: "Record", costs: ExitCosts, confidence: str = "max_probability") -> "Problem":
        """The problem of one record: `confidence` is a name of `dynexit.core.confidence.CONFIDENCES`.

        With `gate` the gate's output is the confidence of every head at its position, and its MACs are added to the
        head's. Raises UserError for an unknown kind, a record without gates, and costs of other positions or heads.
        """
        if confidence not in CONFIDENCES:
            raise UserError(f"confidence is {confidence!r}, allowed are {', '.join(CONFIDENCES)}; name one of them")
        check_same_model(record, costs)
        check_labels(record)
        shape = (len(costs.positions), len(costs.head_types), record.num_samples)
        if CONFIDENCES[confidence].reads == "gates":
            if record.gate is None:
                allowed = ", ".join(LOGIT_CONFIDENCES[:-1]) + f" or {LOGIT_CONFIDENCES[-1]}"
                raise UserError(f"confidence is {confidence!r}, but the record holds no gates; use {allowed}")
            confidence_PHN = np.broadcast_to(np.asarray(record.gate)[:, None, :], shape)
            costs = with_gates(costs)
        else:
            confidence_PHN = record.confidence(confidence)[:-1].reshape(shape)
        correct_RN = record.correct_RN
        return cls(correct_RN[:-1].reshape(shape), confidence_PHN, correct_RN[-1], costs)

    @property
    def num_samples(self) -> int:
        return int(self.base_correct_N.shape[0])

    @cached_property
    def base_correct(self) -> int:
        """How many samples the backbone itself gets right."""
        return int(np.count_nonzero(self.base_correct_N))

    def of(self, samples_N: np.ndarray) -> "Problem":
        """The problem of the samples in the mask alone."""
        return replace(
            self,
            correct_PHN=self.correct_PHN[..., samples_N],
            confidence_PHN=self.confidence_PHN[..., samples_N],
            base_correct_N=self.base_correct_N[samples_N],
        )

    def evaluate(self, configuration: Configuration) -> OperatingPoint:
        """Accuracy, MACs and exit fractions of `configuration` on this record."""
        exit_index_N, correct_N = apply_configuration(
            configuration, self.confidence_PHN, self.correct_PHN, self.base_correct_N
        )
        macs_L = configuration_macs_L(configuration, self.costs)
        correct_LN = np.broadcast_to(correct_N, (len(macs_L), self.num_samples))
        return operating_point(exit_index_N, correct_LN, macs_L, self.costs.full_macs)


def with_gates(costs: ExitCosts) -> ExitCosts:
    """The same costs, where every head brings its position's gate with it."""
    heads = zip(costs.head_macs, costs.gate_macs, strict=True)
    return replace(costs, head_macs=tuple(tuple(head + gate for head in row) for row, gate in heads))


@dataclass(frozen=True)
class Objective:
    """Σ over samples of (per_mac · macs − per_correct · correct), plus a constant: λ of SEARCH.md made linear."""

    constant: float
    per_mac: float
    per_correct: float

    def __call__(self, correct: float, macs: float) -> float:
        """The objective of sums over all samples."""
        return self.constant + self.per_mac * macs - self.per_correct * correct


def objective_of(problem: Problem, accuracy_weight: float, normalize: bool = False) -> Objective:
    """The objective at one accuracy weight w: w·(1 − accuracy/base accuracy) + (1 − w)·macs/full macs.

    `normalize` first maps accuracy and MACs to [0, 1] between the first exit's (head type 0; MACs of the backbone alone
    up to it) and the backbone's (DyCE). Raises UserError for a weight outside [0, 1], a backbone that is never right,
    and, normalised, a backbone no better or no dearer than its first exit.
    """
    if not 0 <= accuracy_weight <= 1:
        raise UserError(f"accuracy weight is {accuracy_weight}, allowed is 0 to 1; above 1 MACs would be rewarded")
    count, costs = problem.num_samples, problem.costs
    lowest_correct, lowest_macs = 0, 0
    if normalize and costs.positions:
        lowest_correct = int(np.count_nonzero(problem.correct_PHN[0, 0]))
        lowest_macs = costs.backbone_macs[0]
    correct_span, macs_span = problem.base_correct - lowest_correct, costs.full_macs - lowest_macs
    if correct_span <= 0 or macs_span <= 0:
        what = f"the backbone is right on {problem.base_correct} of {count} samples at {costs.full_macs} MACs"
        if normalize:
            what += f", the first exit on {lowest_correct} at {lowest_macs}"
        remedy = "search without normalize" if normalize else "check labels, model and MACs"
        raise UserError(f"the objective divides by zero or less: {what}; {remedy}")
    per_correct = accuracy_weight / correct_span
    per_mac = (1 - accuracy_weight) / (count * macs_span)
    constant = accuracy_weight * (1 + lowest_correct / correct_span) - (1 - accuracy_weight) * lowest_macs / macs_span
    return Objective(constant, per_mac, per_correct)


def tie_breaking(problem: Problem, accuracy_weights: Iterable[float], normalize: bool) -> list[Objective]:
    """The objectives to search with: as given, but a weight of 0 or 1 decides between equals by the other term."""
    inside = (
        min(max(weight, _TIE_BREAK), 1 - _TIE_BREAK) if 0 <= weight <= 1 else weight for weight in accuracy_weights
    )
    return [objective_of(problem, weight, normalize) for weight in inside]


def check_same_model(record: "Record", costs: ExitCosts) -> None:
    """Raises UserError unless record and costs name the same positions and head types in the same order."""
    unknown = [head for head in record.head_types if head not in costs.head_types]
    if unknown:
        raise UserError(
            f"unknown head type {unknown[0]!r} in the record; the costs know {', '.join(costs.head_types)}; "
            "give the costs of the model that made the record"
        )
    for name in ("positions", "head_types"):
        recorded, costed = list(getattr(record, name)), list(getattr(costs, name))
        if recorded != costed:
            raise UserError(
                f"the record has {name} {recorded}, the costs have {costed}; give the costs of the model that made it"
            )


def check_labels(record: "Record") -> None:
    """Raises UserError for a label below 0 or not below the header's number of classes (where it says one)."""
    label_N = np.asarray(record.label)
    num_classes = record.header.get("num_classes")
    outside_N = label_N < 0 if num_classes is None else (label_N < 0) | (label_N >= num_classes)
    if outside_N.any():
        where = int(np.argmax(outside_N))
        allowed = "0 or more" if num_classes is None else f"0 to {num_classes - 1}"
        raise UserError(
            f"the label of sample {where} in the record is {int(label_N[where])}, allowed is {allowed}; record it again"
        )


def _first_outside(confidence_HN: np.ndarray) -> float:
    outside = ~((confidence_HN >= 0) & (confidence_HN <= 1))
    return float(confidence_HN[outside][0])
