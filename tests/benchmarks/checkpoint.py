"""What saving takes of a training's time: python tests/benchmarks/checkpoint.py [--classes 1000] [--members 16].

Steps of T2T-ViT-7-sized work and saves of its state go in turn; printed are the medians, and the share that saving
takes when one is due.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from dynexit.data import Split
from dynexit.dist import start_ranks
from dynexit.models.backbones import build_backbone
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.schema import TrainSettings
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.pack import Member, Pack

VIT = {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0}
EVERY = 60.0  # dist.checkpoint_seconds as it is by default


def main(classes: int, members: int, rounds: int) -> None:
    ranks = start_ranks("auto")
    name, size, batch = "vit_tiny_patch16_224", 224, 64
    backbone = build_backbone(name, arguments=VIT, num_classes=classes, image_size=size).to(ranks.device)
    images = torch.randn(batch, 3, size, size, device=ranks.device)
    split = Split(images, torch.randint(classes, (batch,), device=ranks.device), torch.arange(batch))
    model, costs = MultiExit(backbone, range(6)), exit_costs(backbone, range(6), ["linear"])
    method = JeiDnnSettings()
    pack = Pack(model, costs, [Member(i, str(i), method) for i in range(members)], TrainSettings(), split, ranks)
    task = JeiDnnTask(pack, method)
    steps, saves = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), EVERY)
        checkpoints.begin()
        for i in range(rounds):
            begun = time.perf_counter()
            task.train_step(split.__getitems__(range(batch)), 1.0)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            steps.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            checkpoints.save(i, *task.state())
            saves.append(time.perf_counter() - begun)
        megabytes = next(Path(folder).glob("*.safetensors")).stat().st_size / 1e6
    step, save = statistics.median(steps), statistics.median(saves)
    wait = checkpoints.interval
    print(f"{members} members, {classes} classes: a step {step:.3f} s, a save of {megabytes:.1f} MB {save:.3f} s")
    print(f"one every {wait:.0f} s: {100 * save / (wait + save):.2f} % of the time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    main(options.classes, options.members, options.rounds)
