"""Checkpoints whose folder goes away under a running job, and how often one is due."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dynexit.data import Batch
from dynexit.dist import start_ranks
from dynexit.errors import Failure
from dynexit.progress import Progress
from dynexit.train import checkpoint
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.loop import Session


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "runs" / "pack", tmp_path / "elsewhere"
    checkpoints = Checkpoints(folder)
    checkpoints.begin()
    checkpoints.save(3, {"weight": torch.arange(5)}, {"epoch": 1})
    (tmp_path / "runs").rename(elsewhere)  # as an unmounted file system leaves it
    for do in (checkpoints.check, lambda: checkpoints.save(4, {"weight": torch.ones(5)}, {"epoch": 2})):
        with pytest.raises(Failure, match=r"runs/pack is no longer the folder that the job began in: it was moved, or"):
            do()
    assert not (tmp_path / "runs").exists()
    elsewhere.rename(tmp_path / "runs")
    (saved,) = Checkpoints(folder).whole(print)
    assert saved[1] == {"epoch": 1}
    assert torch.equal(saved[0]["weight"], torch.arange(5))
    checkpoints.clear()
    assert not list(folder.iterdir())


class Counter:
    """A task that counts its steps."""

    def __init__(self) -> None:
        self.count = torch.zeros(3)

    def begin(self) -> None:
        self.count.zero_()

    def train_step(self, batch: Batch, share: float) -> Mapping[str, Tensor]:
        self.count += 1
        return {"count": self.count[0]}

    def end_epoch(self, epoch: int) -> None:
        pass

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"count": self.count}, {}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.count.copy_(tensors["count"])


@pytest.mark.parametrize(
    ("tensors", "changes", "reason"),
    [
        ({"number": torch.ones(3)}, {}, "KeyError: 'count'"),
        ({"count": torch.ones(4)}, {}, "RuntimeError: The size of tensor a"),
        ({"count": torch.ones(3)}, {"epoch": "two"}, "TypeError: 'str' object"),
        ({"count": torch.ones(3)}, {"task": None, "position": None}, "TypeError: 'NoneType' object"),
    ],
)
def test_a_checkpoint_of_another_content_is_passed_over(
    tmp_path: Path, tensors: dict[str, Tensor], changes: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = {"epoch": 1, "position": 2, "task": {}}
    checkpoints = Checkpoints(tmp_path / "pack")
    checkpoints.begin()
    checkpoints.save(5, tensors, place | changes)
    with pytest.raises(Failure) as caught:
        Session(Counter(), start_ranks("cpu"), checkpoints, Progress("train", tmp_path, 1e9))
    assert str(caught.value).startswith(f"no checkpoint in {tmp_path}/pack fits the job ({reason}")
    assert f"`mv {tmp_path}/pack {tmp_path}/pack.damaged`" in str(caught.value)
    checkpoints.save(3, {"count": torch.full((3,), 7.0)}, place)
    task = Counter()
    session = Session(task, start_ranks("cpu"), checkpoints, Progress("train", tmp_path, 1e9))
    assert (session.resumed, session.epoch, session.position) == (True, 1, 2)
    assert task.count.tolist() == [7.0] * 3
    assert f"a whole checkpoint does not fit ({reason}" in capsys.readouterr().out


def test_saving_takes_a_hundredth_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    takes = iter([40.0, 1.0, 3.0, 700.0, 3.0, 3.0, 3.0])

    def save_slowly(path: Path, tensors: object) -> str:
        clock.now += next(takes)
        return "digest"

    monkeypatch.setattr(checkpoint, "time", clock)
    monkeypatch.setattr(checkpoint, "save_tensors", save_slowly)
    regular, each_step = Checkpoints(tmp_path / "a", 60), Checkpoints(tmp_path / "b", 0)
    # half an hour at most after a slow first save, and a stalled file system changes nothing
    for checkpoints, waits in ((regular, [60, 1800, 100, 300, 300]), (each_step, [0, 0])):
        checkpoints.begin()
        for wait in waits:
            if wait:
                clock.now += wait - 1
                assert not checkpoints.due()
                clock.now += 1
            assert checkpoints.due()
            checkpoints.save(int(clock.now), {}, {})
