"""Calibration and prediction sets of the front's points: fitted on validation, judged on test, each over a whole set.

Shapes: L exits of a configuration (its enabled ones, then the backbone), N samples, k recorded classes, A alphas.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from dynexit.core.calibration import (
    ALPHAS,
    CONFORMAL_VARIANTS,
    conformal_sets,
    conformal_thresholds,
    ece,
    scaled_confidence,
    set_sizes,
    temperature,
)
from dynexit.core.cost import ExitCosts
from dynexit.core.exit_policy import exit_index_from_gates
from dynexit.core.tradeoff import Configuration, apply_configuration
from dynexit.record.held_back import calibration_samples
from dynexit.record.shards import Record
from dynexit.report.figures import HUNDREDTHS
from dynexit.report.table import FrontPoint, front_of, within_budgets
from dynexit.run_dir import RunDir, atomic_write
from dynexit.search.operating_points import ReportRow
from dynexit.search.problem import Problem
from dynexit.study.grid import Point

ALPHA = 0.05
"""Miscoverage level that the page shows and that exits are listed at; the table has all of ALPHAS for whole points."""


@dataclass(frozen=True)
class Measure:
    """One figure. `scope` says of which test samples: `taken` all, each at the exit it takes; `leaving` those that
    leave at `exit`; `all` every one at `exit`, wherever it leaves. `variant` and `alpha` are those of prediction sets.
    """

    name: str
    value: float
    scope: str = "taken"
    exit: int | None = None
    variant: str = ""
    alpha: float | None = None


@dataclass(frozen=True)
class Uncertainty:
    """A point of the front and its figures."""

    point: FrontPoint
    measures: tuple[Measure, ...]

    def get(self, name: str, variant: str = "", alpha: float | None = None) -> float | None:
        """The figure of all test samples at the exits they take, None where there is none."""
        wanted = (name, "taken", variant, alpha)
        return next((m.value for m in self.measures if (m.name, m.scope, m.variant, m.alpha) == wanted), None)

    def temperatures(self) -> list[float]:
        """The temperatures of the exits, in order of depth."""
        return [measure.value for measure in self.measures if measure.name == "temperature"]


@dataclass(frozen=True)
class ExitOutputs:
    """What one split's record says at the exits of a configuration, and where each sample leaves.

    `rows` are the exits' rows of the record, `probability_LNk` the k most probable classes in falling order, `rank_LN`
    the label's place among them (0 where it is not).
    """

    exits: tuple[int, ...]
    rows: tuple[int, ...]
    exit_index_N: np.ndarray
    correct_LN: np.ndarray
    confidence_LN: np.ndarray
    label_probability_LN: np.ndarray
    probability_LNk: np.ndarray
    rank_LN: np.ndarray
    num_classes: int

    @property
    def is_exact(self) -> bool:
        return bool(self.probability_LNk.shape[-1] == self.num_classes)

    def of(self, samples_N: np.ndarray) -> "ExitOutputs":
        """Those of the samples in the mask alone."""
        arrays = {
            field.name: getattr(self, field.name)[(slice(None),) * (field.name != "exit_index_N") + (samples_N,)]
            for field in fields(self)
            if field.name not in ("exits", "rows", "num_classes")
        }
        return replace(self, **arrays)

    def taken(self, values_LNx: np.ndarray) -> np.ndarray:
        """Of values at every exit those at the exit each sample takes."""
        return np.asarray(values_LNx[self.exit_index_N, np.arange(len(self.exit_index_N))])


def read_outputs(record: Record, costs: ExitCosts, configuration: Configuration | None, confidence: str) -> ExitOutputs:
    """The outputs of one record under a configuration of thresholds on `confidence`, or, with None, under its gates."""
    num_types, last = len(costs.head_types), len(costs.positions)
    if configuration is None:
        head_by_exit = dict.fromkeys(range(last), 0)
        exit_N = exit_index_from_gates(torch.from_numpy(np.ascontiguousarray(record.gate))).numpy()
    else:
        head_by_exit = {p: head for p, (head, _) in enumerate(configuration.exits) if head >= 0}
        problem = Problem.from_record(record, costs, confidence)
        exit_N, _ = apply_configuration(
            configuration, problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N
        )
    exits = (*head_by_exit, last)
    rows = [*(p * num_types + head for p, head in head_by_exit.items()), len(record.rows) - 1]
    places = range(record.layout.topk)
    probabilities = [record.probability(place)[rows] for place in places]
    num_classes = int(record.header["num_classes"])
    if len(places) == 1 < num_classes:  # the margin tells the second
        probabilities.append(np.maximum(probabilities[0] - record.confidence("margin")[rows], 0))
    is_label = np.stack([record.prediction(place)[rows] == record.label for place in places], -1)
    return ExitOutputs(
        exits=exits,
        rows=tuple(rows),
        exit_index_N=np.searchsorted(exits, exit_N),
        correct_LN=record.correct_RN[rows],
        confidence_LN=probabilities[0],
        label_probability_LN=record.confidence("label_probability")[rows],
        probability_LNk=np.stack(probabilities, -1),
        rank_LN=is_label.argmax(-1),
        num_classes=num_classes,
    )


def measure(
    calibration: ExitOutputs,
    test: ExitOutputs,
    fitted: dict[int, float] | None = None,
    quantile: str = "finite_sample",
) -> Iterator[Measure]:
    """All figures of one configuration, fitted on `calibration` and judged on `test`.

    `quantile` is that of conformal_quantile. `fitted` holds temperatures by row of the record, for all configurations
    on the same samples, and is added to.
    """
    yield Measure("num_samples", len(test.exit_index_N))
    yield from _calibration_errors(calibration, test, {} if fitted is None else fitted)
    scores_LN = 1 - calibration.label_probability_LN.astype(np.float64)
    for variant in CONFORMAL_VARIANTS:
        threshold_AL = conformal_thresholds(scores_LN, calibration.exit_index_N, ALPHAS, variant, quantile)
        for alpha, threshold_L in zip(ALPHAS, threshold_AL, strict=True):
            yield from _sets(test, test.exit_index_N, threshold_L, variant=variant, alpha=alpha)
            if alpha != ALPHA:
                continue
            for index, exit_ in enumerate(test.exits):
                leaving = test.of(test.exit_index_N == index)
                yield from _sets(
                    leaving, leaving.exit_index_N, threshold_L, "leaving", exit_, variant=variant, alpha=alpha
                )
                if variant == "gated_all":  # the sets of an exit where nobody leaves before
                    everybody = np.full_like(test.exit_index_N, index)
                    yield from _sets(test, everybody, threshold_L, "all", exit_, variant=variant, alpha=alpha)


def _calibration_errors(calibration: ExitOutputs, test: ExitOutputs, fitted: dict[int, float]) -> Iterator[Measure]:
    confidences = {"": test.confidence_LN}
    if test.is_exact:
        for index, row in enumerate(calibration.rows):
            if row not in fitted:
                probability_NK = calibration.probability_LNk[index].astype(np.float64)
                probability_NK = np.maximum(probability_NK, np.finfo(np.float32).tiny)
                fitted[row] = temperature(np.log(probability_NK), calibration.rank_LN[index])
        temperature_L = [fitted[row] for row in calibration.rows]
        for exit_, value in zip(test.exits, temperature_L, strict=True):
            yield Measure("temperature", value, "all", exit_)
        confidences["_scaled"] = np.stack(
            [
                scaled_confidence(probability_NK, np.full(len(probability_NK), value))
                for probability_NK, value in zip(test.probability_LNk, temperature_L, strict=True)
            ]
        )
    for suffix, confidence_LN in confidences.items():
        for binning in ("quantile", "width"):
            name = f"ece_{binning}{suffix}"
            yield Measure(name, ece(test.taken(confidence_LN), test.taken(test.correct_LN), binning=binning))
            for exit_, confidence_N, correct_N in zip(test.exits, confidence_LN, test.correct_LN, strict=True):
                yield Measure(name, ece(confidence_N, correct_N, binning=binning), "all", exit_)


def _sets(
    outputs: ExitOutputs,
    exit_index_N: np.ndarray,
    threshold_L: np.ndarray,
    scope: str = "taken",
    exit_: int | None = None,
    **which: str | float,
) -> Iterator[Measure]:
    """Coverage and mean size of the sets of samples at these exits; nothing but their number where there are none."""
    if scope == "leaving" and which["variant"] == CONFORMAL_VARIANTS[0]:
        yield Measure("num_samples", len(exit_index_N), scope, exit_)
    if not len(exit_index_N):
        return
    samples = np.arange(len(exit_index_N))
    label_probability_N1 = outputs.label_probability_LN[exit_index_N, samples, None]
    covered_N1 = conformal_sets(label_probability_N1, exit_index_N, threshold_L)
    probability_Nk = outputs.probability_LNk[exit_index_N, samples]
    at_least_N, at_most_N = set_sizes(probability_Nk, outputs.num_classes, exit_index_N, threshold_L)
    for name, value in (
        ("coverage", covered_N1.mean()),
        ("set_size", at_least_N.mean()),
        ("greatest_set_size", at_most_N.mean()),
    ):
        yield Measure(name, float(value), scope, exit_, **which)  # type: ignore[arg-type]


def uncertainties(points: Sequence[Point], rows: Sequence[ReportRow]) -> list[Uncertainty]:
    """The figures of the front's points by rising cost; of points less than a hundredth of the MACs apart, one."""
    front = within_budgets(front_of(rows), HUNDREDTHS)
    by_id = {identity: point for point in reversed(points) for identity in point.ids.values()}
    found: dict[int, Uncertainty] = {}
    fitted: dict[tuple[str, float], dict[int, float]] = {}
    quantile = points[0].config.report.quantile
    # record by record, so that one at a time is held in memory
    for place in sorted(range(len(front)), key=lambda i: by_id[front[i].test.chosen_by].ids["record"]):
        point = by_id[front[place].test.chosen_by]
        source = RunDir(point, "record")
        calibration, test = (_outputs_of(front[place].test, point, source, split) for split in ("validation", "test"))
        share = point.config.search.calibration_share
        held_back_N = calibration_samples(point.config.data, share, len(calibration.exit_index_N))
        if held_back_N.any():
            calibration = calibration.of(held_back_N)
        temperatures = fitted.setdefault((point.ids["record"], share), {})
        found[place] = Uncertainty(front[place], tuple(measure(calibration, test, temperatures, quantile)))
    return [found[place] for place in range(len(front))]


def _outputs_of(row: ReportRow, point: Point, source: RunDir, split: str) -> ExitOutputs:
    costs = source.costs()
    configuration = None
    if row.source == "backbone":
        configuration = Configuration(((-1, 0.0),) * len(costs.positions))
    elif row.configuration:
        configuration = Configuration.from_json(json.loads(row.configuration))
    return read_outputs(Record.open(source / split), costs, configuration, point.config.search.confidence)


_POINT_COLUMNS = ("relative_macs", "source", "method", "seed", "ce_ic_tradeoff", "accuracy_weight", "budget")


def write_uncertainty(path: Path, found: Sequence[Uncertainty]) -> None:
    """Writes a row per figure: the point as in operating_points.csv (MACs of test), then the fields of Measure."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        identity = ("point_id", "search_id", "configuration")
        writer.writerow([*_POINT_COLUMNS, *identity, *(field.name for field in fields(Measure))])
        for one in found:
            row = one.point.test
            start = [getattr(row, name) for name in (*_POINT_COLUMNS, *identity)]
            writer.writerows([*start, *astuple(m)] for m in one.measures)
