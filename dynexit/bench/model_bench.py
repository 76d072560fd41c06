"""`dynexit bench` on a model folder: what operating points take on this machine, beside the plain model."""

import csv
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynexit.bench.figure import accuracy_figure
from dynexit.bench.images import mixed_images, with_shares
from dynexit.bench.machine import describe_machine
from dynexit.bench.measure import clock, measure_times, timing_engine
from dynexit.bench.runtimes import Runtime, make_runtime
from dynexit.bench.shrinking import with_shrinking
from dynexit.core.latency import BatchTimes, LatencyTable, sizes_to_measure
from dynexit.deploy.description import SavedPoint
from dynexit.deploy.model import EarlyExitModel, load
from dynexit.errors import UserError
from dynexit.run_dir import atomic_write, write_json

_BATCHES = 4  # of the largest batch size, so that exits are taken in the shares wanted
_WARM_UP = 1
FULL = "full model"


@dataclasses.dataclass(frozen=True)
class BenchRequest:
    """What is timed. `points` are shares of the plain model's time, or names of operating points.

    At most `rounds` rounds over all images, fewer (at least 3) where they take longer than `seconds`; there are at
    least `num_images`.
    """

    batch_sizes: Sequence[int] = (1, 8, 64)
    points: Sequence[str] = ("0.4", "0.6", "0.8")
    runtimes: Sequence[str] = ("torch",)
    device: str = "cpu"
    rounds: int = 15
    seconds: float = 30.0
    num_images: int = 128

    def __post_init__(self) -> None:
        wrong = next((size for size in self.batch_sizes if not isinstance(size, int) or size < 1), None)
        if wrong is not None or not self.batch_sizes:
            raise UserError(f"--batch {wrong}: batch sizes are 1 or more, as 1,8,64")


@dataclasses.dataclass(frozen=True)
class BenchRow:
    """An operating point, or the full model, in one runtime at one batch size.

    Latencies are of a batch, by the clock on the wall. `images_per_second` and `speed_up`, the full model's time over
    the point's in the same runtime, are of medians of rounds in turn (processor time on a CPU with one thread). The
    speed-up is predicted by MACs and by the times of the stages for the exits that the images took. Cells of the full
    model are None where they mean nothing.
    """

    runtime: str
    batch_size: int
    point: str
    asked: str
    accuracy: float
    relative_macs: float
    relative_time: float | None
    images_per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    speed_up: float
    predicted_by_macs: float | None = None
    predicted_by_time: float | None = None
    realised_over_macs: float | None = None
    realised_over_time: float | None = None


