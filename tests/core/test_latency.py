"""Mean times of leaving early: against an enumeration of all batches, and what is refused."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynexit.core.cost import ExitCosts
from dynexit.core.latency import BatchTimes, LatencyTable, sizes_to_measure
from dynexit.core.tradeoff import Configuration, configuration_macs_L

COSTS = ExitCosts(100, (0, 1), (20, 50), ("linear", "mlp2x8"), ((1, 2), (3, 4)), (1, 1))
TABLE = LatencyTable(
    (0, 1),
    ("linear", "mlp2x8"),
    {
        1: BatchTimes(1.1, (0.3, 0.5, 0.2), ((0.03, 0.05), (0.02, 0.06)), (0.01, 0.02), (0.0, 0.0)),
        4: BatchTimes(2.4, (1.0, 0.9, 0.3), ((0.04, 0.08), (0.05, 0.07)), (0.01, 0.03), (0.0, 0.0)),
    },
    {"device": "cpu"},
)
SHARES = (0.5, 0.3, 0.2)


def time_of(counts: dict[int, float], number: int) -> float:
    """Seconds for `number` samples by a line through 0, 1 and 4."""
    return float(np.interp(number, [0, 1, 4], [0.0, counts[1], counts[4]]))


def enumerated_seconds(heads: list[int], shares: tuple[float, ...], batch: int) -> float:
    """The mean over all ways in which the samples of a batch may leave."""
    total = 0.0
    for exits in itertools.product(range(3), repeat=batch):
        probability = float(np.prod([shares[exit_] for exit_ in exits]))
        for p in range(3):
            arriving = sum(exit_ >= p for exit_ in exits)
            total += probability * time_of({b: one.stages[p] for b, one in TABLE.times.items()}, arriving)
            if p < 2 and heads[p] >= 0:
                times = {b: one.heads[p][heads[p]] for b, one in TABLE.times.items()}
                total += probability * time_of(times, arriving)
    return total


@pytest.mark.parametrize("heads", [[0, 1], [-1, 0], [1, -1], [-1, -1]])
def test_the_mean_time_is_that_of_all_batches(heads: list[int]) -> None:
    shares = tuple(np.array([(0.5 if heads[0] >= 0 else 0), (0.3 if heads[1] >= 0 else 0), 0.2]))
    shares = tuple(share / sum(shares) for share in shares)
    for batch in (1, 4):
        assert TABLE.seconds(heads, shares, batch) == pytest.approx(enumerated_seconds(heads, shares, batch), rel=1e-12)


def test_shrunk_batches_take_longer() -> None:
    heads, shares = [0, 1], (0.5, 0.3, 0.2)
    table = replace(TABLE, times={**TABLE.times, 4: replace(TABLE.times[4], shrunk=1.5)})
    whole = TABLE.times[4].stages[0] + TABLE.times[4].heads[0][0]  # all four pass the first stage and its exit
    full_batch_beyond = 0.5**4 * (TABLE.times[4].stages[1] + TABLE.times[4].heads[1][1])
    full_batch_beyond += 0.2**4 * TABLE.times[4].stages[2]
    smaller = TABLE.seconds(heads, shares, 4) - whole - full_batch_beyond
    assert table.seconds(heads, shares, 4) == pytest.approx(whole + full_batch_beyond + 1.5 * smaller)
    assert table.seconds(heads, shares, 1) == TABLE.seconds(heads, shares, 1)
    assert table.seconds(heads, (0.0, 0.0, 1.0), 4) == TABLE.seconds(heads, (0.0, 0.0, 1.0), 4)


@pytest.mark.parametrize("num_images", [1, 3, 4, 10, 403])
def test_a_stream_runs_full_batches_and_the_rest(num_images: int) -> None:
    table = replace(TABLE, times={**TABLE.times, 4: replace(TABLE.times[4], shrunk=1.2, streamed=1.1)})
    one, four = TABLE.times[1], TABLE.times[4]
    expected = 0.0
    for p, share in enumerate((1.0, 0.5, 0.2)):
        waiting = round(num_images * share)
        while waiting:
            size = min(waiting, 4)
            seconds = time_of({1: one.stages[p], 4: four.stages[p]}, size)
            if p < 2:
                seconds += time_of({1: one.heads[p][p], 4: four.heads[p][p]}, size)
            expected += 1.1 * seconds * (1 if size == 4 else 1.2)
            waiting -= size
    relative = table.relative_as_stream([0, 1], (0.5, 0.3, 0.2), 4, num_images)
    assert relative == pytest.approx(expected / (four.backbone * num_images / 4))


def test_a_long_stream_has_the_linear_cost() -> None:
    configuration, shares = Configuration(((0, 0.5), (1, 0.5))), (0.5, 0.3, 0.2)
    cost_L = configuration_macs_L(configuration, TABLE.costs(4, COSTS, gates=True)) / 1e12
    relative = TABLE.relative_as_stream([0, 1], shares, 4, 10**6, gates=True)
    assert relative == pytest.approx(float(cost_L @ np.array(shares)) / (TABLE.times[4].backbone / 4), rel=1e-4)


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_a_batch_of_one_has_the_linear_cost(weights: list[float]) -> None:
    """There the search's cost is exact."""
    shares = tuple(np.array(weights) / sum(weights))
    configuration = Configuration(((0, 0.5), (1, 0.5)))
    cost_L = configuration_macs_L(configuration, TABLE.costs(1, COSTS)) / 1e12
    assert TABLE.seconds([0, 1], shares, 1) == pytest.approx(float(cost_L @ np.array(shares)), rel=1e-9)


