"""The save job: operating points of a finished study as a model folder that needs neither the study nor its data.

Shapes: P positions, H head types, L exits, R rows of a record, N samples, n inputs of the probe, K classes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from dynexit.data import load_data, workers_of
from dynexit.data.sources.python import gives_tensors
from dynexit.data.transforms import GREY, mean_and_std, recipe_of
from dynexit.deploy.assembly import attach_exits
from dynexit.deploy.card import CardKind, write_card
from dynexit.deploy.description import FORMAT, Preprocessing, SavedPoint
from dynexit.deploy.engine import Engine, largest_tile
from dynexit.deploy.model_folder import backbone_config, write_folder
from dynexit.deploy.probe import make_probe, measured_tolerance
from dynexit.dist import start_ranks
from dynexit.errors import Failure, UserError
from dynexit.jobs.finished import class_names
from dynexit.jobs.load import check_images, load_heads, load_model
from dynexit.jobs.recorded import RecordedTraining
from dynexit.models.backbones import Backbone
from dynexit.models.cut.backbone import OwnBackbone
from dynexit.models.cut.own import stages_of
from dynexit.provenance import commit, read_provenance
from dynexit.report.table import FrontPoint, front_of
from dynexit.report.times import measured_batch_sizes
from dynexit.run_dir import BACKBONE, HEADS, RunDir
from dynexit.search.operating_points import ReportRow, read_csv
from dynexit.study.data.names import OWN
from dynexit.study.grid import Point
from dynexit.study.schema import DataSettings
from dynexit.version import installed_version

_NUM_PROBES = 8


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """An operating point that is saved, and the point of the study whose heads it uses."""

    name: str
    point: Point
    front: FrontPoint

    @property
    def row(self) -> ReportRow:
        return self.front.validation


def run_save(
    points: Sequence[Point],
    directory: Path,
    *,
    relative_macs: float | None = None,
    latency_ms: float | tuple[float, int] | None = None,
    identity: str | None = None,
) -> tuple[SavedPoint, ...]:
    """Writes the model folder and returns its operating points: the study's validation front by MACs, where times were
    measured the fronts by time of every batch size, and the backbone alone.

    With `relative_macs` only the most accurate point within that share of the backbone's MACs; with `latency_ms` within
    that mean time of a batch of the smallest size measured, or of B images for (milliseconds, B). `identity` (how an id
    begins) limits the choice to one training, search or prepared backbone. Raises UserError for an unattainable target,
    an unknown id, several backbones, a study without a report and a folder that exists; Failure for other answers than
    the record's.
    """
    chosen = _choose(points, _Target(relative_macs, latency_ms), identity)
    first = chosen[0].point
    ranks = start_ranks("cpu", first.config.dist.num_threads)
    data = load_data(first.config.data, workers_of(first.config.dist, ranks.device), checked=True)
    check_images(first, data)
    backbone = load_model(first, ranks)[0].backbone
    trained = {one.point.id: one.point for one in chosen}
    records = {identity: RecordedTraining.of(point, data) for identity, point in trained.items()}
    engines, states = _engines(backbone, records)
    saved = tuple(records[one.point.id].saved_point(one.name, one.row, one.front.test) for one in chosen)
    places = np.linspace(0, len(data.validation) - 1, _NUM_PROBES).astype(int)
    images = data.validation.__getitems__(places.tolist())[1]
    tolerance = _checked_tolerance(images, engines, records, saved, places)
    class_names = _class_names(first, backbone.num_classes)
    mean, std = _mean_and_std(first, data.in_channels)
    architecture = backbone.name if isinstance(backbone, OwnBackbone) else backbone.name.split(".")[0]
    write_folder(
        directory,
        description={
            "format": FORMAT,
            "dynexit": installed_version(),
            "trainings": {training: records[training].saved_training() for training in trained},
            "points": saved,
            "preprocessing": Preprocessing(data=_preprocessing(first, data.in_channels)),
            "class_names": class_names,
            "tolerance": tolerance,
            "provenance": _provenance(first, trained),
            "backbone_precision": first.config.backbone.precision,
        },
        config=backbone_config(backbone, first.config.backbone.arguments, class_names, mean, std),
        backbone=backbone,
        heads=states,
        probe=make_probe(images, engines, saved),
        card=write_card(
            first.config.report.title or first.config.name,
            architecture,
            saved,
            class_names,
            backbone.input_size,
            kind=_kind_of(backbone),
        ),
    )
    return saved


def _engines(
    backbone: Backbone, records: Mapping[str, RecordedTraining]
) -> tuple[dict[str, Engine], dict[str, dict[str, Tensor]]]:
    """By training the engine, and the weights of heads and gates."""
    engines, states = {}, {}
    for training, record in records.items():
        model = attach_exits(backbone, record.costs.positions, record.point.config.exits)
        heads, gates = load_heads([record.point], model)
        engines[training] = Engine(model, record.costs.head_types, heads, gates, largest_tile(model))
        states[training] = heads.member_state(0) | ({} if gates is None else gates.member_state(0))
    return engines, states


@dataclasses.dataclass(frozen=True)
class _Target:
    """What the one saved operating point is chosen by; all None: there are several."""

    relative_macs: float | None
    latency_ms: float | tuple[float, int] | None

    def best(self, front: Sequence[FrontPoint], rows: Sequence[ReportRow]) -> list[FrontPoint]:
        """The point, or the front and what goes with it. Raises UserError for an unattainable target."""
        if self.relative_macs is not None:
            within = [one for one in front if one.validation.relative_macs <= self.relative_macs]
            if not within:
                least = front[0].validation
                raise UserError(
                    f"--relative-macs {self.relative_macs:g} is unattainable: the cheapest operating point takes "
                    f"{least.relative_macs:.4f} of the backbone's MACs (validation accuracy {least.accuracy:.4f})"
                )
            return [min(within, key=lambda one: (-one.validation.accuracy, one.validation.macs))]
        sizes = measured_batch_sizes(rows)
        if self.latency_ms is None:
            more = [one for batch in sizes for one in _early_front(rows, batch)]
            by_key = {one.validation.key: one for one in (*more, *front)}
            return _with_certified(list(by_key.values()), rows)
        if not sizes:
            raise UserError("--latency-ms needs measured times; run the study with search.latency=measured first")
        limit, batch = self.latency_ms if isinstance(self.latency_ms, tuple) else (self.latency_ms, sizes[0])
        if batch not in sizes:
            raise UserError(f"--batch-size {batch}: times were measured for {', '.join(map(str, sizes))}")
        timed = _early_front(rows, batch)
        if not timed:
            raise UserError(
                f"--latency-ms {limit:g}: at batch size {batch} the backbone alone is faster than all exits; give "
                "another --batch-size, or choose by --relative-macs"
            )
        milliseconds = [one.validation.time(batch).latency_ms for one in timed]
        within = [one for one, time in zip(timed, milliseconds, strict=True) if time <= limit]
        if not within:
            least = timed[0].validation
            raise UserError(
                f"--latency-ms {limit:g} is unattainable at batch size {batch}: the fastest operating point "
                f"takes {milliseconds[0]:.4g} ms (validation accuracy {least.accuracy:.4f})"
            )
        return [min(within, key=lambda one: (-one.validation.accuracy, one.validation.time(batch).latency_ms))]


def _early_front(rows: Sequence[ReportRow], batch_size: int | None = None) -> list[FrontPoint]:
    """The front by MACs, or by time at a batch size, without the backbone alone."""
    kept = [row for row in rows if batch_size is None or row.times]
    return [one for one in front_of(kept, batch_size) if one.validation.source != "backbone"]


def _kind_of(backbone: Backbone) -> CardKind:
    if isinstance(backbone, OwnBackbone):
        return "own" if stages_of(backbone) is not None else "own_code"
    return "timm" if timm.is_model(backbone.name.split(".")[0]) else "t2t_vit"


def _choose(points: Sequence[Point], target: _Target, identity: str | None) -> list[_Chosen]:
    table = points[0].study_dir / "report" / "operating_points.csv"
    if not table.is_file():
        raise UserError(f"{table} is missing: the study has no report; run `dynexit run` on it first")
    if identity is not None:
        points = [point for point in points if any(one.startswith(identity) for one in point.ids.values())]
        if not points:
            raise UserError(f"no point's id begins with {identity!r}; the report and `dynexit status` show the ids")
    backbones = sorted({point.ids["prepare"] for point in points})
    if len(backbones) > 1:
        raise UserError(
            f"the study has {len(backbones)} backbones, and a folder holds one; choose one with --point and its "
            f"id, {', '.join(backbones)}, or the id of a training"
        )
    by_id = {one: point for point in points for one in (point.id, point.ids["search"])}
    rows = [row for row in read_csv(table) if row.chosen_by in by_id or row.point_id == backbones[0]]
    alone = front_of(row for row in rows if row.source == "backbone")
    front = _early_front(rows)
    if not alone or not front:
        raise UserError(f"{table} has no operating point of these points; run `dynexit run` on the study again")
    chosen = [_Chosen("", by_id[one.validation.chosen_by], one) for one in target.best(front, rows)]
    return [*_named(chosen), _Chosen("backbone", chosen[-1].point, alone[0])]


def _with_certified(front: Sequence[FrontPoint], rows: Sequence[ReportRow]) -> list[FrontPoint]:
    """The front, and points whose risk is certified, which need not be on it; by rising relative MACs."""
    there = {one.validation.key for one in front}
    tests = {row.key: row for row in rows if row.split == "test"}
    certified = [row for row in rows if row.split == "validation" and row.certified_risk and row.key not in there]
    more = [FrontPoint(row, tests[row.key], math.nan) for row in certified]
    return sorted([*front, *more], key=lambda one: one.validation.relative_macs)


def _named(chosen: Sequence[_Chosen]) -> list[_Chosen]:
    """With a name each, as `macs-0.293`; a number follows where several round to the same."""
    counts: dict[str, int] = {}
    named = []
    for one in chosen:
        name = f"macs-{one.row.relative_macs:.3f}"
        counts[name] = counts.get(name, 0) + 1
        named.append(dataclasses.replace(one, name=name if counts[name] == 1 else f"{name}-{counts[name]}"))
    return named


def _checked_tolerance(
    images: Tensor,
    engines: Mapping[str, Engine],
    records: Mapping[str, RecordedTraining],
    points: Sequence[SavedPoint],
    places: np.ndarray,
) -> float:
    """How far confidences may lie apart. Raises Failure for answers other than the record's by more than that."""
    recorded = {training: one.records["validation"].probability() for training, one in records.items()}
    tolerance = max(measured_tolerance(images, engines[key], p_RN[:-1, places]) for key, p_RN in recorded.items())
    for point in points:
        expected_N, _ = records[point.training].expected(point.configuration, point.confidence, "validation")
        router = engines[point.training].router(point.configuration, point.confidence, tolerance)
        answers = router.classify(images)
        if ((answers.exit_index_B != expected_N[places]) & ~answers.near_B).any():
            raise Failure(
                f"{point.name}: the model leaves at exits {answers.exit_index_B.tolist()} where the record has "
                f"{expected_N[places].tolist()}; record the study again"
            )
    return tolerance


