"""The prepare job: fits the backbone to the data set."""

import math
from collections.abc import Iterator, Sequence

import torch

from dynexit.data import DataSets, check_class_order
from dynexit.dist import Ranks
from dynexit.jobs.load import build_model, describe_images, load_on_ranks, ranks_of
from dynexit.models.macs import exit_costs
from dynexit.models.precision import check_precision
from dynexit.progress import Progress
from dynexit.run_dir import BACKBONE, CLASSES, COSTS, METRICS, RunDir
from dynexit.study.grid import Point
from dynexit.study.schema import Config
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.loop import fit
from dynexit.train.parallel import check_installed
from dynexit.train.transfer import TransferTask, refuse_single_images

_MOST_GAP = 0.01  # of accuracy


def _remarks(config: Config, ranks: Ranks) -> Iterator[str]:
    """What may well be a mistake, and may be meant."""
    stage = config.dist.deepspeed_stage
    if stage is not None and ranks.world_size == 1:
        yield f"dist.deepspeed_stage = {stage} divides nothing: this is the only rank; several do it together"
    if config.prepare.num_epochs == 0 and config.backbone.weights is None:
        yield "the backbone is random: prepare.num_epochs is 0 and backbone.weights is not set"


def _chance_remark(accuracy: float, data: DataSets) -> Iterator[str]:
    """A warning if the accuracy on validation is no better than guessing, within two standard deviations."""
    chance, num_samples = 1 / data.num_classes, len(data.validation)
    if accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / num_samples):
        yield (
            f"warning: the backbone, used as it is, is right on {accuracy:.4f} of {num_samples} validation images, "
            f"near chance ({chance:.4f}); check backbone.weights, data.class_order and data.normalisation, or fit it "
            "with prepare.num_epochs"
        )


def gap_remark(training: float, validation: float, num_samples: int) -> Iterator[str]:
    """A remark if the accuracy on plain training images exceeds that on validation by more than a point, and by more
    than two standard deviations of the difference between two samples of that size.
    """
    chance = 2 * math.sqrt((training * (1 - training) + validation * (1 - validation)) / num_samples)
    if training - validation > max(_MOST_GAP, chance):
        yield (
            f"warning: the backbone is right on {training:.4f} of as many training images and {validation:.4f} of "
            "validation: on images that it was fitted to it is surer than on others, and exits learn from those; more "
            "augmentation, weight decay or fewer epochs close the gap"
        )


def run_prepare(points: Sequence[Point]) -> None:
    """Fits the backbone that the points share to the data set: backbone.safetensors, costs.json, metrics.jsonl."""
    config, directory = points[0].config, RunDir(points[0], "prepare")
    ranks = ranks_of(config)
    if ranks.once(directory.is_done):
        return
    stage = config.dist.deepspeed_stage
    if stage is not None:
        check_installed(stage)
    settings = config.prepare
    with ranks.failing_together():
        check_precision(config.backbone.precision, ranks.device)  # of the jobs that follow
        if settings.num_epochs == 0:
            check_class_order(config.data)
    data = load_on_ranks(config, ranks)
    with ranks.failing_together():
        torch.manual_seed(config.data.seed)
        backbone = build_model(config, weights=True)
    costs = ranks.once(lambda: exit_costs(backbone, range(backbone.num_blocks - 1), config.exits.head_types))
    if stage is None or ranks.world_size == 1:  # DeepSpeed brings to a rank's device what is to lie there
        backbone.to(ranks.device)
    steps_per_epoch = -(-len(data.train) // settings.global_batch_size)
    refuse_single_images(backbone, settings, len(data.train), ranks)
    task = TransferTask(backbone, settings, steps_per_epoch, config.data.seed, data.validation, ranks, stage)
    ranks.check_same("weights at the start", backbone.state_dict())
    checkpoints = Checkpoints(directory.path, config.dist.checkpoint_seconds)
    progress = Progress(
        "prepare", directory.path, config.dist.log_seconds, quiet=not ranks.is_main, num_ranks=ranks.world_size
    )
    for remark in (*data.remarks, *_remarks(config, ranks)):
        progress.say(remark)
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
    if settings.num_epochs == 0 and config.backbone.weights is not None:
        for remark in _chance_remark(task.accuracy(), data):
            progress.say(remark)
    training = task.accuracy(data.plain_train) if task.rows else 0.0
    weights = task.weights()
    with ranks.failing_together():
        if not ranks.is_main:
            return
        directory.save_tensors(BACKBONE, weights)
        directory.write_json(COSTS, costs.to_json())
        directory.write_json(CLASSES, {"names": data.class_names, "images": describe_images(data)})
        directory.write_lines(METRICS, task.rows)
        if task.rows:
            validation = task.rows[-1]["validation_accuracy"]
            progress.say(f"the backbone is right on {validation:.4f} of the validation split")
            for remark in gap_remark(training, validation, len(data.validation)):
                progress.say(remark)
        directory.mark_done([BACKBONE, CLASSES, COSTS, METRICS])
        checkpoints.clear()
