"""The infer job: chooses an operating point within the budget, runs it, and holds the result against the record."""

import csv
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynexit.core.confidence import margin
from dynexit.core.cost import ExitCosts
from dynexit.core.exit_policy import exit_index_from_gates
from dynexit.core.latency import LatencyTable
from dynexit.core.tradeoff import Configuration, apply_configuration, configuration_macs_L, operating_point
from dynexit.data import Split, load_batches
from dynexit.deploy.engine import Engine
from dynexit.deploy.probe import measured_tolerance
from dynexit.deploy.router import Answers, Router, join
from dynexit.deploy.stream import stream
from dynexit.dist import Ranks
from dynexit.errors import Failure, UserError, counted
from dynexit.files import spreadsheet_text
from dynexit.jobs.finished import class_names, measured_times
from dynexit.jobs.load import begin, load_heads, quickened
from dynexit.record.shards import Record
from dynexit.report.times import measured_batch_sizes
from dynexit.run_dir import HEADS, RunDir, atomic_write
from dynexit.search.operating_points import BASELINES, ReportRow, read_csv
from dynexit.search.problem import Problem
from dynexit.study.grid import Point, canonical_json, digest
from dynexit.study.outcomes import InferSettings

_GROUP_BYTES = 1 << 26  # of images
_BATCH_SIZE = 256  # if no times were measured
_NUM_COMPARED = 64  # images whose confidences are compared with the record's


def run_infer(points: Sequence[Point]) -> Path:
    """Classifies a split with the best configuration within the budgets of infer, really leaving early.

    Leaves predictions.csv and summary.json in infer/<id>, prints the summary and returns the folder. Raises UserError
    where no operating point is within the budget, Failure where the predictions differ from the record by more than
    near-ties.
    """
    settings = points[0].config.infer
    rows = read_csv(points[0].study_dir / "report" / "operating_points.csv")
    chosen = choose(rows, settings)
    point = next(one for one in points if chosen.chosen_by in (one.id, one.ids["search"]))
    config = point.config
    ranks, data, model, costs = begin(point)
    heads, gates = load_heads([point], model)
    engine = Engine(quickened(model, config.exits), costs.head_types, heads, gates)
    configuration = Configuration.from_json(json.loads(chosen.configuration)) if chosen.configuration else None
    samples = data.split(settings.split)
    checkpoint = RunDir(point, "train").digest(HEADS)
    record = Record.open(RunDir(point, "record") / settings.split, checkpoint)
    router = engine.router(configuration, config.search.confidence, _tolerance(engine, record, samples, ranks))
    table = _table_of_times(point, ranks)
    batch_size = settings.batch_size or (table.batch_sizes[-1] if table else _BATCH_SIZE)
    settings = settings.model_copy(update={"batch_size": batch_size})
    batches = _TimedBatches(engine, router, samples, batch_size, ranks)
    answers, seconds = _classify(router, batches, batch_size, ranks)
    expected = expected_exits(record, costs, configuration, config.search.confidence)
    summary = {"tolerance": router.tolerance, **_compare(answers, samples, record, expected, costs, router.tolerance)}
    summary |= {
        "point": point.label,
        "source": chosen.source,
        "accuracy_weight": chosen.accuracy_weight,
        "configuration": configuration.to_json() if configuration else None,
        "split": settings.split,
        "seconds": seconds,
        "backbone_seconds": batches.backbone_seconds,
        "images_per_second": len(samples) / seconds,
        "backbone_images_per_second": len(samples) / batches.backbone_seconds,
        "speed_up": batches.backbone_seconds / seconds,
        "predicted_speed_up": _predicted_speed_up(point, configuration, summary["exit_counts"], table, batch_size),
    }
    identity = digest([chosen.chosen_by, chosen.configuration, json.loads(canonical_json(settings))])
    directory = RunDir(point, "infer", identity)
    _write_predictions(directory / "predictions.csv", answers, samples, class_names(point))
    directory.write_json("summary.json", summary)
    directory.mark_done(["predictions.csv", "summary.json"])
    _print(summary, settings, directory / "predictions.csv")
    if summary["unexplained_differences"]:
        raise Failure(
            f"{counted(summary['unexplained_differences'], 'sample')} left elsewhere than the record says without "
            f"being near a threshold; the record in {record.source} is of another machine or model: record again"
        )
    return directory.path


