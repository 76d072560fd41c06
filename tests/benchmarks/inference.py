"""Times early exit against the plain backbone: interleaved medians of process time, one thread.

    OMP_NUM_THREADS=1 python tests/benchmarks/inference.py [digits resnet50 ...] [--batch 1,64] [--rounds 7]

Backbones and heads are random, with thresholds that let samples leave so that the mean MACs are about `target` of the
backbone's. Realised is the plain backbone's time over that of the engine, by batches or as a stream. It is predicted by
MACs and by the times of the stages at full batches. The last lines of each batch size have all exits enabled and nobody
leaving: the cost of the exits.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dynexit.core.confidence import max_probability
from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import Configuration, configuration_macs_L
from dynexit.deploy.engine import Engine
from dynexit.deploy.stream import stream
from dynexit.models.backbones import build_backbone
from dynexit.models.heads import StackedHeads
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit

_DIGITS = {"layers": [2, 2, 2, 2], "channels": [16, 24, 32, 48], "stem_type": "deep", "stem_width": 6}
MODELS = {
    "digits": ("resnet18", {**_DIGITS, "output_stride": 8}, 32, 10, 1, "1,64"),
    "resnet50": ("resnet50", {}, 224, 1000, 3, "1,16"),
    "vit_s": ("vit_small_patch16_224", {}, 224, 1000, 3, "1,16"),
    "t2t_vit_7": ("t2t_vit_7", {}, 224, 1000, 3, "1,16"),
}


def build(name: str) -> tuple[Engine, ExitCosts]:
    """The model with linear heads after every block but the last."""
    backbone_name, arguments, size, classes, channels, _ = MODELS[name]
    torch.manual_seed(0)
    backbone = build_backbone(
        backbone_name, arguments=arguments, num_classes=classes, image_size=size, in_channels=channels
    )
    positions = list(range(backbone.num_blocks - 1))
    costs = exit_costs(backbone, positions, ["linear"])
    model = MultiExit(backbone, positions)
    heads = StackedHeads(model.feature_dims, positions, ["linear"], classes, [0]).requires_grad_(False)
    for parameter in heads.parameters():
        parameter.mul_(3)  # confidences that differ from one image to the next
    return Engine(model, ["linear"], heads), costs


def make_images(engine: Engine, count: int) -> Tensor:
    """Images of mixed structure, so that their confidences differ."""
    generator = torch.Generator().manual_seed(1)
    channels, height, width = engine.model.backbone.input_size
    coarse = torch.randn(count, channels, 7, 7, generator=generator)
    coarse = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    fine = torch.randn(count, channels, height, width, generator=generator)
    share = torch.rand(count, 1, 1, 1, generator=generator)
    return coarse * (1.5 * share) + fine * (1 - share) * 0.7


@torch.inference_mode()
def confidences(engine: Engine, images: Tensor) -> np.ndarray:
    """(P, N) of all exits."""
    parts = []
    for batch in images.split(16):
        features, _ = engine.model.features(batch)
        heads = (engine.head(p, 0)(feature) for p, feature in enumerate(features))
        parts.append(torch.stack([max_probability(logits) for logits in heads]))
    return torch.cat(parts, 1).numpy()


def configuration_for(
    confidence_PN: np.ndarray, costs: ExitCosts, enabled: Sequence[int], target: float
) -> Configuration:
    """Thresholds at which samples leave at the enabled exits, fewer later on, so that mean MACs are about `target`."""
    exits = [(-1, 1.0)] * len(costs.positions)
    for p in enabled:
        exits[p] = (0, 1.0)
    cost = configuration_macs_L(Configuration(tuple(exits)), costs)[[*enabled, -1]] / costs.full_macs
    low, high = -200.0, 200.0
    for _ in range(100):  # shares proportional to exp(-slope * cost)
        slope = (low + high) / 2
        shares = np.exp(-slope * (cost - cost[0 if slope > 0 else -1]))
        shares /= shares.sum()
        low, high = (slope, high) if (shares * cost).sum() > target else (low, slope)
    inside, num_gone = np.arange(confidence_PN.shape[1]), 0
    for p, total in zip(enabled, np.cumsum(shares), strict=False):
        count = min(round(total * confidence_PN.shape[1]) - num_gone, len(inside))
        order = np.argsort(-confidence_PN[p, inside], kind="stable")
        if count:
            threshold = 0.0 if count == len(inside) else float(confidence_PN[p, inside[order[count]]])
            exits[p] = (0, threshold)
        inside, num_gone = inside[order[count:]], num_gone + count
    return Configuration(tuple(exits))


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Process seconds of every function in every round, run in turn, the first one another each round."""
    names, seconds = list(functions), {name: [] for name in functions}
    for round_ in range(rounds + 1):
        turn = round_ % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.process_time()
            functions[name]()
            if round_:  # the first one warms up
                seconds[name].append(time.process_time() - start)
    return seconds


