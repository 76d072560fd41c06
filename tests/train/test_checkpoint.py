"""Checkpoints whose folder goes away under a running job."""

from pathlib import Path

import pytest
import torch

from dynexit.errors import Failure
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