def choose(rows: Sequence[ReportRow], settings: InferSettings) -> ReportRow:
    """The validation row of the best operating point within the budgets: highest accuracy, then fewest MACs; with a
    risk the fewest MACs.

    Raises UserError if there is none, naming the nearest attainable one.
    """
    ours = [row for row in rows if row.split == "validation" and row.source not in ("backbone", *BASELINES)]
    candidates = [row for row in ours if settings.source in ("any", row.source)]
    if not candidates:
        raise UserError(f"infer.source = {settings.source}: the study has no such operating point")
    if settings.relative_macs is not None:
        candidates = _within(candidates, "relative_macs", settings.relative_macs, lambda row: row.relative_macs)
    if settings.latency_ms is not None:
        batch = _measured_batch(candidates, settings.latency_batch_size)
        timed = [row for row in candidates if row.times]
        candidates = _within(timed, "latency_ms", settings.latency_ms, lambda row: row.time(batch).latency_ms)
    if settings.risk is not None:
        certified = [row for row in candidates if row.certified_risk is not None]
        if not certified:
            raise UserError(
                "infer.risk: no operating point has a certificate; set search.risk, and run the study again"
            )
        within = _within(certified, "risk", settings.risk, lambda row: row.certified_risk or 0.0)
        return min(within, key=lambda row: (row.macs, -row.accuracy))
    return min(candidates, key=lambda row: (-row.accuracy, row.macs))


def _within(
    rows: Sequence[ReportRow], name: str, most: float, cost_of: Callable[[ReportRow], float]
) -> list[ReportRow]:
    within = [row for row in rows if cost_of(row) <= most]
    if not within:
        least = min(rows, key=cost_of)
        raise UserError(
            f"infer.{name} = {most:g}: no operating point is within it; the nearest has {cost_of(least):.4g} "
            f"(validation accuracy {least.accuracy:.4f})"
        )
    return within


def _measured_batch(rows: Sequence[ReportRow], asked: int | None) -> int:
    measured = measured_batch_sizes(rows)
    if not measured:
        raise UserError("infer.latency_ms: no time was measured; set search.latency=measured, and run the study again")
    if asked not in (None, *measured):
        sizes = ", ".join(map(str, measured))
        raise UserError(f"infer.latency_batch_size = {asked}: measured are {sizes}; name one, or add it to bench")
    return asked or measured[0]


