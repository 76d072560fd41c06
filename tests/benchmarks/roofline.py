"""Step times on H100 GPUs, computed from counted kernels, bytes and MACs; nothing here was measured on a GPU.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.roofline [--batch 256] [--tiny] [--beside gpu.json]

Kernels and bytes are counted on the pretend device (tests/pretend_cuda.py) at two batch sizes and two numbers of
members, and extrapolated: bytes are c0 + c1·batch + c2·members + c3·batch·members, kernels depend on neither. A part of
a step takes as long as the slowest of: its kernels' launches by the host, its bytes, its MACs. Prints a Markdown table;
with `--beside` that of what gpu.py measured in bf16, next to what is computed for it.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dynexit.core.cost import ExitCosts
from dynexit.data import Split
from dynexit.dist import Ranks
from dynexit.models.backbones import build_backbone
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.schema import TrainSettings
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.pack import Member, Pack
from tests.pretend_cuda import CUDA, pretend_cuda


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What one GPU and its links reach in practice: shares of an H100 SXM's data sheet, named in docs/cluster.md."""

    bytes_per_second: float = 0.8 * 3.35e12
    macs_per_second: float = 0.4 * 989e12 / 2  # bf16, dense
    float32_macs_per_second: float = 0.6 * 67e12 / 2
    seconds_per_launch: float = 5e-6  # of the host, eager
    node_bytes_per_second: float = 300e9  # all-reduce within a node
    network_bytes_per_second: float = 40e9  # between nodes, per GPU


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of one step on one GPU."""

    kernels: int
    num_bytes: float
    macs: float


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the MACs and parameters of its heads."""

    name: str
    num_classes: int
    image_size: int
    costs: ExitCosts

    @property
    def head_macs(self) -> int:
        """Of one member's heads for one image; as many weights."""
        return sum(itertools.chain(*self.costs.head_macs))


def count(name: str, num_classes: int, image_size: int, batch: int, num_members: int) -> tuple[Counts, Counts, Case]:
    """Counts of the backbone and of the members' head step."""
    backbone = build_backbone(name, num_classes=num_classes, image_size=image_size)
    costs = exit_costs(backbone, range(backbone.num_blocks - 1), ["linear"])
    case = Case(name, num_classes, image_size, costs)
    members = [Member(i, str(i), JeiDnnSettings()) for i in range(num_members)]
    images = torch.randn(batch, 3, image_size, image_size)
    split = Split(images, torch.arange(batch) % num_classes, torch.arange(batch))
    ranks = Ranks(0, 1, CUDA)
    with pretend_cuda() as world:
        model = MultiExit(backbone.to(CUDA), costs.positions)
        pack = Pack(model, costs, members, TrainSettings(), split, ranks, 100)
        task = JeiDnnTask(pack, JeiDnnSettings(bilevel_batch_count=1, max_warm_up_epochs=0))
        loaded = torch.arange(batch), ranks.to_device(images), ranks.to_device(split.labels)
        task.train_step(loaded, 1.0)  # that of the gates
        world.reset()
        model.features(loaded[1])
        frozen = Counts(world.num_kernels, world.num_bytes, batch * costs.full_macs)
        world.reset()
        task.train_step(loaded, 1.0)
        kernels, num_bytes = world.num_kernels - frozen.kernels, world.num_bytes - frozen.num_bytes
    # forward and the weights' gradients; the features ask for none
    return frozen, Counts(kernels, num_bytes, 2 * batch * num_members * case.head_macs), case


def extrapolate(counted: dict[tuple[int, int], float], batch: int, num_members: int) -> float:
    """The bilinear function through four points (batch, members), elsewhere."""
    (low, high), (few, many) = sorted({b for b, _ in counted}), sorted({m for _, m in counted})
    x, y = (batch - low) / (high - low), (num_members - few) / (many - few)
    corners = ((low, few, (1 - x) * (1 - y)), (high, few, x * (1 - y)), (low, many, (1 - x) * y), (high, many, x * y))
    return sum(counted[b, m] * weight for b, m, weight in corners)


