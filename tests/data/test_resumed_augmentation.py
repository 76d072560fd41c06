"""A run that stops in the middle of an epoch and goes on sees the images that an unbroken run sees."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynexit.data import Batch, Workers, load_data
from dynexit.dist import Ranks
from dynexit.errors import Interrupted
from dynexit.progress import Progress
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.loop import fit
from tests.data.test_splits import folder_data


class Watcher:
    """A Task that learns nothing and keeps what it sees; asks to stop before step `stop_at`."""

    def __init__(self, stop_at: int = -1) -> None:
        self.seen: list[Tensor] = []
        self.stop_at = stop_at

    def begin(self) -> None:
        pass

    def train_step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        self.seen.append(batch[1].sum((1, 2, 3), dtype=torch.float64))
        if len(self.seen) == self.stop_at:
            os.kill(os.getpid(), signal.SIGUSR2)
        return {}

    def end_epoch(self, epoch: int) -> None: ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"seen": torch.cat(self.seen)}, {}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.seen = [tensors["seen"]]


def run(task: Watcher, data_dir: Path, directory: Path, num_workers: int) -> Tensor:
    fit(
        task,
        load_data(folder_data(data_dir), Workers(num_workers)).train,
        num_epochs=3,
        global_batch_size=5,
        seed=0,
        ranks=Ranks(0, 1, torch.device("cpu")),
        checkpoints=Checkpoints(directory, 1e9),
        progress=Progress("watch", directory, quiet=True),
    )
    return torch.cat(task.seen)


def test_going_on_after_a_signal_sees_the_same_images(tmp_path: Path) -> None:
    expected = run(Watcher(), tmp_path / "images", tmp_path / "whole", 0)
    assert len(expected.unique()) == 3 * 19  # no image twice in the same form
    with pytest.raises(Interrupted):
        run(Watcher(stop_at=6), tmp_path / "images", tmp_path / "broken", 2)
    assert torch.equal(run(Watcher(), tmp_path / "images", tmp_path / "broken", 0), expected)
