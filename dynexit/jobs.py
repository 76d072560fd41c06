"""The jobs: plain functions from configurations to run directories.

Each can be called again at any time, does only what is missing, and writes DONE last. A job that serves many points
(train, record) takes them together, since one pass of the backbone serves them all.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynexit.assemble import (
    BACKBONE,
    CONFIG,
    COSTS,
    HEADS,
    METRICS,
    build_model,
    load_heads,
    load_model,
    write_lines,
)
from dynexit.core.confidence import gate_features
from dynexit.core.cost import ExitCosts
from dynexit.data import DataSets, load_batches, load_data, workers_of
from dynexit.dist import start_ranks
from dynexit.errors import Failure
from dynexit.models.heads import StackedGates, StackedHeads
from dynexit.models.macs import exit_costs
from dynexit.progress import Progress
from dynexit.record.finished import default_topk, is_recorded, recorded_splits, set_aside_stale
from dynexit.run_dir import DONE, FAILED, done_digest, is_done, job_dir, mark_done, write_json
from dynexit.state import check_budgets, missing_reason, report_identity
from dynexit.sweep import Point, digest, method_settings
from dynexit.tensor_files import save_tensors
from dynexit.train.boosted import BoostedTask
from dynexit.train.dyce import DyceTask
from dynexit.train.independent import IndependentTask
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.pack import Member, Pack, PackTask
from dynexit.train.weighted import WeightedTask

TASK_BY_METHOD: dict[str, Callable[[Pack, Any], PackTask]] = {
    "jei_dnn": JeiDnnTask,
    "independent": IndependentTask,
    "boosted": BoostedTask,
    "weighted": WeightedTask,
    "dyce": DyceTask,
}


def prepare(points: Sequence[Point], study_dir: Path) -> None:
    """Fits the backbone that the points share to the data set: backbone.safetensors, costs.json, metrics.jsonl."""
    from dynexit.train.checkpoint import Checkpoints
    from dynexit.train.loop import fit
    from dynexit.train.transfer import TransferTask
    from dynexit.train.zero import check_installed

    config, identity = points[0].config, points[0].ids["prepare"]
    directory = job_dir(study_dir, "prepare", identity)
    if is_done(directory, identity):
        return
    ranks = start_ranks(config.dist.device, config.dist.num_threads)
    stage = config.dist.deepspeed_stage
    if stage is not None:
        check_installed(stage)
    data, settings = load_data(config.data, workers_of(config.dist, ranks.device)), config.prepare
    torch.manual_seed(config.data.seed)
    backbone = build_model(config, weights=True)
    costs = exit_costs(backbone, range(backbone.num_blocks - 1), config.exits.head_types)
    if stage is None or ranks.world_size == 1:  # DeepSpeed brings to a rank's device what is to lie there
        backbone.to(ranks.device)
    steps_per_epoch = -(-len(data.train) // settings.global_batch_size)
    task = TransferTask(backbone, settings, steps_per_epoch, config.data.seed, data.validation, ranks, stage)
    checkpoints = Checkpoints(directory, config.dist.checkpoint_seconds)
    progress = Progress("prepare", directory, config.dist.log_seconds, quiet=not ranks.is_main)
    fit(
        task,
        data.train,
        num_epochs=settings.num_epochs,
        global_batch_size=settings.global_batch_size,
        seed=config.data.seed,
        ranks=ranks,
        checkpoints=checkpoints,
        progress=progress,
    )
    weights = task.weights()
    if ranks.is_main:
        save_tensors(directory / BACKBONE, weights)
        write_json(directory / COSTS, costs.to_json())
        write_lines(directory / METRICS, task.rows)
        if task.rows:
            progress.say(f"the backbone is right on {task.rows[-1]['validation_accuracy']:.4f} of the validation split")
        mark_done(directory, identity, [BACKBONE, COSTS, METRICS])
        checkpoints.clear()
    ranks.wait()


def train(points: Sequence[Point], study_dir: Path) -> None:
    """Trains exit heads and gates of all `points` as one pack, and leaves heads.safetensors in a folder per point.

    A member whose loss is not finite is stopped; its folder gets FAILED.json and what was last good of it. The others
    are finished, then Failure is raised, naming it.
    """
    from dynexit.train.checkpoint import Checkpoints
    from dynexit.train.loop import fit

    points = [point for point in points if not is_done(job_dir(study_dir, "train", point.id), point.id)]
    if not points:
        return
    config = points[0].config
    ranks = start_ranks(config.dist.device, config.dist.num_threads)
    data = load_data(config.data, workers_of(config.dist, ranks.device), checked=True)
    model, costs = load_model(points[0], study_dir, ranks)
    members = [Member(p.config.seed, p.config.jei_dnn.ce_ic_tradeoff, p.label) for p in points]
    together = Pack(model, costs, members, config.train, data.validation, ranks, len(data.train), config.data.seed)
    task = TASK_BY_METHOD[config.train.method](together, method_settings(config))
    pack = pack_dir(study_dir, points)
    checkpoints = Checkpoints(pack, config.dist.checkpoint_seconds)
    if ranks.is_main:
        write_json(pack / "members.json", [point.id for point in points])
    progress = Progress(f"train {len(points)} points", pack, config.dist.log_seconds, quiet=not ranks.is_main)
    fit(
        task,
        data.train,
        num_epochs=config.train.num_epochs,
        global_batch_size=config.train.global_batch_size,
        seed=config.data.seed,
        ranks=ranks,
        checkpoints=checkpoints,
        progress=progress,
    )
    if ranks.is_main:
        for i, point in enumerate(points):
            _finish_point(point, study_dir, task.member_state(i), costs, _rows_of(task.rows, i), task.stopped.get(i))
        checkpoints.clear()
    ranks.wait()
    if task.stopped:
        raise Failure("; ".join(task.stopped.values()))


def pack_dir(study_dir: Path, points: Sequence[Point]) -> Path:
    """Where these points, trained together, keep log and checkpoints."""
    return job_dir(study_dir, "pack", digest([point.id for point in points]))


def _rows_of(rows: Sequence[Mapping[str, Any]], member: int) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "member"} for row in rows if row["member"] == member]


def _finish_point(
    point: Point,
    study_dir: Path,
    state: Mapping[str, Tensor],
    costs: ExitCosts,
    rows: Sequence[Mapping[str, Any]],
    stopped: str | None,
) -> None:
    directory = job_dir(study_dir, "train", point.id)
    write_lines(directory / METRICS, rows)
    if stopped is not None:
        save_tensors(directory / "last_good.safetensors", state)
        write_json(directory / FAILED, {"id": point.id, "reason": stopped})
        return
    for moved in set_aside_stale(point, study_dir, save_tensors(directory / HEADS, state)):
        print(f"{point.label} was trained again; what was made of its earlier weights is now {moved}", flush=True)
    write_json(directory / COSTS, costs.to_json())
    write_json(directory / CONFIG, point.config.model_dump(mode="json"))
    mark_done(directory, point.id, [HEADS, COSTS, CONFIG, METRICS])


def record(points: Sequence[Point], study_dir: Path) -> None:
    """Records what every exit of all `points` says of every split asked for, from one pass of the backbone."""
    from dynexit.record.recorder import Recorder

    points = [point for point in points if not is_recorded(point, study_dir)]
    if not points:
        return
    config = points[0].config
    ranks = start_ranks(config.dist.device, config.dist.num_threads)
    data = load_data(config.data, workers_of(config.dist, ranks.device), checked=True)
    model, costs = load_model(points[0], study_dir, ranks)
    # a stack of its own for every point: the bits of a record do not depend on who else is recorded
    members = [load_heads([point], study_dir, model, costs, ranks) for point in points]
    has_gates = members[0][1] is not None
    directories = [job_dir(study_dir, "record", point.ids["record"]) for point in points]
    for split in recorded_splits(config.record):
        samples = data.split(split)
        recorder = Recorder(
            [directory / split for directory in directories],
            [_record_header(point, study_dir, split, data) for point in points],
            exits=[(position, head_type) for position in costs.positions for head_type in costs.head_types],
            topk=config.record.topk or default_topk(data.num_classes),
            num_samples=len(samples),
            batch_size=config.record.batch_size,
            num_gates=len(costs.positions) if has_gates else 0,
            samples_per_shard=config.record.samples_per_shard,
            rank=ranks.global_rank,
            world_size=ranks.world_size,
        )
        progress = Progress(f"record {split}", directories[0], config.dist.log_seconds, quiet=not ranks.is_main)
        with recorder, torch.no_grad():
            missing = recorder.missing_batches()
            ranges = [range(*recorder.layout.sample_range(batch)) for batch in missing]
            progress.start(len(missing))
            for batch, loaded in zip(missing, load_batches(samples, ranges), strict=True):
                index_B, images, labels_B = loaded
                features, final_BK = model.features(images.to(ranks.device))
                outputs = [_outputs(heads, gates, features) for heads, gates in members]
                logits_MPBK = torch.cat([logits for logits, _ in outputs])
                gate_MGB = torch.cat([gate for _, gate in outputs if gate is not None]) if has_gates else None
                recorder.add(batch, index_B, labels_B, logits_MPBK, gate_MGB, backbone_logits_BK=final_BK)
                progress.advance(len(labels_B), {})
        progress.finish()
    ranks.wait()
    if ranks.is_main:
        for point, directory in zip(points, directories, strict=True):
            write_json(directory / COSTS, costs.to_json())
            mark_done(directory, point.ids["record"], [COSTS])


def _outputs(
    heads: StackedHeads, gates: StackedGates | None, features: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    dtype = next(heads.parameters()).dtype
    logits_1PBK = heads([feature.to(dtype) for feature in features])
    return logits_1PBK, None if gates is None else gates(gate_features(logits_1PBK)).sigmoid()


def _record_header(point: Point, study_dir: Path, split: str, data: DataSets) -> dict[str, Any]:
    heads = done_digest(job_dir(study_dir, "train", point.id), HEADS)
    backbone = done_digest(job_dir(study_dir, "prepare", point.ids["prepare"]), BACKBONE)
    return {
        "checkpoint_sha256": heads,
        "backbone_sha256": backbone,
        "point_id": point.id,
        "split": split,
        "num_classes": data.num_classes,
    }


def search(points: Sequence[Point], study_dir: Path) -> None:
    """Finds exit configurations for preferences and budgets from records alone; chosen on validation, judged on test.

    Leaves configurations.json, budgets.json and fixed.json per point; a budget that a point cannot attain is noted.
    """
    from dynexit.search_job import run_search

    run_search(points, study_dir)


def report(points: Sequence[Point], study_dir: Path) -> None:
    """Puts all finished `points` side by side: table, figures, page, MLflow. Points that are missing are named.

    Raises UserError for a budget that no point attains.
    """
    from dynexit.report.study_report import track, write_report

    directory = study_dir / "report"
    ready, failed = [], []
    for point in points:
        if is_done(job_dir(study_dir, "search", point.ids["search"]), point.ids["search"]):
            ready.append(point)
        else:
            failed.append(missing_reason(point, study_dir))
    if not ready:
        raise Failure(f"nothing to report: none of the {len(points)} points is finished; {failed[0]}")
    check_budgets(ready, study_dir)
    (directory / DONE).unlink(missing_ok=True)
    rows = write_report(ready, failed, study_dir)
    if points[0].config.report.mlflow:
        track(ready, rows, study_dir)
    mark_done(
        directory,
        report_identity(points, study_dir),
        ["operating_points.csv", "uncertainty.csv", "pareto.png", "report.html"],
    )


def infer(points: Sequence[Point], study_dir: Path) -> None:
    """Classifies a split with the best configuration within infer.relative_macs, really leaving early.

    Leaves predictions.csv and summary.json in infer/<id> and prints the summary. Raises UserError where no operating
    point is within the budget, Failure where the predictions differ from the record by more than near-ties.
    """
    from dynexit.infer_job import run_infer

    run_infer(points, study_dir)


JOBS = {"prepare": prepare, "train": train, "record": record, "search": search, "report": report, "infer": infer}
