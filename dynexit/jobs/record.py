"""The record job: what every exit of the points says of each sample, from one pass of the backbone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynexit.core.confidence import gate_features
from dynexit.core.cost import ExitCosts
from dynexit.data import DataSets, load_batches
from dynexit.dist import Ranks
from dynexit.jobs.finished import default_topk, is_recorded, recorded_splits
from dynexit.jobs.load import begin, load_heads, ranks_of
from dynexit.models.heads import StackedGates, StackedHeads
from dynexit.models.multi_exit import MultiExit
from dynexit.progress import Progress
from dynexit.record.recorder import Recorder
from dynexit.run_dir import BACKBONE, COSTS, HEADS, RunDir
from dynexit.study.grid import Point


def run_record(points: Sequence[Point]) -> None:
    """Records what every exit of all `points` says of every split asked for, from one pass of the backbone."""
    points = ranks_of(points[0].config).broadcast([point for point in points if not is_recorded(point)])
    if not points:
        return
    ranks, data, model, costs = begin(points[0])
    with ranks.failing_together():
        _record_splits(points, ranks, data, model, costs)
    with ranks.failing_together():
        for point in points if ranks.is_main else []:
            directory = RunDir(point, "record")
            directory.write_json(COSTS, costs.to_json())
            directory.mark_done([COSTS])


def _record_splits(points: Sequence[Point], ranks: Ranks, data: DataSets, model: MultiExit, costs: ExitCosts) -> None:
    """This rank's shards of every split, for all points."""
    config = points[0].config
    # a stack of its own for every point: the bits of a record do not depend on who else is recorded
    members = [load_heads([point], model) for point in points]
    has_gates = members[0][1] is not None
    directories = [RunDir(point, "record") for point in points]
    for split in recorded_splits(config.record):
        samples = data.split(split)
        recorder = Recorder(
            [directory / split for directory in directories],
            [_record_header(point, split, data) for point in points],
            exits=[(position, head_type) for position in costs.positions for head_type in costs.head_types],
            topk=config.record.topk or default_topk(data.num_classes),
            num_samples=len(samples),
            batch_size=config.record.batch_size,
            num_gates=len(costs.positions) if has_gates else 0,
            samples_per_shard=config.record.samples_per_shard,
            rank=ranks.global_rank,
            world_size=ranks.world_size,
        )
        progress = Progress(f"record {split}", directories[0].path, config.dist.log_seconds, quiet=not ranks.is_main)
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


def _outputs(
    heads: StackedHeads, gates: StackedGates | None, features: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    dtype = next(heads.parameters()).dtype
    logits_1PBK = heads([feature.to(dtype) for feature in features])
    return logits_1PBK, None if gates is None else gates(gate_features(logits_1PBK)).sigmoid()


def _record_header(point: Point, split: str, data: DataSets) -> dict[str, Any]:
    heads = RunDir(point, "train").digest(HEADS)
    backbone = RunDir(point, "prepare").digest(BACKBONE)
    return {
        "checkpoint_sha256": heads,
        "backbone_sha256": backbone,
        "point_id": point.id,
        "split": split,
        "num_classes": data.num_classes,
    }
