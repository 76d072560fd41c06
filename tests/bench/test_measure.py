"""Times of the engine's parts: shapes, additivity and what they are of; not how large they are."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from dynexit.bench import measure
from dynexit.bench.machine import describe_machine
from dynexit.bench.measure import interleaved_seconds, measure_times, random_images, timing_engine
from dynexit.bench.shrinking import with_shrinking
from dynexit.core.latency import LatencyTable
from dynexit.core.tradeoff import Configuration
from dynexit.deploy.assembly import HeadStack
from dynexit.models.multi_exit import MultiExit
from dynexit.models.readers import Reading
from dynexit.provenance import cpu_name
from tests.models.tiny import build_tiny

TYPES = ("linear", "mlp2x7")


@pytest.mark.parametrize("concatenate", [False, True])
def test_every_part_has_a_time(concatenate: bool) -> None:
    backbone = build_tiny("ResNet")
    reading = Reading("average", True) if concatenate else None
    model = MultiExit(backbone, range(backbone.num_blocks - 1), TYPES, reading)
    engine = timing_engine(model, HeadStack(TYPES, "float32", 0.0, False))
    times = {batch: measure_times(engine, batch, 0, 3) for batch in (1, 3)}
    table = LatencyTable(model.positions, TYPES, times)  # checks the shapes
    for one in times.values():
        assert min(one.stages) > 0
        assert min(seconds for row in one.heads for seconds in row) > 0
        assert all((seconds > 0) == concatenate for seconds in one.readers)
    everyone = [0.0] * len(model.positions) + [1.0]
    assert table.seconds([0] * len(model.positions), everyone, 3) > table.seconds(
        [-1] * len(model.positions), everyone, 3
    )


def test_exits_sum_up_to_what_all_of_them_took(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds_of(calls: Sequence[Callable[[], object]], *_: object) -> np.ndarray:
        for call in calls:
            call()
        return np.array([[2.0, 2.0, 5.0, 8.0, 6.0, 0.0]])  # backbone, no exits, those of each type, gates, parts

    monkeypatch.setattr(measure, "interleaved_seconds", seconds_of)
    backbone = build_tiny("ResNet")
    model = MultiExit(backbone, range(backbone.num_blocks - 1), TYPES, Reading("average", True))
    times = measure_times(timing_engine(model, HeadStack(TYPES, "float32", 0.0, False)), 1, 0, 1)
    nobody = [0.0] * len(model.positions) + [1.0]
    table = LatencyTable(model.positions, TYPES, {1: times})
    for head_type, expected in enumerate((5.0, 8.0)):
        assert table.seconds([head_type] * len(model.positions), nobody, 1) == pytest.approx(expected)
    assert table.seconds([0] * len(model.positions), nobody, 1, gates=True) == pytest.approx(6.0)


def test_nobody_leaves_the_timing_engine() -> None:
    backbone = build_tiny("ResNet")
    model = MultiExit(backbone, range(backbone.num_blocks - 1))
    engine = timing_engine(model, HeadStack(("linear",), "float32", 0.0, False))
    images = random_images(engine, 4)
    for way in (None, Configuration(((0, 1.0),) * len(model.positions))):
        assert engine.router(way).classify(images).exit_index_B.tolist() == [len(model.positions)] * 4


def test_shrinking_is_measured_for_the_sizes_of_interest() -> None:
    backbone = build_tiny("ResNet")
    model = MultiExit(backbone, range(backbone.num_blocks - 1))
    engine = timing_engine(model, HeadStack(("linear",), "float32", 0.0, False))
    times = {batch: measure_times(engine, batch, 0, 3) for batch in (1, 2, 8)}
    table = with_shrinking(engine, LatencyTable(model.positions, ("linear",), times, wanted=(1, 8)), 0, 3)
    assert table.times[1] == times[1]
    assert table.times[2] == times[2]
    assert 0.5 <= table.times[8].shrunk <= 3
    assert 0.5 <= table.times[8].streamed <= 3
    assert 1 not in (table.times[8].shrunk, table.times[8].streamed)


def test_calls_take_turns() -> None:
    order: list[int] = []
    calls = [lambda number=number: order.append(number) for number in range(3)]
    seconds = interleaved_seconds(calls, torch.device("cpu"), 1, 4)
    assert seconds.shape[0] >= 4
    assert seconds.shape[1] == 3
    assert order[:9] == [2, 0, 1, 0, 1, 2, 1, 2, 0]
    assert np.all(seconds >= 0)


def test_the_machine_is_named() -> None:
    machine = describe_machine(torch.device("cpu"), "float32")
    assert machine["device_name"] == cpu_name() != ""
    assert machine["threads"] == torch.get_num_threads()
    assert {"device", "torch", "precision", "date"} <= set(machine)
