"""What is done of a point, read from the files that its jobs left: no model, no tensors."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynexit.contents import Classes, Done, FailedTraining, Found, JobProgress, MetricsRow
from dynexit.core.latency import LatencyTable
from dynexit.errors import Failure, UserError
from dynexit.record.shards import Record, has_shards
from dynexit.run_dir import (
    BEGUN,
    BUDGETS,
    CLASSES,
    DONE,
    FAILED,
    LATENCY,
    MEMBERS,
    METRICS,
    PROGRESS,
    RunDir,
    folders_in_place,
    is_done,
    move_aside,
    read_json,
)
from dynexit.study.baselines import static_points
from dynexit.study.grid import Point, digest
from dynexit.study.schema import RecordSettings
from dynexit.study.stages import BENCH

SPLITS = ("validation", "test")
_REPORT_FORMAT = 4  # of the report's tables; one of another format is made again
_MOST_CHECKED_BYTES = 64 << 20
_MOST_FULL_CLASSES = 10


def recorded_splits(settings: RecordSettings) -> tuple[str, ...]:
    """The splits that are recorded."""
    return (*SPLITS, "train") if settings.train else SPLITS


def default_topk(num_classes: int) -> int:
    """How many classes are recorded where record.topk is null: all of few, else the prediction alone."""
    return num_classes if num_classes <= _MOST_FULL_CLASSES else 1


def is_recorded(point: Point, *, check_sizes: bool = False, check_bytes: bool = False) -> bool:
    """Whether `point` has a finished record of every split.

    A split that was moved aside, or its folder of shards, is recorded again. Raises Failure, naming the file, where a
    manifest is damaged; with `check_sizes` where a shard is missing or of another size, and with `check_bytes` also
    where one of a small record (up to 64 MiB a split) was altered; in a larger one that is found when the shard is
    first read.
    """
    directory = RunDir(point, "record")
    if not directory.is_done(check_bytes=check_bytes):
        return False
    folders = [directory / split for split in recorded_splits(point.config.record)]
    if not all(map(has_shards, folders)):
        return False
    for folder in folders if check_sizes or check_bytes else ():
        record = Record.open(folder)
        if check_bytes and record.layout.num_bytes(record.num_samples) <= _MOST_CHECKED_BYTES:
            for _ in record.parts():
                pass  # reading a part checks its bytes
    return True


def is_searched(point: Point, *, check_bytes: bool = False) -> bool:
    """Whether `point` has a finished search, of the times that were measured last where it is by time.

    Raises Failure, naming the file, where something finished was damaged.
    """
    directory, bench = RunDir(point, "search"), RunDir(point, BENCH)
    if not directory.is_done(check_bytes=check_bytes):
        return False
    return not point.is_by_time or (bench.is_done() and directory.digest(LATENCY) == bench.digest(LATENCY))


def measured_times(point: Point, stage: str = BENCH) -> LatencyTable:
    """The times that stage bench measured for the point; with `stage` search those that its search read.

    Raises Failure, naming the file, where they are damaged or of another model or device.
    """
    directory, config = RunDir(point, stage), point.config
    path = directory / LATENCY
    try:
        table = LatencyTable.from_json(directory.read_json(LATENCY))
    except FileNotFoundError:
        raise Failure(f"{path} is missing; run `dynexit bench` on the study") from None
    except ValueError as error:
        raise Failure(f"{path} is damaged: {error}; {move_aside(directory.path)}") from error
    wanted = {"backbone": config.backbone.name} | (
        {} if config.bench.device == "auto" else {"device": config.bench.device}
    )
    for name, value in wanted.items():
        if table.machine.get(name) != value:
            raise Failure(
                f"{path} was measured for the {name} {table.machine.get(name)!r}, the study has {value!r}; "
                f"{move_aside(directory.path)}"
            )
    if table.batch_sizes != tuple(sorted(config.bench.batch_sizes)):
        raise Failure(
            f"{path} has the batch sizes {list(table.batch_sizes)}, the study {sorted(config.bench.batch_sizes)}; "
            f"{move_aside(directory.path)}"
        )
    return table


def set_aside_stale(point: Point, checkpoint_sha256: str) -> list[Path]:
    """Moves what was recorded and searched of other weights of `point` aside, so that it is made again; the new names.

    A point that was trained again, alone after damage, has last bits of its own, and all of its outputs must be of the
    same weights. A record that is not finished cannot tell and goes too.
    """
    record = RunDir(point, "record").path
    if not record.is_dir() or all(_is_of(record / split, checkpoint_sha256) for split in SPLITS):
        return []
    moved = []
    for directory in (record, RunDir(point, "search").path):
        if directory.is_dir():
            number = sum(1 for _ in directory.parent.glob(f"{directory.name}.stale*"))
            moved.append(directory.rename(f"{directory}.stale{number or ''}"))
    return moved


def _is_of(folder: Path, checkpoint_sha256: str) -> bool:
    try:
        Record.open(folder, checkpoint_sha256)
    except (Failure, UserError, OSError):
        return False
    return True


def finished_jobs(point: Point) -> list[str]:
    """The jobs of the point that left DONE, in order."""
    return [stage for stage in point.stages if RunDir(point, stage).is_marked]


def stored_classes(point: Point) -> Classes | None:
    """What prepare stored of classes and images; None in folders of versions that stored nothing."""
    try:
        stored: Classes = RunDir(point, "prepare").read_json(CLASSES, Classes)
    except FileNotFoundError:
        return None
    return stored


def class_names(point: Point) -> list[str] | None:
    """The names of the classes by label, as prepare stored them; None in folders of versions that stored none."""
    stored = stored_classes(point)
    return None if stored is None else stored["names"]


def failure_reason(point: Point) -> str | None:
    """Why the point's training failed, or None."""
    try:
        reason: str = RunDir(point, "train").read_json(FAILED, FailedTraining)["reason"]
    except FileNotFoundError:
        return None
    return reason