def test_nobody_leaving_costs_all_stages_and_exits() -> None:
    assert TABLE.seconds([-1, -1], (0, 0, 1), 4) == pytest.approx(2.2)
    assert TABLE.seconds([0, 1], (0, 0, 1), 4) == pytest.approx(2.2 + 0.04 + 0.07)
    assert TABLE.seconds([0, 1], (0, 0, 1), 4, gates=True) == pytest.approx(2.2 + 0.04 + 0.07 + 0.01 + 0.03)
    assert TABLE.relative([-1, -1], (0, 0, 1), 4) == pytest.approx(2.2 / 2.4)
    assert TABLE.seconds([0, -1], (1.0, 0, 0), 4) == pytest.approx(1.04)


def test_concatenated_features_are_read_up_to_the_last_exit() -> None:
    one = BatchTimes(1.0, (0.4, 0.3, 0.3), ((0.01,), (0.01,)), (0.0, 0.0), (0.02, 0.05))
    table = LatencyTable((0, 1), ("linear",), {1: one})
    costs = ExitCosts(100, (0, 1), (20, 50), ("linear",), ((1,), (3,)), (1, 1), (2, 2))
    for heads, shares, expected in (
        ([-1, 0], (0, 0, 1.0), 1.0 + 0.02 + 0.05 + 0.01),
        ([0, -1], (0, 0, 1.0), 1.0 + 0.02 + 0.01),
    ):
        assert table.seconds(heads, shares, 1) == pytest.approx(expected)
        way = Configuration(tuple((head, 0.5 if head >= 0 else 1.0) for head in heads))
        assert configuration_macs_L(way, table.costs(1, costs))[-1] / 1e12 == pytest.approx(expected)


def test_costs_are_picoseconds_of_an_image() -> None:
    costs = TABLE.costs(4, COSTS)
    assert costs.full_macs == 55 * 10**10
    assert costs.backbone_macs == (25 * 10**10, 475 * 10**9)
    assert costs.head_macs[0] == (10**10, 2 * 10**10)
    assert TABLE.costs(4, COSTS, gates=True).head_macs[1] == (2 * 10**10, 25 * 10**9)
    with pytest.raises(KeyError):
        TABLE.costs(2, COSTS)
    other = ExitCosts(100, (0, 2), (20, 50), ("linear",), ((1,), (3,)), (1, 1))
    with pytest.raises(ValueError, match=r"it has positions \[0, 1\] with linear, mlp2x8, the record has \[0, 2\]"):
        TABLE.costs(4, other)


def test_json_gives_the_same_table() -> None:
    text = json.dumps(TABLE.to_json())
    again = LatencyTable.from_json(json.loads(text))
    assert again == replace(TABLE, wanted=(1, 4))
    assert json.dumps(again.to_json()) == text
    older = json.loads(text)
    for one in older["seconds_by_batch_size"].values():
        del one["shrunk"], one["streamed"]
    assert LatencyTable.from_json(older) == again


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "it has no format version 1"),
        ("positions", [0], "the times of batch size 1 do not fit 1 positions and 2 head types"),
        ("head_types", None, "it holds no table of times"),
        ("seconds_by_batch_size", {}, "batch sizes"),
        ("seconds_by_batch_size", {"0": {}}, "it holds no table of times"),
        ("seconds_by_batch_size", [], "it holds no table of times"),
    ],
)
def test_another_file_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatencyTable.from_json({**TABLE.to_json(), key: value})
    with pytest.raises(ValueError, match="format version"):
        LatencyTable.from_json([1])


def test_sizes_between_those_wanted_are_measured_too() -> None:
    assert sizes_to_measure([1, 8, 64]) == [1, 2, 4, 8, 23, 64]
    assert sizes_to_measure([1]) == [1]
    assert sizes_to_measure([64, 2]) == [1, 2, 11, 64]
    table = replace(TABLE, wanted=(4,))
    assert table.batch_sizes == (4,)
    assert LatencyTable.from_json(table.to_json()) == table
    with pytest.raises(ValueError, match=r"batch sizes \[3\] are wanted and \[1, 4\] measured"):
        replace(TABLE, wanted=(3,))


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"a time of batch size 1 is {seconds}; times are seconds of 0 or more"):
        LatencyTable((0,), ("linear",), {1: BatchTimes(1.0, (seconds, 1.0), ((0.1,),), (0.0,), (0.0,))})
    with pytest.raises(ValueError, match="the backbone takes no time at batch size 1"):
        LatencyTable((0,), ("linear",), {1: BatchTimes(1.0, (0.0, 0.0), ((0.1,),), (0.0,), (0.0,))})
