"""The record job: the output of every exit of the points for each sample, from one pass of the backbone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynexit.core.confidence import gate_features
from dynexit.core.cost import ExitCosts
from dynexit.data import DataSets, Split, load_batches
from dynexit.dist import Ranks
from dynexit.errors import end_if_stopped
from dynexit.jobs.finished import class_names, default_topk, is_recorded, recorded_splits
from dynexit.jobs.load import begin, load_heads, ranks_of
from dynexit.memory import naming_memory
from dynexit.models.heads import StackedGates, StackedHeads
from dynexit.models.multi_exit import MultiExit
from dynexit.models.passes import quicken
from dynexit.progress import Progress
from dynexit.record.manifest import Layout, Shard
from dynexit.record.plan import Plan, finish, make_plan
from dynexit.record.recorder import Recorder
from dynexit.run_dir import BACKBONE, COSTS, HEADS, RunDir
from dynexit.study.grid import Point, digest
from dynexit.study.methods import METHODS
from dynexit.study.stages import stage_of


def run_record(points: Sequence[Point]) -> None:
    """Records the outputs of every exit of all `points` for every split asked for, from one pass of the backbone."""
    ranks = ranks_of(points[0].config)
    if ranks.once(lambda: all(is_recorded(point) for point in points)):
        return
    ranks, data, model, costs = begin(points[0])
    with ranks.failing_together():
        quicken(model, points[0].config.backbone, ranks.device, points[0].config.record.batch_size)
        # a stack of its own for every point: the bits of a record do not depend on who else is recorded
        members = [load_heads([point], model) for point in points]
        plans = _plans(points, ranks, data, costs) if ranks.is_main else {}
    plans = ranks.broadcast(plans)
    ranks.check_same("weights of the backbone", model.state_dict())
    shards: dict[str, list[Shard]] = {}
    with ranks.failing_together():
        for split, plan in plans.items():
            directory, log_seconds = plan.directories[0].parent, points[0].config.dist.log_seconds
            progress = Progress(f"record {split}", directory, log_seconds, quiet=not ranks.is_main)
            if 0 < (idle := plan.shares.count(())) < ranks.world_size:
                progress.say(
                    f"{idle} of {ranks.world_size} ranks have nothing to record: fewer batches are missing than there "
                    "are ranks; a smaller record.batch_size gives each some"
                )
            with naming_memory(len(points), stage_of("record").batch_key):
                shards[split] = _record(plan, data.split(split), ranks, model, members, progress)
    of_all_ranks = ranks.gather(shards)
    with ranks.failing_together():
        if ranks.is_main:
            for split, plan in plans.items():
                finish(plan, [shard for shards in of_all_ranks for shard in shards[split]])
            for point in points:
                run_dir = RunDir(point, "record")
                run_dir.write_json(COSTS, costs.to_json())
                run_dir.mark_done([COSTS])


def _plans(points: Sequence[Point], ranks: Ranks, data: DataSets, costs: ExitCosts) -> dict[str, Plan]:
    """The plan of every split. The points share shards in a folder whose name depends on all that is in them."""
    config = points[0].config
    plans = {}
    for split in recorded_splits(config.record):
        layout = Layout(
            exits=tuple((position, head_type) for position in costs.positions for head_type in costs.head_types),
            topk=config.record.topk or default_topk(data.num_classes),
            num_gates=len(costs.positions) if METHODS[config.train.method].has_gates else 0,
            num_samples=len(data.split(split)),
            batch_size=config.record.batch_size,
        )
        headers = [_record_header(point, split, data) for point in points]
        identity = digest([[point.ids["record"] for point in points], headers])
        plans[split] = make_plan(
            [RunDir(point, "record") / split for point in points],
            headers,
            layout,
            shards_dir=RunDir(points[0], "shards", identity).path,
            samples_per_shard=config.record.samples_per_shard,
            world_size=ranks.world_size,
        )
    return plans


def _record(
    plan: Plan,
    samples: Split,
    ranks: Ranks,
    model: MultiExit,
    members: Sequence[tuple[StackedHeads, StackedGates | None]],
    progress: Progress,
) -> list[Shard]:
    """Records this rank's share of a split, for all points; the shards that it wrote."""
    with Recorder(plan, ranks.global_rank) as recorder, torch.no_grad():
        missing = recorder.missing_batches()
        ranges = [range(*recorder.layout.sample_range(batch)) for batch in missing]
        progress.start(len(missing))
        for batch, loaded in zip(missing, progress.awaited(load_batches(samples, ranges, ranks=ranks)), strict=True):
            index_B, images, labels_B = loaded
            features, final_BK = model.features(images)
            outputs = [_outputs(heads, gates, features) for heads, gates in members]
            logits_MPBK = torch.cat([logits for logits, _ in outputs])
            gates_MGB = [gate for _, gate in outputs if gate is not None]
            gate_MGB = torch.cat(gates_MGB) if gates_MGB else None
            recorder.add(batch, index_B, labels_B, logits_MPBK, gate_MGB, backbone_logits_BK=final_BK)
            progress.advance(len(labels_B), {})
            end_if_stopped()
    progress.finish()
    return recorder.shards


def _outputs(
    heads: StackedHeads, gates: StackedGates | None, features: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    dtype = next(heads.parameters()).dtype
    logits_1PBK = heads([feature.to(dtype) for feature in features])
    return logits_1PBK, None if gates is None else gates(gate_features(logits_1PBK)).sigmoid()


def _record_header(point: Point, split: str, data: DataSets) -> dict[str, Any]:
    heads = RunDir(point, "train").digest(HEADS)
    backbone = RunDir(point, "prepare").digest(BACKBONE)
    names, precision = class_names(point), point.config.backbone.precision
    return {
        "checkpoint_sha256": heads,
        "backbone_sha256": backbone,
        "point_id": point.id,
        "split": split,
        "num_classes": data.num_classes,
        **({} if names is None else {"class_names": names}),
        **({} if precision == "float32" else {"backbone_precision": precision}),
    }
