"""A small pack to train: shapes all different, seconds not minutes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from dynexit.core.cost import ExitCosts
from dynexit.data import Batch, Split
from dynexit.dist import Ranks
from dynexit.models.backbones import build_backbone
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit
from dynexit.progress import Progress
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.schema import TrainSettings
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.loop import fit
from dynexit.train.pack import Member, Pack, PackTask

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


def tiny_task(members: Sequence[tuple[int, float]], train: TrainSettings, method: JeiDnnSettings) -> JeiDnnTask:
    """The training of members given as (seed, ce_ic_tradeoff)."""
    return JeiDnnTask(tiny_pack(tradeoff_members(members), train), method)


def tradeoff_members(members: Sequence[tuple[int, float]]) -> list[Member]:
    """Members of JEI-DNN from (seed, ce_ic_tradeoff)."""
    return [Member(seed, f"seed={seed} ce_ic_tradeoff={t}", JeiDnnSettings(ce_ic_tradeoff=t)) for seed, t in members]


def seed_members(seeds: Sequence[int]) -> list[Member]:
    """Members that differ in their seeds alone, of a method without settings of a member's own."""
    return [Member(seed, f"seed={seed}") for seed in seeds]


def tiny_pack(members: Sequence[Member], train: TrainSettings, head_types: Sequence[str] = ("linear",)) -> Pack:
    """A pack of these members on the tiny model and split."""
    model, costs = tiny_model(head_types)
    return Pack(model, costs, members, train, tiny_split(40, seed=4), RANKS, len(tiny_split()), seed=7)


def run(task: PackTask, folder: Path, stop_at: int | None = None, seconds: float = 1e9) -> PackTask:
    """Trains `task` on the tiny split, with a checkpoint every `seconds`; stops before step `stop_at` as if killed."""
    step = task.train_step

    def die(batch: Batch, share: float) -> Mapping[str, torch.Tensor]:
        if task.step_number == stop_at:
            raise KilledError
        return step(batch, share)

    task.train_step = die  # type: ignore[method-assign]
    fit(
        task,
        tiny_split(),
        num_epochs=task.settings.num_epochs,
        global_batch_size=task.settings.global_batch_size,
        seed=7,
        ranks=RANKS,
        checkpoints=Checkpoints(folder, seconds),
        progress=Progress("train", folder, 1e9, quiet=True),
    )
    return task


def check_resume(make: Callable[[], PackTask], folder: Path, stops: Sequence[int]) -> None:
    """Fails unless a training that was killed before each of `stops` ends bit for bit as one that was not."""
    whole = run(make(), folder / "whole")
    for stop in stops:
        with pytest.raises(KilledError):
            run(make(), folder / str(stop), stop, seconds=0.0)
        resumed = run(make(), folder / str(stop))
        assert resumed.step_number == whole.step_number
        assert resumed.rows == whole.rows
        for i in range(len(whole.members)):
            expected, found = whole.member_state(i), resumed.member_state(i)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected), (stop, i)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Of any entry of two states, which must have the same names."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


class KilledError(Exception):
    """Stands for a kill at a step."""