class _ModelBench:
    def __init__(self, model: EarlyExitModel, request: BenchRequest) -> None:
        self.model, self.request = model, request
        self.sizes = sorted(set(request.batch_sizes))
        self.images = mixed_images(model.probe["images"], max(request.num_images, _BATCHES * self.sizes[-1]))
        self.images = self.images.to(model.device)
        self.tables = self._tables()
        self.notes: dict[tuple[int, str], str] = {}
        """By batch size and share: why another point than asked for is timed."""

    def _tables(self) -> dict[str, LatencyTable]:
        """By training the times of stages and exits; trainings with the same exits share theirs."""
        machine = describe_machine(self.model.device, "float32")
        tables: dict[str, LatencyTable] = {}
        by_exits: dict[str, LatencyTable] = {}
        for identity, training in self.model.trainings.items():
            same = json.dumps([training.exits, training.precision, training.shrinkage], sort_keys=True)
            if same not in by_exits:
                engine = timing_engine(self.model.engines[identity].model, training.stack)
                times: dict[int, BatchTimes] = {}
                for batch in sizes_to_measure(self.sizes):
                    times[batch] = measure_times(engine, batch, 2, 20)
                positions = training.exit_costs.positions
                table = LatencyTable(positions, training.stack.head_types, times, machine, tuple(self.sizes))
                by_exits[same] = with_shrinking(engine, table, 2, 20)
            tables[identity] = by_exits[same]
        return tables

    def relative_time(self, point: SavedPoint, batch: int, exit_fractions: Sequence[float] | None = None) -> float:
        table = self.tables[point.training]
        gates = point.exits is None or point.confidence == "gate"
        heads = [0] * len(table.positions) if point.exits is None else [head for head, _ in point.exits]
        return table.relative(heads, exit_fractions or point.exit_fractions, batch, gates=gates)

    def chosen(self, batch: int) -> list[tuple[str, SavedPoint]]:
        """What was asked for and its point: the most accurate within a share of the time, else, noted, the fastest."""
        early = [point for point in self.model.points if point.source != "backbone"]
        times = {point.name: self.relative_time(point, batch) for point in early}
        found = []
        for asked in self.request.points:
            named = next((point for point in self.model.points if point.name == asked), None)
            if named is None:
                share = _share(asked, self.model.points)
                within = [point for point in early if times[point.name] <= share]
                named = max(within, key=lambda point: (point.accuracy, -times[point.name]), default=None)
                if named is None:
                    named = min(early, key=lambda point: times[point.name])
                    self.notes[batch, asked] = (
                        f"{asked} of the full model's time is unattainable at batch size {batch}; timed instead is the "
                        f"fastest operating point, {named.name}, predicted to take {times[named.name]:.3f}"
                    )
            found.append((asked, named))
        return found

    def rows(self, runtime: Runtime, batch: int) -> list[BenchRow]:
        chosen = self.chosen(batch)
        batches = [part for part in torch.split(self.images, batch) if len(part) == batch]
        ways = {point.name: self._way(runtime, point) for _, point in chosen}
        taken = {name: np.concatenate([way(part) for part in batches]) for name, way in ways.items()}
        calls: dict[str, Callable[[Tensor], object]] = {FULL: runtime.plain, **ways}
        timed = _timed_rounds(calls, batches, self.model.device, self.request)
        whole = next(point for point in self.model.points if point.source == "backbone")
        rows = [self._row((runtime.name, batch, FULL, ""), whole, timed, 1.0)]
        for asked, point in chosen:
            macs_L = self.model.trainings[point.training].macs_L(point.configuration, point.confidence)
            full_macs = self.model.trainings[point.training].exit_costs.full_macs
            relative_macs = float(macs_L[taken[point.name]].mean() / full_macs)
            fractions = (np.bincount(taken[point.name], minlength=len(macs_L)) / len(taken[point.name])).tolist()
            relative_time = self.relative_time(point, batch, fractions)
            row = self._row((runtime.name, batch, point.name, asked), point, timed, relative_macs)
            rows.append(
                dataclasses.replace(
                    row,
                    relative_time=relative_time,
                    predicted_by_macs=1 / relative_macs,
                    predicted_by_time=1 / relative_time,
                    realised_over_macs=row.speed_up * relative_macs,
                    realised_over_time=row.speed_up * relative_time,
                )
            )
        return rows

    def _way(self, runtime: Runtime, point: SavedPoint) -> Callable[[Tensor], np.ndarray]:
        way = with_shares(point, self.model.engines[point.training], self.images)
        return runtime.early(point, way)

    def _row(
        self, start: tuple[str, int, str, str], point: SavedPoint, timed: "_Timed", relative_macs: float
    ) -> BenchRow:
        """`start` are the first fields."""
        latencies = timed.latencies[start[2]]
        num_batches = len(latencies) / len(timed.seconds[start[2]])
        p50, p95, p99 = (1000 * float(np.percentile(latencies, rank)) for rank in (50, 95, 99))
        return BenchRow(
            *start,
            accuracy=point.accuracy,
            relative_macs=relative_macs,
            relative_time=1.0 if start[2] == FULL else None,
            images_per_second=start[1] * num_batches / float(np.median(timed.seconds[start[2]])),
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            speed_up=float(np.median(timed.seconds[FULL] / timed.seconds[start[2]])),
        )


@dataclasses.dataclass(frozen=True)
class _Timed:
    """By call its seconds in every round over all batches, and those of every batch by the clock on the wall."""

    seconds: dict[str, np.ndarray]
    latencies: dict[str, np.ndarray]


def _share(asked: str, points: Sequence[SavedPoint]) -> float:
    try:
        share = float(asked)
    except ValueError:
        share = 0.0
    if not 0 < share <= 2:
        names = ", ".join(point.name for point in points)
        raise UserError(f"--points {asked}: should be a share of the full model's time, as 0.6, or one of {names}")
    return share


