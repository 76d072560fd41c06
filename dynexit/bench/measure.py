"""Times of a backbone's stages and exits, measured on the engine that classifies.

Shapes: B batch, P positions, H head types.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dynexit.core.confidence import max_probability
from dynexit.core.latency import BatchTimes
from dynexit.core.tradeoff import Configuration
from dynexit.deploy.assembly import HeadStack
from dynexit.deploy.engine import Engine
from dynexit.deploy.router import InFlight, even_parts
from dynexit.models.families import State
from dynexit.models.multi_exit import MultiExit

_LEAST_SECONDS, _MOST_SECONDS, _LEAST_ROUNDS = 1.0, 60.0, 5  # of the rounds of a batch size


def timing_engine(model: MultiExit, stack: HeadStack) -> Engine:
    """Returns an engine with random heads, and gates at which nobody leaves: weights do not change times."""
    heads, gates = dataclasses.replace(stack, has_gates=True).build(model, [0])
    assert gates is not None
    gates.weight.zero_()
    gates.bias.fill_(-20.0)
    return Engine(model, stack.head_types, heads, gates)


def random_images(engine: Engine, batch: int, seed: int = 0) -> Tensor:
    """Returns normally distributed images (B, C, H, W) on the engine's device."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, *engine.model.backbone.input_size, generator=generator)
    return images.to(next(engine.model.parameters()).device)


