"""Small backbones being fitted, as the tests of prepare do it."""

from pathlib import Path
from typing import Any

import torch

from dynexit.dist import Ranks
from dynexit.models.backbones import Backbone, build_backbone
from dynexit.progress import Progress
from dynexit.study.schema import PrepareSettings
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.loop import fit
from dynexit.train.transfer import TransferTask
from tests.train.tiny import ARGUMENTS, NUM_CLASSES, RANKS, KilledError, tiny_split

TOKENS = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
CHANGED = {"num_epochs": 2, "global_batch_size": 13, "learning_rate": 0.02, "num_warm_up_epochs": 1}


def small_backbone(name: str = "vit_tiny_patch16_224", **arguments: Any) -> Backbone:
    """A ViT of three blocks, or a ResNet of five, for the images of `tiny_split`."""
    own = TOKENS if name.startswith("vit") else ARGUMENTS
    torch.manual_seed(21)
    arguments = {**own, **arguments}
    return build_backbone(name, arguments=arguments, num_classes=NUM_CLASSES, image_size=24, in_channels=1)


def fitted(
    folder: Path,
    backbone: Backbone,
    *,
    ranks: Ranks = RANKS,
    stage: int | None = None,
    stop_at: int | None = None,
    **settings: Any,
) -> TransferTask:
    """The backbone fitted to the tiny split; killed before step `stop_at`, after a checkpoint, where one is given."""
    prepare = PrepareSettings(**{**CHANGED, **settings})
    split = tiny_split()
    steps_per_epoch = -(-len(split) // prepare.global_batch_size)
    task = TransferTask(backbone, prepare, steps_per_epoch, 5, tiny_split(41, seed=4), ranks, stage)
    step = task.train_step

    def die(batch, share):  # type: ignore[no-untyped-def]
        if task.step_number == stop_at:
            raise KilledError
        return step(batch, share)

    task.train_step = die  # type: ignore[method-assign]
    fit(
        task,
        split,
        num_epochs=prepare.num_epochs,
        global_batch_size=prepare.global_batch_size,
        seed=7,
        ranks=ranks,
        checkpoints=Checkpoints(folder, 1e9 if stop_at is None else 0.0),
        progress=Progress("prepare", folder, 1e9, quiet=True),
    )
    return task