def expected_exits(
    record: Record, costs: ExitCosts, configuration: Configuration | None, confidence: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the exit that each sample takes by the record (N,), and for each exit (L,) its MACs and its row there."""
    num_types, last = len(costs.head_types), len(record.rows) - 1
    if configuration is None:
        assert record.gate is not None
        exit_N = exit_index_from_gates(torch.from_numpy(np.ascontiguousarray(record.gate))).numpy()
        return exit_N, costs.macs_L(), np.array([*range(0, last, num_types), last])
    rows_L = np.array([p * num_types + max(head, 0) for p, (head, _) in enumerate(configuration.exits)] + [last])
    problem = Problem.from_record(record, costs, confidence)
    exit_N, _ = apply_configuration(configuration, problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N)
    return exit_N, configuration_macs_L(configuration, problem.costs), rows_L


class _TimedBatches:
    """Batches of a split on the device. The whole backbone runs on groups of them before they are given out.

    Groups, since a stream takes a fifth longer while the backbone takes its place in the caches after every batch.
    `seconds` is what loading and the backbone took, `backbone_seconds` the backbone's share of it. The backbone runs in
    the tiles in which the router would run it.
    """

    def __init__(self, engine: Engine, router: Router, samples: Split, batch_size: int, ranks: Ranks) -> None:
        self._engine, self._router, self._samples, self._ranks = engine, router, samples, ranks
        self._batch_size = batch_size
        self._group_size = max(_GROUP_BYTES // (4 * math.prod(engine.model.backbone.input_size) * batch_size), 1)
        self.seconds, self.backbone_seconds = 0.0, 0.0

    def __iter__(self) -> Iterator[Tensor]:
        order, start = list(range(len(self._samples))), _now(self._ranks)
        batches = [order[i : i + self._batch_size] for i in range(0, len(order), self._batch_size)]
        loaded = (images for _, images, _ in load_batches(self._samples, batches, ranks=self._ranks))
        prepared = set[int]()
        while group := list(itertools.islice(loaded, self._group_size)):
            for images in group:
                if len(images) not in prepared:  # the first pass of each size pays for what is set up once
                    self._router.classify(images), self._engine.plain(images)
                    prepared.add(len(images))
            before = _now(self._ranks)
            for images in group:
                self._engine.plain(images)
            now = _now(self._ranks)
            self.seconds, self.backbone_seconds = self.seconds + now - start, self.backbone_seconds + now - before
            yield from group
            start = _now(self._ranks)
        self.seconds += _now(self._ranks) - start


def _tolerance(engine: Engine, record: Record, samples: Split, ranks: Ranks) -> float:
    """How far confidences lie from the record's, by some images of the split. Raises Failure if too far."""
    places = np.unique(np.linspace(0, len(samples) - 1, _NUM_COMPARED).astype(int))
    [(_, images, _)] = load_batches(samples, [places.tolist()], ranks=ranks)
    return measured_tolerance(images, engine, record.probability()[:-1, places])


def _classify(router: Router, batches: _TimedBatches, batch_size: int, ranks: Ranks) -> tuple[Answers, float]:
    """The router's answers for all batches, as a stream unless images come one by one, and the seconds they took."""
    start = _now(ranks)
    single = batch_size == 1
    answers = join(list(map(router.classify, batches) if single else stream(router, batches, batch_size)))
    return answers, _now(ranks) - start - batches.seconds


def _table_of_times(point: Point, ranks: Ranks) -> LatencyTable | None:
    """The times that the search read; None without, and of another device."""
    table = measured_times(point, "search") if point.is_by_time else None
    return table if table and table.machine["device"] == ranks.device.type else None


def _predicted_speed_up(
    point: Point,
    configuration: Configuration | None,
    exit_counts: Sequence[int],
    table: LatencyTable | None,
    batch_size: int,
) -> float | None:
    """By the times of this batch size, if images leave so often at each exit; None if they were not measured."""
    if table is None or batch_size not in table.batch_sizes:
        return None
    heads = [0] * len(table.positions) if configuration is None else [head for head, _ in configuration.exits]
    gates = configuration is None or point.config.search.confidence == "gate"
    num_images = sum(exit_counts)
    shares = [count / num_images for count in exit_counts]
    return 1 / table.relative_as_stream(heads, shares, batch_size, num_images, gates=gates)


def _now(ranks: Ranks) -> float:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _compare(
    answers: Answers,
    samples: Split,
    record: Record,
    expected: tuple[np.ndarray, np.ndarray, np.ndarray],
    costs: ExitCosts,
    tolerance: float,
) -> dict[str, Any]:
    exit_N, prediction_N = answers.exit_index_B, answers.prediction_B
    expected_N, macs_L, rows_L = expected
    correct_N = prediction_N == samples.labels.numpy()
    measured = operating_point(exit_N, np.broadcast_to(correct_N, (len(macs_L), len(exit_N))), macs_L, costs.full_macs)
    recorded_N = record.prediction()[rows_L[expected_N], np.arange(len(exit_N))]
    differs_N = (exit_N != expected_N) | (prediction_N != recorded_N)
    near_N = answers.near_B
    # two classes as likely as each other may change places without a threshold being near
    tied_N = (exit_N == expected_N) & (margin(torch.from_numpy(answers.logits_BK)).numpy() <= 2 * tolerance)
    return {
        "accuracy": measured.accuracy,
        "macs": measured.macs,
        "relative_macs": measured.relative_macs,
        "exit_counts": np.bincount(exit_N, minlength=len(macs_L)).tolist(),
        "num_samples": len(exit_N),
        "near_a_threshold": int(near_N.sum()),
        "differences_near_a_threshold": int((differs_N & near_N).sum()),
        "unexplained_differences": int((differs_N & ~near_N & ~tied_N).sum()),
    }


def _write_predictions(path: Path, answers: Answers, samples: Split, class_names: Sequence[str] | None) -> None:
    """One row per sample. Classes without names have their numbers; samples without files have empty cells."""
    labels, predictions = samples.labels.tolist(), answers.prediction_B.tolist()
    files = samples.file_names() or [""] * len(samples)

    def name(label: int) -> str:
        return str(label) if class_names is None else str(spreadsheet_text(class_names[label]))

    # a file's name may hold bytes that are no UTF-8
    with (
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", "label", "prediction", "exit", "label_name", "prediction_name", "file"])
        names = (map(name, labels), map(name, predictions), files)
        writer.writerows(
            zip(range(len(samples)), labels, predictions, answers.exit_index_B.tolist(), *names, strict=True)
        )


def _print(summary: dict[str, Any], settings: InferSettings, predictions: Path) -> None:
    budgets = {name: getattr(settings, name) for name in ("relative_macs", "latency_ms", "risk")}
    within = " and ".join(f"{name} {most:g}" for name, most in budgets.items() if most is not None)
    chosen = f"the best within {within}" if within else "the most accurate"
    print(f"{summary['point']} ({summary['source']}), {chosen}: {summary['num_samples']} {summary['split']} images")
    print(f"accuracy {summary['accuracy']:.4f} at {summary['relative_macs']:.4f} of the backbone's MACs")
    print(f"left at each exit: {summary['exit_counts']} (the last is the backbone's own classifier)")
    predicted = summary["predicted_speed_up"]
    print(
        f"{summary['images_per_second']:.0f} images/s, {summary['speed_up']:.2f} times the whole backbone's "
        f"{summary['backbone_images_per_second']:.0f} images/s on the same batches of {settings.batch_size}"
        + (f" ({predicted:.2f} by the times of stage bench)" if predicted else "")
    )
    if summary["speed_up"] < 1:
        print("that is slower than the backbone alone; infer.latency_ms chooses by measured times")
    print(
        f"{counted(summary['near_a_threshold'], 'sample')} within {summary['tolerance']:.2g} of a threshold, "
        f"{summary['differences_near_a_threshold']} of them decided otherwise than in the record, "
        f"{counted(summary['unexplained_differences'], 'other difference')}"
    )
    print(f"predictions: {predictions}")