def _timed_rounds(
    calls: dict[str, Callable[[Tensor], object]],
    batches: Sequence[Tensor],
    device: torch.device,
    request: BenchRequest,
) -> _Timed:
    """Calls take turns from batch to batch, so that a slow moment of the machine meets all of them."""
    names = list(calls)
    rounds: list[dict[str, float]] = []
    latencies: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for round_ in range(-_WARM_UP, request.rounds):
        totals = dict.fromkeys(names, 0.0)
        for number, images in enumerate(batches):
            turn = (number + round_) % len(names)
            for name in names[turn:] + names[:turn]:
                start, on_wall = clock(device), time.perf_counter()
                calls[name](images)
                totals[name] += clock(device) - start
                if round_ >= 0:
                    latencies[name].append(time.perf_counter() - on_wall)
        if round_ >= 0:
            rounds.append(totals)
        if len(rounds) >= 3 and time.perf_counter() - started > request.seconds:
            break
    return _Timed(
        {name: np.array([totals[name] for totals in rounds]) for name in names},
        {name: np.array(values) for name, values in latencies.items()},
    )


def bench_model(directory: Path, request: BenchRequest, out: Path) -> str:
    """Times a model folder and writes bench.csv, bench.json and accuracy_time.png into `out`. Returns it as text.

    Images are those of the folder's probe, mixed; thresholds are moved so that as many leave as on validation.
    Raises UserError for an unknown device, runtime or point, and a batch size below 1.
    """
    model = load(directory, device=request.device)
    for name in request.points:
        if name not in {point.name for point in model.points}:
            _share(name, model.points)
    with tempfile.TemporaryDirectory() as scratch:
        runtimes = [make_runtime(name, model, directory, Path(scratch)) for name in request.runtimes]
        bench = _ModelBench(model, request)
        rows = [row for runtime in runtimes for batch in bench.sizes for row in bench.rows(runtime, batch)]
    names = [field.name for field in dataclasses.fields(BenchRow)]
    with atomic_write(out / "bench.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(["" if value is None else value for value in dataclasses.astuple(row)] for row in rows)
    first = next(iter(bench.tables.values()))
    content: dict[str, Any] = {
        "folder": str(directory),
        "machine": dict(first.machine),
        "stages": {training: table.to_json() for training, table in bench.tables.items()},
        "notes": list(bench.notes.values()),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_json(out / "bench.json", content)
    curves = {
        batch: [(bench.relative_time(point, batch), point.accuracy) for point in model.points] for batch in bench.sizes
    }
    accuracy_figure(curves, rows, first, out / "accuracy_time.png")
    return "\n".join([bench_text(rows), *bench.notes.values(), stage_text(first)])


def bench_text(rows: Sequence[BenchRow]) -> str:
    """The rows as lines of text."""
    lines = [
        f"{'runtime':10}{'batch':>6}  {'point':22}{'asked':>8}{'accuracy':>9}{'images/s':>11}{'p50 ms':>9}{'p95 ms':>9}"
        f"{'p99 ms':>9}{'speed-up':>10}{'by MACs':>9}{'by time':>9}{'realised/predicted':>20}"
    ]
    for row in rows:
        line = (
            f"{row.runtime:10}{row.batch_size:6}  {row.point:22}{row.asked:>8}{100 * row.accuracy:8.2f}%"
            f"{row.images_per_second:11.1f}{row.p50_ms:9.3f}{row.p95_ms:9.3f}{row.p99_ms:9.3f}{row.speed_up:10.3f}"
        )
        if row.realised_over_time is not None:
            line += f"{row.predicted_by_macs:9.3f}{row.predicted_by_time:9.3f}"
            line += f"{row.realised_over_macs:12.3f} {row.realised_over_time:7.3f}"
        lines.append(line)
    return "\n".join(lines)


def stage_text(table: LatencyTable) -> str:
    """The table of stages and exits as lines of text, microseconds of a batch."""
    lines = ["microseconds of a batch: each stage, then its exit by head type"]
    for batch in table.batch_sizes:
        times = table.times[batch]
        parts = [
            f"{1e6 * stage:.0f} + {' | '.join(f'{1e6 * seconds:.0f}' for seconds in row)}"
            for stage, row in zip(times.stages, times.heads, strict=False)
        ]
        lines.append(f"  batch {batch}: {', '.join([*parts, f'{1e6 * times.stages[-1]:.0f}'])}")
    return "\n".join(lines)
