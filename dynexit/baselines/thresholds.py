"""What needs no search: every exit of a point enabled, with one head type and one threshold for all of them.

Shapes: N samples, P positions, H head types.
"""

import json

import numpy as np

from dynexit.baselines.search import confidence_of
from dynexit.core.tradeoff import Configuration, OperatingPoint, pareto_front
from dynexit.record.shards import Record
from dynexit.report.judged.outcomes import choosing_samples
from dynexit.run_dir import RunDir
from dynexit.search.operating_points import ONE_THRESHOLD, ReportRow
from dynexit.search.problem import Problem
from dynexit.study.grid import Point

_NUM_THRESHOLDS = 100


def threshold_rows(point: Point) -> list[tuple[Configuration, ReportRow, ReportRow]]:
    """Configurations of one threshold, with their rows on validation and test: of each head type those that no other
    threshold beats on validation. Thresholds are the percentiles of the confidences there.
    """
    problems = {split: problem_of(point, split) for split in ("validation", "test")}
    validation = problems["validation"]
    num_positions = len(validation.costs.positions)
    found = []
    for head, name in enumerate(validation.costs.head_types):
        shares = np.linspace(0, 1, _NUM_THRESHOLDS)
        thresholds = np.unique(np.quantile(validation.confidence_PHN[:, head], shares, method="lower"))
        every = [Configuration(((head, float(threshold)),) * num_positions) for threshold in thresholds]
        points = [validation.evaluate(one) for one in every]
        mask = pareto_front([one.accuracy for one in points], [one.macs for one in points])
        for configuration in (one for one, kept in zip(every, mask, strict=True) if kept):
            validation_row, test_row = (
                _row(point, split, name, configuration, problem.evaluate(configuration))
                for split, problem in problems.items()
            )
            found.append((configuration, validation_row, test_row))
    return found


def problem_of(point: Point, split: str) -> Problem:
    """The recorded outputs of a point that thresholds are compared on; of validation those that the search sees."""
    source = RunDir(point, "record")
    problem = Problem.from_record(Record.open(source / split), source.costs(), confidence_of(point))
    return problem.of(choosing_samples(point, split, problem.num_samples))


def _row(point: Point, split: str, head_type: str, configuration: Configuration, measured: OperatingPoint) -> ReportRow:
    return ReportRow.of(
        measured,
        source=ONE_THRESHOLD,
        method=f"{point.method}, {head_type}",
        seed=point.config.seed,
        ce_ic_tradeoff=None,
        accuracy_weight=None,
        split=split,
        point_id=point.id,
        configuration=json.dumps(configuration.to_json()),
    )