def missing_reason(point: Point) -> str:
    """Returns why a point is not in the report."""
    finished = finished_jobs(point)
    missing = next((stage for stage in point.stages if stage not in finished), None)
    if missing is None and not is_recorded(point):
        return f"{point.label}: its record is missing; run `dynexit record` on the study"
    return failure_reason(point) or f"{point.label}: {missing or 'report'} is not done"


def unattained_budgets(points: Sequence[Point]) -> list[str]:
    """Returns a message for each budget that none of a study's searched points attains, with the nearest that one does.

    A budget that some attain is met by the best of them.
    """
    attained: set[tuple[str, float]] = set()
    refused: dict[tuple[str, float], dict[float, str]] = {}
    for point in points:
        settings = point.config.search
        if not (
            settings.relative_macs or settings.relative_latency or settings.min_accuracy or settings.max_accuracy_drop
        ):
            continue
        for entry in RunDir(point, "search").read_json(BUDGETS, list[Found]):
            ((kind, value), *_) = entry["budget"].items()
            if "unattainable" in entry:
                message = f"{entry['unattainable']} ({point.label})"
                refused.setdefault((kind, value), {}).setdefault(entry["nearest"], message)
            else:
                attained.add((kind, value))
    return [
        message[max(message) if kind == "min_accuracy" else min(message)]
        for (kind, value), message in refused.items()
        if (kind, value) not in attained
    ]


def _searched(point: Point) -> Any:
    try:
        return RunDir(point, "search").read_json(DONE, Done)
    except FileNotFoundError:
        return None


def report_identity(points: Sequence[Point]) -> str:
    """The id of a report: every point in it and what its search found, those that failed, and the report's settings."""
    found = [[point.ids["search"], _searched(point)] for point in (*points, *static_points(points))]
    config = points[0].config
    return digest([_REPORT_FORMAT, found, config.report.model_dump(mode="json"), config.baselines.one_threshold])


def report_is_done(points: Sequence[Point]) -> bool:
    """Whether the report of just these points, with what of them is finished now, is there and whole."""
    directory = points[0].study_dir / "report"
    try:
        found: Done = read_json(directory / DONE, Done)
    except FileNotFoundError:
        return False
    identity = report_identity(points)
    if found["id"] != identity:
        return False  # of other points, or of fewer
    return is_done(directory, identity, check_bytes=True)


def kept_row(point: Point, rows: Sequence[MetricsRow]) -> MetricsRow | None:
    """Which of the point's epochs, `rows`, its weights are of; None if that is not known, as in earlier versions."""
    if point.config.train.keep == "last" or len(rows) == 1:
        return rows[-1] if rows else None
    return next((row for row in reversed(rows) if row.get("improved")), None)


def last_figures(point: Point) -> str:
    """Accuracy and cost on validation after the last epoch and of the epoch whose weights are kept, as text."""
    rows = RunDir(point, "train").read_lines(METRICS)
    if not rows:
        return ""
    last, kept = rows[-1], kept_row(point, rows)
    if kept is last:
        return f"last epoch {last['epoch']}, kept{_figures(last)}"
    text = f"last epoch {last['epoch']}{_figures(last)}"
    return text if kept is None else f"{text}; kept {kept['epoch']}{_figures(kept)}"


def _figures(row: MetricsRow) -> str:
    if "validation_accuracy" not in row or "validation_relative_macs" not in row:
        return ""
    macs = row["validation_relative_macs"]
    return f": validation {100 * row['validation_accuracy']:.2f} % at {macs:.3f} relative MACs"


def _packs(study_dir: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folder of every pack and the ids of its members, by name."""
    for folder in folders_in_place(study_dir / "pack"):
        if (folder / MEMBERS).is_file():
            yield folder, read_json(folder / MEMBERS, list[str])


def unfinished_packs(study_dir: Path) -> list[list[str]]:
    """Ids of the members of every pack that began and is not complete, in the order of their folders."""
    return [members for folder, members in _packs(study_dir) if (folder / BEGUN).is_file()]


def pack_folders(study_dir: Path) -> dict[str, Path]:
    """The newest folder of a pack that each point is or was a member of, by its id."""
    by_age = sorted(_packs(study_dir), key=lambda pack: (pack[0] / MEMBERS).stat().st_mtime)
    return {identity: folder for folder, members in by_age for identity in members}


def read_progress(folder: Path) -> JobProgress | None:
    """The progress of a running job; None if it has noted none yet."""
    try:
        progress: JobProgress = read_json(folder / PROGRESS, JobProgress)
    except FileNotFoundError:
        return None
    return progress
