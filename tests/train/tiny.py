"""A small pack to train: shapes all different, seconds not minutes."""

from collections.abc import Sequence

import torch

from dynexit.config import JeiDnn, Train
from dynexit.core.cost import ExitCosts
from dynexit.data import Split
from dynexit.dist import Ranks
from dynexit.models.backbones import build_backbone
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.pack import Member, Pack

RANKS = Ranks(0, 1, torch.device("cpu"))
NUM_CLASSES = 5
ARGUMENTS = {"layers": [1, 2, 1, 1], "channels": [4, 6, 7, 9], "stem_width": 4}


def tiny_split(num_samples: int = 90, seed: int = 3) -> Split:
    """Images whose class shows in their brightness, so that something can be learned."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    images = torch.randn(num_samples, 1, 24, 24, generator=generator) + labels[:, None, None, None] / 2
    return Split(images, labels, torch.arange(num_samples))


def tiny_model(head_types: Sequence[str] = ("linear",)) -> tuple[MultiExit, ExitCosts]:
    """A ResNet of five blocks with exits after the first four."""
    torch.manual_seed(11)
    backbone = build_backbone("resnet18", arguments=ARGUMENTS, num_classes=NUM_CLASSES, image_size=24, in_channels=1)
    costs = exit_costs(backbone, range(backbone.num_blocks - 1), list(head_types))
    return MultiExit(backbone, costs.positions), costs


def tiny_task(members: Sequence[tuple[int, float]], train: Train, method: JeiDnn) -> JeiDnnTask:
    """The training of members given as (seed, ce_ic_tradeoff)."""
    return JeiDnnTask(tiny_pack(members, train), method)


def tiny_pack(
    members: Sequence[tuple[int, float]], train: Train, head_types: Sequence[str] = ("linear",)
) -> Pack:
    """A pack of members given as (seed, ce_ic_tradeoff)."""
    model, costs = tiny_model(head_types)
    named = [Member(seed, tradeoff, f"seed={seed} ce_ic_tradeoff={tradeoff}") for seed, tradeoff in members]
    steps_per_epoch = -(-len(tiny_split()) // train.global_batch_size)
    return Pack(model, costs, named, train, tiny_split(40, seed=4), RANKS, steps_per_epoch, seed=7)