def clock(device: torch.device) -> float:
    """Returns the time in seconds, after a GPU has done its work.

    It is the process's own time on a CPU with one thread, which other work on the machine hardly changes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def interleaved_seconds(
    calls: Sequence[Callable[[], object]], device: torch.device, num_warm_up: int, num_repeats: int
) -> np.ndarray:
    """Seconds (rounds, calls) of each call, taken in turn, the first one another each round.

    There are `num_repeats` rounds; more if they take less than a second, fewer, at least five, if over a minute.
    """
    rows: list[list[float]] = []
    started = time.perf_counter()
    round_ = -num_warm_up - 1
    while len(rows) < num_repeats or time.perf_counter() - started < _LEAST_SECONDS:
        round_ += 1
        row = [0.0] * len(calls)
        for number in range(len(calls)):
            place = (number + round_) % len(calls)
            start = clock(device)
            calls[place]()
            row[place] = clock(device) - start
        if round_ >= 0:
            rows.append(row)
        if len(rows) >= _LEAST_ROUNDS and time.perf_counter() - started > _MOST_SECONDS:
            break
    return np.array(rows)


def measure_times(engine: Engine, batch: int, num_warm_up: int, num_repeats: int) -> BatchTimes:
    """Returns what every part takes at a batch size. `engine` is one of `timing_engine`.

    Totals are those of whole calls: the plain backbone, the engine without exits, with all exits of each head type and
    with gates, nobody leaving. Their differences are shared out by the times of the parts, measured one by one; no head
    takes less than it did alone, computing logits, though at batch 1 most samples pass it for less (core.bounds).
    """
    num_positions = len(engine.model.positions)
    images = random_images(engine, batch)
    ways = [-1, *range(len(engine.head_types))]
    routers = [engine.router(Configuration(((head, 1.0),) * num_positions)) for head in ways] + [engine.router(None)]
    parts = _Parts(engine, images)
    calls: list[Callable[[], object]] = [lambda: engine.plain(images)]
    calls += [lambda router=router: router.classify(images) for router in routers]  # type: ignore[misc]
    with torch.inference_mode():
        seconds = interleaved_seconds([*calls, parts.run], images.device, num_warm_up, num_repeats)
    medians = parts.medians(len(seconds))
    backbone = float(np.median(seconds[:, 0]))
    # ratios of calls of one round suffer less from a machine that is slower for a while
    none = backbone * float(np.median(seconds[:, 1] / seconds[:, 0]))
    exits = backbone * np.median((seconds[:, 2:-1] - seconds[:, 1:2]) / seconds[:, :1], axis=0)
    stages, heads_HP = medians["stage"], medians["head"].reshape(num_positions, -1).T
    exits -= medians["reader"].sum()  # which have times of their own
    for row, whole in zip(heads_HP, exits[:-1], strict=True):
        row *= max(whole / row.sum(), 1.0)
    gate = max(float(exits[-1] - heads_HP[0].sum()) / num_positions, 0.0)
    dropping = medians["drop"] if batch > 1 else np.zeros(num_positions)
    return BatchTimes(
        backbone=backbone,
        stages=tuple((stages * none / stages.sum()).tolist()),
        heads=tuple(map(tuple, (heads_HP.T + dropping[:, None]).tolist())),
        gates=(gate,) * num_positions,
        readers=tuple(medians["reader"].tolist()),
    )


class _Parts:
    """Runs stages and exits one by one and notes how long each took, for a batch in tiles as the engine's."""

    def __init__(self, engine: Engine, images: Tensor) -> None:
        self.engine, self.device = engine, images.device
        self.tiles = even_parts(images, engine.router(None).tile)
        self.rounds: list[dict[str, list[float]]] = []

    def medians(self, num_rounds: int) -> dict[str, np.ndarray]:
        """The medians of the last rounds: stage (P + 1), reader (P,), head (P * H), drop (P,)."""
        rounds = self.rounds[-num_rounds:]
        return {
            name: np.array([statistics.median(values) for values in zip(*(one[name] for one in rounds), strict=True)])
            for name in rounds[0]
        }

    def run(self) -> None:
        sums: dict[str, list[float]] = {}
        for tile in self.tiles:
            for name, values in self._run_tile(tile).items():
                before = sums.get(name, [0.0] * len(values))
                sums[name] = [a + b for a, b in zip(before, values, strict=True)]
        self.rounds.append(sums)

    def _run_tile(self, images: Tensor) -> dict[str, list[float]]:
        model = self.engine.model
        seconds: dict[str, list[float]] = {"stage": [], "reader": [], "head": [], "drop": []}
        feature: Tensor | None = None
        now = clock(self.device)
        state = model.start(images)
        for p in range(len(model.positions)):
            state = model.advance(state, p - 1, p)
            now = self._note(seconds["stage"], now)
            feature = model.feature(p, state, feature)
            read = clock(self.device) - now
            seconds["reader"].append(read if model.reading.concatenate else 0.0)
            for head_type in range(len(self.engine.head_types)):
                now = clock(self.device)
                self._decide(p, head_type, feature)
                self._note(seconds["head"], now)
                seconds["head"][-1] += 0.0 if model.reading.concatenate else read
            seconds["drop"].append(self._drop(state, feature))
            now = clock(self.device)
        model.tail(state, len(model.positions) - 1).float().cpu().numpy()
        self._note(seconds["stage"], now)
        return seconds

    def _note(self, seconds: list[float], start: float) -> float:
        now = clock(self.device)
        seconds.append(now - start)
        return now

    def _decide(self, p: int, head_type: int, feature: Tensor) -> None:
        logits = self.engine.head(p, head_type)(feature)
        gap_b = max_probability(logits.float()).cpu().numpy() - np.float32(1)
        np.count_nonzero(gap_b > 0)
        logits.float().cpu().numpy()

    def _drop(self, state: State, feature: Tensor) -> float:
        """The time of taking half of a batch out, every other sample. Works on a copy."""
        tensor = state[0] if isinstance(state, tuple) else state
        size = len(tensor)
        if size < 2:
            return 0.0
        copy: State = (tensor.clone(), *state[1:]) if isinstance(state, tuple) else tensor.clone()
        kept = feature if self.engine.model.reading.concatenate else None
        flight = InFlight(copy, np.arange(size), np.zeros(size, bool), feature_cD=kept)
        start = clock(self.device)
        flight.drop(np.arange(size) % 2 == 0, size // 2, size // 2)
        return clock(self.device) - start
