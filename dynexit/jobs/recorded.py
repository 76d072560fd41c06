"""What the records of a training say of its operating points, for a model folder.

Shapes: P positions, H head types, L exits, R rows of a record, N samples, K classes.
"""

import dataclasses
import json
from collections.abc import Mapping

import numpy as np

from dynexit.core.calibration import ALPHAS, conformal_quantile, scaled_confidence, temperature
from dynexit.core.cost import ExitCosts
from dynexit.core.statistics import accuracy_interval
from dynexit.core.tradeoff import Configuration
from dynexit.data import DataSets
from dynexit.deploy.assembly import HeadStack
from dynexit.deploy.description import PointStatistics, SavedLatency, SavedPoint, SavedTraining
from dynexit.jobs.finished import measured_times
from dynexit.jobs.infer import expected_exits
from dynexit.record.shards import Record
from dynexit.report.judged.outcomes import choosing_samples
from dynexit.run_dir import HEADS, RunDir
from dynexit.search.operating_points import ReportRow, RowTime
from dynexit.study.grid import Point


@dataclasses.dataclass(frozen=True)
class RecordedTraining:
    """A training's records of both splits, and what a model folder holds of them."""

    point: Point
    costs: ExitCosts
    records: Mapping[str, Record]
    samples: Mapping[str, np.ndarray]  # mask (N,) of those that operating points are judged on
    origins: Mapping[str, np.ndarray]  # (N,) the original image of each
    calibration_N: np.ndarray  # mask (N,) of the validation samples that temperatures and sets are fitted on
    temperature_R: np.ndarray | None

    @classmethod
    def of(cls, point: Point, data: DataSets) -> "RecordedTraining":
        source, checkpoint = RunDir(point, "record"), RunDir(point, "train").digest(HEADS)
        costs = source.costs()
        records = {split: Record.open(source / split, checkpoint) for split in ("validation", "test")}
        samples = {split: choosing_samples(point, split, record.num_samples) for split, record in records.items()}
        origins = {split: data.split(split).origin.numpy() for split in records}
        held_back_N = ~samples["validation"]
        calibration_N = held_back_N if held_back_N.any() else samples["validation"]
        temperature_R = _temperatures(records["validation"], calibration_N)
        return cls(point, costs, records, samples, origins, calibration_N, temperature_R)

    def saved_training(self) -> SavedTraining:
        """What exits.json holds of it."""
        config, stack = self.point.config, HeadStack.of(self.point.config)
        temperatures = None
        if self.temperature_R is not None:
            rows = self.temperature_R[:-1].reshape(len(self.costs.positions), -1).tolist()
            temperatures = (*map(tuple, rows), (float(self.temperature_R[-1]),))
        return SavedTraining(
            label=self.point.label,
            method=config.train.method,
            exits=config.exits.model_dump(mode="json"),
            precision=config.train.precision,
            shrinkage=stack.shrinkage,
            has_gates=stack.has_gates,
            costs=self.costs.to_json(),
            temperatures=temperatures,
        )

    def saved_point(self, name: str, validation: ReportRow, test: ReportRow) -> SavedPoint:
        """What exits.json holds of one of its operating points, from its rows of the table."""
        row, way = validation, self.configuration(validation)
        confidence = "max_probability" if row.source == "backbone" else self.point.config.search.confidence
        budget = json.loads(row.budget) if row.budget else {}
        return SavedPoint(
            name=name,
            training=self.point.id,
            source=row.source,  # type: ignore[arg-type]
            confidence=confidence,
            exits=None if way is None else way.exits,
            validation=self._statistics(validation, way, confidence, "validation"),
            test=self._statistics(test, way, confidence, "test"),
            certified_risk=budget.get("risk"),
            latency=self._latency(validation),
            conformal=self._conformal(way, confidence),
        )

    def _latency(self, row: ReportRow) -> tuple[SavedLatency, ...]:
        if not row.times or not self.point.is_by_time:
            return ()
        table = measured_times(self.point, "search")
        device, name = str(table.machine.get("device")), str(table.machine.get("device_name"))

        def milliseconds(time: RowTime) -> float:
            # the backbone's row may be of another measurement than that of the points beside it
            return 1000 * table.times[time.batch_size].backbone if row.source == "backbone" else time.latency_ms

        return tuple(
            SavedLatency(
                device=device,
                device_name=name,
                batch_size=time.batch_size,
                milliseconds=milliseconds(time),
                relative=time.relative_time,
            )
            for time in row.times
        )

    def configuration(self, row: ReportRow) -> Configuration | None:
        """The configuration of a row, None if the gates decide."""
        if row.source == "backbone":
            return Configuration(((-1, 1.0),) * len(self.costs.positions))
        return Configuration.from_json(json.loads(row.configuration)) if row.configuration else None

    def expected(self, way: Configuration | None, confidence: str, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The exit of every sample (N,) by the record, and each exit's row of it (L,)."""
        exit_N, _, rows_L = expected_exits(self.records[split], self.costs, way, confidence)
        return exit_N, rows_L

    def _conformal(self, way: Configuration | None, confidence: str) -> tuple[tuple[float, float], ...]:
        """(alpha, threshold) from the calibration samples, each at the exit that it takes."""
        record = self.records["validation"]
        exit_N, rows_L = self.expected(way, confidence, "validation")
        taken_N = rows_L[exit_N] % len(record.rows)
        label_N = record.confidence("label_probability")[taken_N, np.arange(record.num_samples)]
        score_N = np.clip(1 - label_N[self.calibration_N].astype(np.float64), 0, 1)
        return tuple((alpha, conformal_quantile(score_N, alpha)) for alpha in ALPHAS)

    def _statistics(self, row: ReportRow, way: Configuration | None, confidence: str, split: str) -> PointStatistics:
        record, samples_N = self.records[split], self.samples[split]
        exit_N, rows_L = self.expected(way, confidence, split)
        taken_N = rows_L[exit_N] % len(record.rows)
        columns = np.arange(record.num_samples)
        if self.temperature_R is None:
            sure_N = record.probability()[taken_N, columns]
        else:
            places = range(record.layout.topk)
            probability_NK = np.stack([record.probability(place)[taken_N, columns] for place in places], -1)
            sure_N = scaled_confidence(probability_NK, self.temperature_R[taken_N])
        origin_N = self.origins[split][samples_N]
        accuracy = accuracy_interval(record.correct_RN[taken_N, columns][samples_N], origin_N)
        whole = (*(0.0,) * len(self.costs.positions), 1.0)
        return PointStatistics(
            accuracy=row.accuracy,
            accuracy_interval=(accuracy.low, accuracy.high),
            num_samples=int(samples_N.sum()),
            num_originals=len(np.unique(origin_N)),
            relative_macs=row.relative_macs,
            # the backbone's row may be of a training with other exits
            exit_fractions=row.exit_fractions if way is None or any(head >= 0 for head, _ in way.exits) else whole,
            mean_confidence=min(float(sure_N[samples_N].mean()), 1.0),
        )


def _temperatures(record: Record, samples_N: np.ndarray) -> np.ndarray | None:
    """The temperature of every row (R,), fitted on these samples; None if the record does not hold all classes."""
    if record.layout.topk < int(record.header["num_classes"]):
        return None
    places = range(record.layout.topk)
    fitted = []
    for row in range(len(record.rows)):
        probability_NK = np.stack([record.probability(place)[row] for place in places], -1)[samples_N]
        is_label_NK = np.stack([record.prediction(place)[row] == record.label for place in places], -1)[samples_N]
        probability_NK = np.maximum(probability_NK.astype(np.float64), np.finfo(np.float32).tiny)
        fitted.append(temperature(np.log(probability_NK), is_label_NK.argmax(1)))
    return np.array(fitted)
