"""What a pack costs beside one member: steps on T2T-ViT-7-sized work and on the digits net, the train job on digits.

    OMP_NUM_THREADS=1 python tests/benchmarks/pack.py [--rounds 7] [--digits configs/digits.yaml]

Both sides run in turn in one process; the medians of the times and their ratio are printed.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dynexit.core.cost import ExitCosts
from dynexit.data import Split
from dynexit.dist import start_ranks
from dynexit.models.backbones import build_backbone
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.read import load_study
from dynexit.study.schema import TrainSettings
from dynexit.study.stages import stage_of
from dynexit.train.jei_dnn import JOINT, JeiDnnTask
from dynexit.train.pack import Member, Pack

# the size of T2T-ViT-7 at 224 pixels: width 256, seven blocks, four heads, MLP ratio 2
VIT = {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0}


def step_of(model: MultiExit, costs: ExitCosts, num_members: int, split: Split) -> Callable[[], None]:
    """One batch of 64, both phases in turn."""
    members = [Member(i // 12, str(i), JeiDnnSettings(ce_ic_tradeoff=0.1 * (1 + i % 12))) for i in range(num_members)]
    method = JeiDnnSettings(bilevel_batch_count=1, max_warm_up_epochs=0)
    task = JeiDnnTask(Pack(model, costs, members, TrainSettings(), split, start_ranks("auto")), method)
    assert all(group.stage == JOINT for group in task.groups)
    batch = split.__getitems__(range(len(split)))

    def run() -> None:
        for _ in range(2):
            task.train_step(batch, 1.0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def compare(name: str, one: Callable[[], None], many: Callable[[], None], rounds: int) -> None:
    """Prints the median seconds of both, taken in turn, and the ratio; without a GPU seconds of processor time."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    one(), many()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, kept in zip((one, many), seconds, strict=True):
            start = clock()
            run()
            kept.append(clock() - start)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    medians = [statistics.median(taken) for taken in seconds]
    print(f"{name}: one member {medians[0]:.3f} s, pack {medians[1]:.3f} s, {ratio:.3f}x")


def vit_step(rounds: int) -> None:
    ranks = start_ranks("auto")
    backbone = build_backbone("vit_tiny_patch16_224", arguments=VIT, num_classes=10, image_size=224).to(ranks.device)
    costs = exit_costs(backbone, range(6), ["linear"])
    model = MultiExit(backbone, range(6))
    split = Split(
        torch.randn(64, 3, 224, 224, device=ranks.device),
        torch.randint(10, (64,), device=ranks.device),
        torch.arange(64),
    )
    one, many = (step_of(model, costs, n, split) for n in (1, 16))
    compare("two steps, ViT of T2T-ViT-7's size at 224 px, batch 64, 16 members", one, many, rounds)


def digits_steps(path: Path, rounds: int) -> None:
    """The net of the study at `path` on random images."""
    config, device = load_study(path).points[0].config, start_ranks("auto").device
    own, size = config.backbone, config.data.image_size
    backbone = build_backbone(own.name, arguments=own.arguments, num_classes=10, image_size=size).to(device)
    positions = range(backbone.num_blocks - 1)
    costs, model = exit_costs(backbone, positions, ["linear"]), MultiExit(backbone, positions)
    images = torch.randn(64, *backbone.input_size, device=device)
    split = Split(images, torch.randint(10, (64,), device=device), torch.arange(64))
    # a block like those of an evaluation: glibc keeps what is freed from then on, as in a training
    torch.empty(31 << 20, dtype=torch.uint8)

    def ten(step: Callable[[], None]) -> Callable[[], None]:
        return lambda: [step() for _ in range(10)].clear()

    one, many = (ten(step_of(model, costs, n, split)) for n in (1, 24))
    compare(f"20 steps on the net of {path.name}, batch 64, 24 members", one, many, rounds)


def digits_job(path: Path, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        quiet = [f"runs_dir={folder}", "dist.log_seconds=1000", "dist.num_threads=1"]
        whole = load_study(path, quiet)
        whole = dataclasses.replace(whole, points=tuple(p for p in whole.points if p.method.startswith("jei_dnn")))
        study_dir = whole.directory
        stage_of("prepare").runner()(whole.points)
        count = iter(range(10**6))

        def train(points: tuple) -> Callable[[], None]:  # type: ignore[type-arg]
            def run() -> None:
                fresh = study_dir.parent / f"copy{next(count)}"
                fresh.mkdir()
                (fresh / "prepare").symlink_to(study_dir.resolve() / "prepare")
                stage_of("train").runner()(dataclasses.replace(whole, points=points).at(fresh).points)

            return run

        compare(
            f"train job of {path.name}, {len(whole.points)} members",
            train(whole.points[:1]),
            train(whole.points),
            rounds,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--digits", type=Path, default=Path("configs/digits.yaml"))
    options = parser.parse_args()
    digits_steps(options.digits, 3 * options.rounds)
    vit_step(options.rounds)
    digits_job(options.digits, max(options.rounds // 3, 1))


if __name__ == "__main__":
    main()
