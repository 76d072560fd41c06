"""Ranks: a training means the same at any world size, every rank ends with the same bits, and NaN tells its rank."""

import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.train.ranks import run_ranks
from tests.train.tiny import largest_difference

pytestmark = pytest.mark.slow


def train(folder: Path, world_size: int, disturbance: str = "") -> list[dict]:  # type: ignore[type-arg]
    """What every rank has after the training in `tests/train/one_rank.py`."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.train.one_rank", str(folder)]
    run_ranks(world_size, command, DISTURBANCE=disturbance)
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(world_size)]


def test_world_sizes_1_2_and_3_agree_and_ranks_stop_together(tmp_path: Path) -> None:
    (alone,) = train(tmp_path / "1", 1)
    for world_size in (2, 3):
        ranks = train(tmp_path / str(world_size), world_size)
        for rank in ranks[1:]:
            assert largest_difference(ranks[0], rank) == 0.0
        assert largest_difference(alone, ranks[0]) <= 1e-10
    # a signal that one rank alone gets in the middle of an epoch has all of them save after the next step
    stopped = train(tmp_path / "stopped", 2, "signal")
    messages = {(tmp_path / "stopped" / f"rank{rank}.txt").read_text() for rank in (0, 1)}
    assert messages == {"stopped by a signal in epoch 4 after batch 5; the state is saved"}
    resumed = train(tmp_path / "stopped", 2)
    undisturbed = load_file(tmp_path / "2" / "rank0.safetensors")
    assert largest_difference(stopped[0], undisturbed) > 0
    assert largest_difference(resumed[0], undisturbed) == largest_difference(resumed[1], undisturbed) == 0.0


def test_a_checkpoint_of_4_ranks_resumes_at_2_and_8(tmp_path: Path) -> None:
    (alone,) = train(tmp_path / "1", 1)
    train(tmp_path / "4", 4, "signal")
    for world_size in (2, 8):  # of eight ranks some have one image of a batch, some two
        shutil.copytree(tmp_path / "4", tmp_path / str(world_size))
        resumed = train(tmp_path / str(world_size), world_size)
        log = (tmp_path / str(world_size) / "log.txt").read_text()
        assert "resuming after epoch 4, batch 5" in log
        for rank in resumed:
            assert largest_difference(alone, rank) <= 1e-8


def test_two_ranks_save_as_often_as_one_a_step_later(tmp_path: Path) -> None:
    saved = []
    for world_size in (1, 2):
        train(tmp_path / str(world_size), world_size, "clock")
        saved.append([int(step) for step in (tmp_path / str(world_size) / "saved.txt").read_text().split()])
    assert saved[0] == list(range(10, saved[0][-1] + 1, 10))
    assert len(saved[0]) == len(saved[1]) > 2
    assert all(alone <= together <= alone + 3 for alone, together in zip(*saved, strict=True)), saved


def test_what_stops_the_main_rank_alone_is_told_by_all(tmp_path: Path) -> None:
    train(tmp_path / "full", 2, "full")
    messages = {(tmp_path / "full" / f"rank{rank}.txt").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "checkpoint-0000000011.safetensors could not be written: Is a directory" in messages.pop()


def test_nan_on_one_rank_stops_the_member_everywhere_and_is_told(tmp_path: Path) -> None:
    ranks = train(tmp_path / "poisoned", 2, "nan")
    others = [name for name in ranks[0] if not name.startswith("2.")]
    assert all((ranks[0][name] == ranks[1][name]).all() for name in others)
    messages = (tmp_path / "poisoned" / "stopped.txt").read_text()
    assert messages.startswith("seed=1 ce_ic_tradeoff=0.3: the ")
    assert "was not finite at step 31 on rank 1; the member was stopped and its last good state kept" in messages
