"""Times this engine against earlyon 0.3 (PyPI): the same ResNet-50, heads, thresholds and images, interleaved.

    pip install --no-deps --target PEERS earlyon==0.3.0 click
    OMP_NUM_THREADS=1 PYTHONPATH=PEERS python tests/benchmarks/peers.py [--size 224] [--batch 1,8,64] [--rounds 5]

Three exits after layer1 to layer3, heads of two layers with weights that both share, thresholds at which an image costs
about 0.6 of the MACs on average. At batch 1 both leave at the same exits, which is checked. earlyon lets a batch leave
where all of its images may: `mixed` batches are as they come, `sorted` ones hold images that leave at the same exits,
the best case for it. Ratios are earlyon's process time over the engine's: above 1 the engine is faster.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from earlyon.models import custom_ee
from inference import configuration_for, make_images, process_seconds
from torch import Tensor

from dynexit.core.confidence import max_probability
from dynexit.core.tradeoff import Configuration, configuration_macs_L
from dynexit.deploy.engine import Engine
from dynexit.models.backbones import build_backbone
from dynexit.models.heads import StackedHeads
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit

POSITIONS, LAYERS, HEAD = (2, 6, 12), ["layer1", "layer2", "layer3"], "mlp2x128"


def build(size: int, num_images: int) -> tuple[Engine, Configuration, torch.nn.Module, torch.Tensor]:
    """The engine, its configuration, earlyon's wrapper of the same weights and thresholds, and images."""
    torch.manual_seed(0)
    backbone = build_backbone("resnet50", num_classes=1000, image_size=size)
    costs = exit_costs(backbone, POSITIONS, [HEAD])
    model = MultiExit(backbone, POSITIONS, [HEAD])
    heads = StackedHeads(model.feature_dims, POSITIONS, [HEAD], 1000, [0]).requires_grad_(False)
    for parameter in heads.parameters():
        parameter.mul_(3)  # confidences that differ from one image to the next
    engine = Engine(model, [HEAD], heads)
    images = make_images(engine, num_images)
    logits = torch.cat([engine.all_logits(part)[0] for part in images.split(16)], 2)
    relative_E = configuration_macs_L(Configuration(((0, 1.0),) * 3), costs) / costs.full_macs
    exits = configuration_for(max_probability(logits[:, 0]).numpy(), range(3), relative_E, 0.6).exits
    # its thresholds are confidences of images, which would leave here above them, there at them
    configuration = Configuration(tuple((head, float(np.float32(threshold + 1e-5))) for head, threshold in exits))
    peer = custom_ee(
        copy.deepcopy(backbone.model),
        LAYERS,
        1000,
        input_shape=(1, 3, size, size),
        confidence_thresholds=[threshold for _, threshold in configuration.exits],
    ).eval()
    for p, head in enumerate(peer.exit_heads.values()):
        layers = [layer for layer in head.classifier if isinstance(layer, torch.nn.Linear)]
        for layer, (weight, bias) in zip(layers, engine.head(p, 0).layers, strict=True):
            layer.weight.data.copy_(weight)
            layer.bias.data.copy_(bias)
    return engine, configuration, peer, images


def by_batch(
    ways: dict[str, Callable[[Tensor], object]], batches: Sequence[Tensor], rounds: int
) -> dict[str, list[list[float]]]:
    """Process seconds (rounds, batches) of each way; they take turns at every batch, so that load meets both."""
    rows: dict[str, list[list[float]]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        row: dict[str, list[float]] = {name: [] for name in ways}
        for number, images in enumerate(batches):
            for name in sorted(ways, reverse=(number + round_) % 2 == 1):
                row[name].append(process_seconds(partial(ways[name], images)))
        for name, seconds in row.items() if round_ else ():  # the first round warms up
            rows[name].append(seconds)
    return rows


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine, configuration, peer, images = build(options.size, options.images)
    router = engine.router(configuration)
    alone = [peer(image[None]) for image in images]
    taken = np.array([one.exit_taken % 4 for one in alone])  # -1 is the backbone's own classifier
    answers = router.classify(images)
    assert (taken == answers.exit_index_B).all()
    assert [int(one.prediction.argmax()) for one in alone] == answers.prediction_B.tolist()
    print(
        f"{len(images)} images of {options.size} px leave at exits {np.bincount(taken, minlength=4).tolist()} in both"
    )
    orders = {"mixed": np.arange(len(images)), "sorted": np.argsort(taken, kind="stable")}
    for batch in map(int, options.batch.split(",")):
        for name in orders if batch > 1 else ["mixed"]:
            batches = images[torch.from_numpy(orders[name])].split(batch)

            ways = {"earlyon": peer if batch == 1 else peer.forward_inference_batched, "engine": router.classify}
            totals = {
                name: sum(map(statistics.median, zip(*seconds, strict=True)))
                for name, seconds in by_batch(ways, batches, options.rounds).items()
            }
            ratio = totals["earlyon"] / totals["engine"]
            each = {name: 1000 * total / len(images) for name, total in totals.items()}
            print(
                f"batch {batch}, {name}: earlyon {each['earlyon']:.2f} ms an image, engine {each['engine']:.2f}; "
                f"ratio {ratio:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
