"""Exit heads of every family of backbones, trained for a short epoch on images the size of the digits."""

import copy

import pytest
import torch

from dynexit.data import Split
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit
from dynexit.study.schema import TrainSettings
from dynexit.train.independent import IndependentTask
from dynexit.train.pack import Member, Pack
from tests.models.tiny import TINY, build_tiny
from tests.train.tiny import RANKS


@pytest.mark.parametrize("family", TINY)
def test_heads_of_every_family_learn(family: str) -> None:
    backbone = copy.deepcopy(build_tiny(family))
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(5, (16,), generator=generator)
    images = torch.randn(16, *backbone.input_size, generator=generator) + labels[:, None, None, None]
    split = Split(images, labels, torch.arange(16))
    costs = exit_costs(backbone, range(backbone.num_blocks - 1), ["linear", "mlp2x7"])
    model = MultiExit(backbone, costs.positions, costs.head_types)
    settings = TrainSettings(method="independent", num_epochs=1, global_batch_size=8)
    task = IndependentTask(Pack(model, costs, [Member(0, "only")], settings, split, RANKS, 16), None)
    before = {name: value.clone() for name, value in task.member_state(0).items()}
    for rows in (range(8), range(8, 16)):
        losses = task.train_step(split.__getitems__(rows), 1.0)
        assert all(torch.isfinite(value).all() for value in losses.values())
    task.end_epoch(0)
    assert not task.stopped
    after = task.stack("heads")
    assert all(torch.isfinite(value).all() for value in after.values())
    for name, value in after.items():
        assert not torch.equal(value[0], before[f"heads.{name}"]), name
