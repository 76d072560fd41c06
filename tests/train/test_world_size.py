"""Ranks: a training means the same at any world size, every rank ends with the same bits, and NaN tells its rank."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.train.ranks import run_ranks
from tests.train.tiny import largest_difference

pytestmark = pytest.mark.slow


def train(folder: Path, world_size: int, poisoned: bool = False) -> list[dict]:  # type: ignore[type-arg]
    """What every rank has after the training in `tests/train/one_rank.py`."""
    folder.mkdir()
    command = [sys.executable, "-m", "tests.train.one_rank", str(folder)]
    run_ranks(world_size, command, POISONED=int(poisoned))
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(world_size)]


def test_world_sizes_1_2_and_3_agree(tmp_path: Path) -> None:
    (alone,) = train(tmp_path / "1", 1)
    for world_size in (2, 3):
        ranks = train(tmp_path / str(world_size), world_size)
        for rank in ranks[1:]:
            assert largest_difference(ranks[0], rank) == 0.0
        assert largest_difference(alone, ranks[0]) <= 1e-10


def test_nan_on_one_rank_stops_the_member_everywhere_and_is_told(tmp_path: Path) -> None:
    ranks = train(tmp_path / "poisoned", 2, poisoned=True)
    others = [name for name in ranks[0] if not name.startswith("2.")]
    assert all((ranks[0][name] == ranks[1][name]).all() for name in others)
    told = (tmp_path / "poisoned" / "stopped.txt").read_text()
    assert told.startswith("seed=1 ce_ic_tradeoff=0.3: the ")
    assert "was not finite at step 31 on rank 1; the member was stopped and its last good state kept" in told