def seconds(counts: Counts, macs_per_second: float, gpu: Gpu) -> tuple[float, str]:
    """How long a part of a step takes, and which of launches, bytes and MACs takes so long."""
    return max(
        (counts.kernels * gpu.seconds_per_launch, "launches"),
        (counts.num_bytes / gpu.bytes_per_second, "bytes"),
        (counts.macs / macs_per_second, "MACs"),
    )


def reduce_seconds(num_bytes: float, num_gpus: int, gpu: Gpu) -> float:
    """An all-reduce: within a node of eight, then also between nodes."""
    if num_gpus == 1:
        return 0.0
    rate = gpu.node_bytes_per_second if num_gpus <= 8 else gpu.network_bytes_per_second
    return 2 * (num_gpus - 1) / num_gpus * num_bytes / rate


def rows_of(
    name: str, num_classes: int, size: int, batch: int, members: Sequence[int], gpus: Sequence[int]
) -> list[list[str]]:
    """Rows of the table: of a model and a number of classes, for a batch of that size per GPU."""
    frozen_bytes, own_bytes = {}, {}
    for point in itertools.product((2, 4), (1, 2)):
        frozen, own, case = count(name, num_classes, size, *point)
        frozen_bytes[point], own_bytes[point] = frozen.num_bytes, own.num_bytes
    gpu, found = Gpu(), []
    # in bf16 weights and activations take half the bytes that were counted
    bare = Counts(frozen.kernels, extrapolate(frozen_bytes, batch, 1) / 2, batch * case.costs.full_macs)
    bare_seconds, _ = seconds(bare, gpu.macs_per_second, gpu)
    for num_members in members:
        macs = 2 * batch * num_members * case.head_macs
        own_counts = Counts(own.kernels, extrapolate(own_bytes, batch, num_members), macs)
        own_seconds, limit = seconds(own_counts, gpu.float32_macs_per_second, gpu)
        shared = [reduce_seconds(4 * num_members * case.head_macs, n, gpu) for n in gpus]
        steps = [bare_seconds + own_seconds + one for one in shared]
        figures = [f"{1e3 * value:.2f}" for value in (bare_seconds, own_seconds, *steps)]
        found.append([name, str(num_classes), str(num_members), *figures, f"{own_seconds / bare_seconds:.2f}", limit])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images per GPU")
    parser.add_argument("--tiny", action="store_true", help="one small case, to see that it runs")
    parser.add_argument("--beside", type=Path, help="the results of gpu.py")
    options = parser.parse_args()
    if options.beside:
        print_beside(json.loads(options.beside.read_text())["packs"]["rows"])
        return
    gpus = (1, 8, 64)
    cases = [("t2t_vit_7", 224), ("resnet50", 224)]
    grid = [("t2t_vit_7", 64, 10)] if options.tiny else [(name, size, k) for name, size in cases for k in (10, 1000)]
    steps = [f"step, {n} GPU{'s' * (n > 1)}" for n in gpus]
    head = [
        "model",
        "classes",
        "members",
        "backbone (bf16)",
        "members' step",
        *steps,
        "members / backbone",
        "limit of the members",
    ]
    print(f"Milliseconds, {options.batch} images per GPU\n")
    print_lines(head, ["---"] * len(head))
    for name, size, num_classes in grid:
        print_lines(*rows_of(name, num_classes, size, options.batch, (1, 16, 28), gpus))


def print_beside(rows: Sequence[dict[str, Any]]) -> None:
    """Milliseconds of backbone and members' step, measured and computed."""
    head = ["model", "classes", "members", "backbone", "computed", "members' step", "computed", "added", "computed"]
    print_lines(head, ["---"] * len(head))
    for row in (row for row in rows if row["precision"] == "bf16"):
        members = [int(key.removeprefix("step_seconds_")) for key in row if key.startswith("step_seconds_")]
        for found in rows_of(row["model"], row["classes"], row["image_size"], row["batch"], members, [1]):
            bare, added = 1e3 * row["backbone_seconds"], row[f"added_to_backbone_{found[2]}"]
            measured = (f"{bare:.2f}", f"{bare * added:.2f}", f"{added:.2f}")
            computed = (found[3], found[4], found[6])
            print_lines([*found[:3], *(cell for pair in zip(measured, computed, strict=True) for cell in pair)])


def print_lines(*lines: Sequence[str]) -> None:
    for line in lines:
        print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
