"""Records on disk for the tests of what reads them: DyCE's `.npz` or shards, and their costs."""

import json
from pathlib import Path

import numpy as np

from dynexit.record.manifest import SHARED, Layout
from dynexit.record.plan import finish, make_plan
from dynexit.record.shards import ShardWriter
from dynexit.search.problem import Problem


def outputs(problem: Problem, num_classes: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """label (N,), prediction (R, N) and confidence (R, N) that give this problem; the backbone's confidence is 0.5."""
    count = problem.num_samples
    label_N = np.arange(count) % num_classes
    correct_RN = np.concatenate([problem.correct_PHN.reshape(-1, count), problem.base_correct_N[None]])
    prediction_RN = np.where(correct_RN, label_N, (label_N + 1) % num_classes)
    confidence_RN = np.concatenate([problem.confidence_PHN.reshape(-1, count), np.full((1, count), 0.5, np.float32)])
    return label_N, prediction_RN, confidence_RN


def write_npz(path: Path, problem: Problem, **changes: np.ndarray) -> Path:
    """DyCE's `.npz` of a problem; `changes` replaces arrays."""
    label_N, prediction_RN, confidence_RN = outputs(problem)
    arrays = {
        "label": label_N[:, None].astype(np.int16),
        "preds": prediction_RN[..., None].astype(np.int16),
        "confs": confidence_RN[..., None],
    }
    np.savez_compressed(path, **{**arrays, **changes})
    return path


def write_shards(directory: Path, problem: Problem, gates: bool = False, num_classes: int = 10, **changes: int) -> Path:
    """A record in shards of a problem; gates repeat the first head's confidence. `s3=12` makes the label of 3 a 12."""
    label_N, prediction_RN, confidence_RN = outputs(problem)
    for sample, label in changes.items():
        label_N[int(sample[1:])] = label
    costs = problem.costs
    layout = Layout(
        exits=tuple((position, head) for position in costs.positions for head in costs.head_types),
        topk=1,
        num_gates=len(costs.positions) if gates else 0,
        num_samples=problem.num_samples,
        batch_size=64,
        statistics=("max_probability", "margin"),
    )
    header = {"num_classes": num_classes, "checkpoint_sha256": "0"}
    plan = make_plan([directory], [header], layout, samples_per_shard=128)
    writer = ShardWriter(plan)
    arrays = {
        "index": np.arange(problem.num_samples),
        "label": label_N.astype(np.int32),
        "prediction": prediction_RN[:, None].astype(np.int32),
        "probability": confidence_RN[:, None],
        "margin": confidence_RN * confidence_RN,
    }
    if gates:
        arrays["gate"] = problem.confidence_PHN[:, 0]
    for batch in writer.missing_batches:
        samples = slice(*layout.sample_range(batch))
        of_one_member = {name: array if name in SHARED else array[None] for name, array in arrays.items()}
        writer.add(batch, {name: array[..., samples] for name, array in of_one_member.items()})
    finish(plan, writer.shards)
    return directory


def macs_info(problem: Problem) -> dict:
    """DyCE's macs_info of a problem's costs."""
    costs = problem.costs
    return {
        "head": [
            {"name": name, "macs": [row[head] for row in costs.head_macs] + [0], "params": []}
            for head, name in enumerate(costs.head_types)
        ],
        "backbone": {
            "name": "made up",
            "macs": [*costs.backbone_macs, costs.full_macs],
            "ori_macs": costs.full_macs,
        },
    }


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path
