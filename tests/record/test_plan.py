"""Who records what: shares and shards, without data."""

import pytest

from dynexit.record.manifest import Layout
from dynexit.record.plan import batches_per_shard, deal

EXITS = tuple((position, "linear") for position in range(6))


def layout(num_samples: int, exits: tuple[tuple[int, str], ...] = EXITS) -> Layout:
    return Layout(exits, topk=1, num_gates=len(exits), num_samples=num_samples, batch_size=256)


def sizes(shares: tuple[tuple[tuple[int, int], ...], ...]) -> list[int]:
    return [sum(last - first + 1 for first, last in share) for share in shares]


def batches(shares: tuple[tuple[tuple[int, int], ...], ...]) -> list[int]:
    return [batch for share in shares for first, last in share for batch in range(first, last + 1)]


@pytest.mark.parametrize("num_samples", [10_000, 50_000, 1_281_167])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_shares_differ_by_at_most_one_batch(num_samples: int, world_size: int) -> None:
    one = layout(num_samples)
    for most in (batches_per_shard(one, 64, 65536), batches_per_shard(one, 1), 1):
        shares = deal(one.num_batches, [], world_size, most)
        assert batches(shares) == list(range(one.num_batches))
        assert len(shares) == world_size
        assert max(sizes(shares)) - min(sizes(shares)) <= 1
        assert max(last - first + 1 for share in shares for first, last in share) <= most


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_what_is_left_is_dealt_evenly_too(world_size: int) -> None:
    complete = [(0, 8), (20, 20), (50, 77), (150, 195)]
    shares = deal(196, complete, world_size, 8)
    done = {batch for first, last in complete for batch in range(first, last + 1)}
    assert batches(shares) == [batch for batch in range(196) if batch not in done]
    assert max(sizes(shares)) - min(sizes(shares)) <= 1


def test_nothing_is_left_of_a_complete_record() -> None:
    assert deal(196, [(0, 195)], 3, 8) == ((), (), ())


@pytest.mark.parametrize(("num_samples", "num_rows"), [(10_000, 6), (50_000, 6), (1_281_167, 6), (50_000, 80)])
def test_10000_points_leave_at_most_50000_files(num_samples: int, num_rows: int) -> None:
    one = layout(num_samples, tuple((position, "linear") for position in range(num_rows)))
    shares = deal(one.num_batches, [], 64, batches_per_shard(one, 64, 65536))
    num_packs, num_splits, num_shards = 157, 2, sum(map(len, shares))
    assert num_splits * (num_packs * (num_shards + 1) + 10_000) <= 50_000  # a manifest per pack and point


def test_shards_are_bounded_in_samples_and_bytes() -> None:
    assert batches_per_shard(layout(500), 1) == 8  # 2048 samples
    assert batches_per_shard(layout(500), 1, 600) == 2
    assert batches_per_shard(layout(500), 1, 6) == 1
    assert batches_per_shard(layout(1_281_167), 1) == 79  # a 64th
    heavy = layout(1_281_167, tuple((position, "linear") for position in range(80)))
    assert batches_per_shard(heavy, 64) * 256 * 64 * heavy.num_bytes(1) <= 256 << 20
    assert batches_per_shard(heavy, 10_000) == 1
