"""Checkpoints whose folder goes away under a running job, and how often one is due."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dynexit.errors import Failure
from dynexit.train import checkpoint
from dynexit.train.checkpoint import Checkpoints


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
    saved = Checkpoints(folder).latest(print)
    assert saved is not None
    assert saved[1] == {"epoch": 1}
    assert torch.equal(saved[0]["weight"], torch.arange(5))
    checkpoints.clear()
    assert not list(folder.iterdir())


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
