"""Times early exit against the plain backbone and holds it against the goals: medians of process time, one thread.

    OMP_NUM_THREADS=1 python tests/benchmarks/inference.py [digits resnet50 ...] [--rounds 7] [--optimize none]

Weights are random, and thresholds are chosen so that samples leave in the shares that make the mean time 0.4, 0.6 and
0.8 of the plain backbone's, by the stages' times at full batches. All ways run in turn in each round, with the same
optimisation and tiles of the backbone. Realised is the plain backbone's time over that of the engine, by batches of 64
or as a stream of them. It is held against the predictions by MACs and by time, which are those of stage bench, the
search and `infer`. At batch 1 all exits are enabled and nobody leaves: the cost of the exits.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynexit.bench.measure import measure_times, timing_engine
from dynexit.bench.shrinking import with_shrinking
from dynexit.core.confidence import max_probability
from dynexit.core.cost import STEM, ExitCosts
from dynexit.core.latency import LatencyTable, sizes_to_measure
from dynexit.core.tradeoff import Configuration, configuration_macs_L
from dynexit.deploy.assembly import HeadStack
from dynexit.deploy.engine import Engine
from dynexit.deploy.optimize import optimized_backbone, with_quick_pooling
from dynexit.deploy.stream import stream
from dynexit.models.backbones import build_backbone
from dynexit.models.heads import StackedHeads
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit
from dynexit.models.readers import Reading

SMALL: dict[str, Any] = {"layers": [2, 2, 2, 2], "channels": [16, 24, 32, 48], "stem_type": "deep", "stem_width": 6}
SMALL["output_stride"] = 8
TARGETS = (0.4, 0.6, 0.8)
TIME_GOAL = 0.95


@dataclasses.dataclass(frozen=True)
class TimedNet:
    """A backbone with heads of one type after every block but the last, and its goals."""

    backbone: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    image: tuple[int, int] = (3, 224)  # channels and side
    num_classes: int = 1000
    head_type: str = "linear"
    reading: Reading = dataclasses.field(default_factory=Reading)
    stem: bool = False
    macs_goals: tuple[float, ...] = ()  # realised / predicted by MACs at TARGETS
    batch_1_goal: float = 0.97  # of the plain model's rate, all exits enabled, nobody leaves

    @property
    def is_small(self) -> bool:
        return self.image[1] < 64


CASES = {
    "digits": TimedNet("resnet18", SMALL, (1, 32), 10, batch_1_goal=0.6),
    "fashion_mnist": TimedNet(
        *("resnet18", SMALL, (1, 32), 10, "mlp2x64"),
        Reading("average_max_std", concatenate=True),
        stem=True,
        batch_1_goal=0,
    ),
    "vit_s": TimedNet("vit_small_patch16_224", macs_goals=(0.9, 0.9, 0.9)),
    "resnet50": TimedNet("resnet50", macs_goals=(0.8, 0.88, 0.93)),
    "t2t_vit_7": TimedNet("t2t_vit_7"),
}


def build(case: TimedNet, optimize: str) -> tuple[Engine, ExitCosts]:
    """The model, its backbone optimised."""
    torch.manual_seed(0)
    channels, side = case.image
    backbone = build_backbone(
        case.backbone, arguments=case.arguments, num_classes=case.num_classes, image_size=side, in_channels=channels
    )
    positions = [*([STEM] if case.stem else []), *range(backbone.num_blocks - 1)]
    costs = exit_costs(backbone, positions, [case.head_type], reading=case.reading)
    backbone = (
        with_quick_pooling(backbone)
        if optimize == "none"
        else optimized_backbone(backbone, optimize, torch.device("cpu"))
    )
    model = MultiExit(backbone, positions, [case.head_type], case.reading)
    heads = StackedHeads(model.feature_dims, positions, [case.head_type], case.num_classes, [0]).requires_grad_(False)
    for parameter in heads.parameters():
        parameter.mul_(3)  # confidences that differ from one image to the next
    return Engine(model, [case.head_type], heads), costs


def make_images(engine: Engine, count: int) -> Tensor:
    """Images of mixed structure, so that their confidences differ."""
    generator = torch.Generator().manual_seed(1)
    channels, height, width = engine.model.backbone.input_size
    coarse = torch.randn(count, channels, 7, 7, generator=generator)
    coarse = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    fine = torch.randn(count, channels, height, width, generator=generator)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    return coarse * (1.5 * share) + fine * (1 - share) * 0.7


def configuration_for(
    confidence_PN: np.ndarray, enabled: Sequence[int], cost_E: np.ndarray, target: float
) -> Configuration:
    """Thresholds at which samples leave at the enabled exits, fewer later on, so that the mean cost is about `target`.

    `cost_E` is that of leaving at each enabled exit, then that of leaving at none.
    """
    exits = [(-1, 1.0)] * len(confidence_PN)
    low, high = -200.0, 200.0
    for _ in range(100):  # shares proportional to exp(-slope * cost)
        slope = (low + high) / 2
        shares = np.exp(-slope * (cost_E - cost_E[0 if slope > 0 else -1]))
        shares /= shares.sum()
        low, high = (slope, high) if (shares * cost_E).sum() > target else (low, slope)
    inside, num_gone = np.arange(confidence_PN.shape[1]), 0
    for p, total in zip(enabled, np.cumsum(shares), strict=False):
        count = min(round(total * confidence_PN.shape[1]) - num_gone, len(inside))
        exits[p] = (0, 1.0)
        order = np.argsort(-confidence_PN[p, inside], kind="stable")
        if count:
            threshold = 0.0 if count == len(inside) else float(confidence_PN[p, inside[order[count]]])
            exits[p] = (0, threshold)
        inside, num_gone = inside[order[count:]], num_gone + count
    return Configuration(tuple(exits))


def measure_table(engine: Engine, costs: ExitCosts, batch: int) -> LatencyTable:
    """The times of stages and exits as stage bench measures them."""
    timed = timing_engine(engine.model, HeadStack(costs.head_types, "float32", 0.0, True))
    times = {size: measure_times(timed, size, 2, 20) for size in sizes_to_measure([batch])}
    return with_shrinking(timed, LatencyTable(costs.positions, costs.head_types, times, {}, (batch,)), 2, 20)


def process_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def in_turn(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """What every function gives in every round, run in turn, the first one another each round."""
    names, results = list(functions), {name: [] for name in functions}
    for round_ in range(rounds + 1):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            result = functions[name]()
            if round_:  # the first one warms up
                results[name].append(result)
    return results


def report(text: str, value: float, goal: float) -> None:
    verdict = f"goal {goal:g}: {'met' if value >= goal else 'NOT MET'}" if goal else "reported"
    print(f"{text} {value:.3f} ({verdict})", flush=True)


def measure_one_by_one(name: str, case: TimedNet, optimize: str, rounds: int) -> None:
    """Prints the rate at batch 1 with all exits enabled and nobody leaving."""
    engine, costs = build(case, optimize)
    images = list(make_images(engine, 128 if case.is_small else 6).split(1))
    router = engine.router(Configuration(((0, 1.0),) * len(costs.positions)))
    results = in_turn(
        {
            "plain": lambda: process_seconds(lambda: [engine.plain(image) for image in images]),
            "engine": lambda: process_seconds(lambda: [router.classify(image) for image in images]),
        },
        rounds,
    )
    ratio = statistics.median(p / e for p, e in zip(results["plain"], results["engine"], strict=True))
    report(
        f"{name}, batch 1, all {len(costs.positions)} exits, nobody leaves: of the plain rate", ratio, case.batch_1_goal
    )


def measure_batches(name: str, case: TimedNet, optimize: str, rounds: int, batch: int = 64) -> None:
    """Prints the realised speed-up at every target, by batches and for small images as a stream too."""
    engine, costs = build(case, optimize)
    images = make_images(engine, 1024 if case.is_small else batch)
    batches = list(images.split(batch))
    logits = torch.cat([engine.all_logits(part)[0] for part in images.split(16)], 2)
    confidence_PN = max_probability(logits[:, 0]).numpy()
    relative = np.array(costs.backbone_macs) / costs.full_macs
    enabled = sorted({int(np.abs(relative - share).argmin()) for share in (0.15, 0.25, 0.5, 0.75)})
    nobody = Configuration(tuple((0 if p in enabled else -1, 1.0) for p in range(len(relative))))
    table = measure_table(engine, costs, batch)
    by_image = table.costs(batch, costs)  # of full batches
    plain_cost = table.times[batch].backbone / batch * 1e12
    cost_E = configuration_macs_L(nobody, by_image)[[*enabled, -1]] / plain_cost
    ways: dict[str, Callable[[], Any]] = {"plain": lambda: process_seconds(lambda: [engine.plain(x) for x in batches])}
    print(
        f"{name}: {len(images)} images; exits after blocks {[costs.positions[p] for p in enabled]}, at "
        f"{np.round(cost_E, 3).tolist()} of the time, {np.round(relative[enabled], 3).tolist()} of the MACs"
    )
    configurations = {}
    for target in TARGETS:
        if target < cost_E[0]:
            print(f"{name}, {target:g} of the time: unattainable, the first exit is at {cost_E[0]:.3f}")
            continue
        configurations[target] = configuration_for(confidence_PN, enabled, cost_E, target)
        router = engine.router(configurations[target])
        ways[f"{target:g} batches"] = lambda router=router: process_seconds(
            lambda: [router.classify(x) for x in batches]
        )
        if case.is_small:
            ways[f"{target:g} stream"] = lambda router=router: process_seconds(
                lambda: list(stream(router, batches, batch))
            )
    results = in_turn(ways, rounds)
    plain = np.array(results["plain"])
    seconds = float(np.median(plain))
    for target, configuration in configurations.items():
        router = engine.router(configuration)
        exits = np.concatenate([router.classify(x).exit_index_B for x in batches])
        fractions = np.bincount(exits, minlength=len(relative) + 1) / len(exits)
        macs = configuration_macs_L(configuration, costs)[exits].mean()
        way_out = ([head for head, _ in configuration.exits], fractions.tolist(), batch)
        times = {"batches": table.relative(*way_out), "stream": table.relative_as_stream(*way_out, len(images))}
        for way, relative_time in times.items():
            if (key := f"{target:g} {way}") not in results:
                continue
            ratio = float(np.median(plain / np.array(results[key])))
            print(
                f"{name}, {target:g} of the time, {way} of {batch}: {ratio:.3f} times the plain backbone "
                f"({1000 * seconds / len(images):.3f} ms an image); predicted {1 / relative_time:.3f} by time, "
                f"{costs.full_macs / macs:.3f} by MACs"
            )
            report("    realised / predicted by time", ratio * relative_time, TIME_GOAL)
            goals = dict(zip(TARGETS, case.macs_goals, strict=False)) if way == "batches" else {}
            report("    realised / predicted by MACs", ratio * macs / costs.full_macs, goals.get(target, 0))


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--optimize", choices=["none", "float32", "bf16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.cases:
        measure_batches(name, CASES[name], options.optimize, options.rounds)
        measure_one_by_one(name, CASES[name], options.optimize, options.rounds)


if __name__ == "__main__":
    main()