def _takes_tensors(data: DataSettings) -> bool:
    return data.name.startswith(OWN) and gives_tensors(data)


def _mean_and_std(point: Point, channels: int) -> tuple[Sequence[float], Sequence[float]]:
    data = point.config.data
    if _takes_tensors(data):
        return [0.0] * channels, [1.0] * channels
    return mean_and_std(data.model_copy(update={"channels": channels}))


def _class_names(point: Point, num_classes: int) -> tuple[str, ...]:
    """Those that prepare stored; numbers if the data set has none."""
    return tuple(class_names(point) or map(str, range(num_classes)))


def _preprocessing(point: Point, channels: int) -> dict[str, Any]:
    """What image files need of the section `data`, so that a later change of a default changes nothing."""
    data = point.config.data
    content = data.model_dump(mode="json", include={"name", "image_size", "test_transform", "normalisation"})
    if data.name not in GREY and not _takes_tensors(data):
        content["normalisation"] = data.normalisation or recipe_of(data).normalisation
        content["channels"] = channels if channels in (1, 3) else None
    if data.labels is not None:
        content["labels"] = Path(data.labels).name  # decides on default transforms
    return content


def _provenance(point: Point, trained: Mapping[str, Point]) -> dict[str, Any]:
    return {
        "study": point.config.name,
        "data": point.config.data.name,
        "prepare": point.ids["prepare"],
        "backbone_sha256": RunDir(point, "prepare").digest(BACKBONE),
        "heads_sha256": {training: RunDir(one, "train").digest(HEADS) for training, one in trained.items()},
        "torch": torch.__version__,
        "commit": commit(),
        "timm": timm.__version__,
        "jobs": [*filter(None, map(_job, [RunDir(point, "prepare"), *(RunDir(p, "train") for p in trained.values())]))],
    }


_PERSONAL = ("host", "user", "slurm_job", "command")


def _job(directory: RunDir) -> dict[str, Any]:
    """What made the folder's files, and when. Names of people, computers and paths are left out."""
    found: Mapping[str, Any] = read_provenance(directory.path) or {}
    return {name: value for name, value in found.items() if name not in _PERSONAL}