def stage_seconds(engine: Engine, configuration: Configuration, batches: Sequence[Tensor], rounds: int) -> list[float]:
    """Median process seconds of each stage, its exit included, for all images, nobody leaving."""
    nobody = Configuration(tuple((head, 1.0) for head, _ in configuration.exits))
    router = engine.router(nobody)
    seconds: list[list[float]] = [[] for _ in range(router.num_stages)]
    for _ in range(rounds):
        totals = [0.0] * router.num_stages
        for images in batches:
            start = time.process_time()
            with torch.inference_mode():
                flight = router.admit(images, np.arange(len(images)))
                for stage in range(router.num_stages):
                    router.advance(stage, flight)
                    now = time.process_time()
                    totals[stage], start = totals[stage] + now - start, now
        for values, total in zip(seconds, totals, strict=True):
            values.append(total)
    return [statistics.median(values) for values in seconds]


def measure(name: str, batch: int, rounds: int, targets: Sequence[float]) -> None:
    """Prints a line for every target, and one for all exits enabled where nobody leaves."""
    engine, costs = build(name)
    small = MODELS[name][2] < 64
    images = make_images(engine, max(batch, (512 if batch > 1 else 128) if small else 16))
    batches = list(images.split(batch))
    confidence_PN = confidences(engine, images)
    relative = np.array(costs.backbone_macs) / costs.full_macs
    three = sorted({int(np.abs(relative - share).argmin()) for share in (0.25, 0.5, 0.75)})
    backbone = engine.model.backbone.model
    never = Configuration(((0, 1.0),) * len(costs.positions))
    cases = {f"{target:g}": configuration_for(confidence_PN, costs, three, target) for target in targets}

    @torch.inference_mode()
    def plain() -> None:
        for x in batches:
            backbone(x).argmax(-1)

    for target, configuration in {**cases, "nobody leaves": never}.items():
        router = engine.router(configuration)
        functions = {"plain": plain, "engine": lambda router=router: [router.classify(x) for x in batches]}
        if batch > 1:
            functions["stream"] = lambda router=router: list(stream(router, batches, batch))
        seconds = interleaved(functions, rounds)
        plain_seconds = seconds.pop("plain")
        taken = np.concatenate([router.classify(x).exit_index_B for x in batches])
        by_macs = costs.full_macs / configuration_macs_L(configuration, costs)[taken].mean()
        enabled = [p for p, (head, _) in enumerate(configuration.exits) if head >= 0]
        reach = [1.0, *(float((taken > p).mean()) for p in enabled)]
        stages = stage_seconds(engine, configuration, batches, rounds)
        expected = sum(share * stage for share, stage in zip(reach, stages, strict=True))
        by_time = statistics.median(plain_seconds) / expected
        for way, values in seconds.items():
            ratio = statistics.median(p / e for p, e in zip(plain_seconds, values, strict=True))
            print(
                f"{name} batch {batch} target {target} {way}: {ratio:.3f} times the plain backbone "
                f"({1000 * statistics.median(plain_seconds) / len(images):.3f} ms an image); predicted by MACs "
                f"{by_macs:.3f}, by stage times {by_time:.3f}; realised / predicted "
                f"{ratio / by_macs:.3f}, {ratio / by_time:.3f}",
                flush=True,
            )


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=["digits", "resnet50"])
    parser.add_argument("--batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--targets", default="0.4,0.6")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        for batch in (options.batch or MODELS[name][5]).split(","):
            measure(name, int(batch), options.rounds, [float(target) for target in options.targets.split(",")])


if __name__ == "__main__":
    main()
