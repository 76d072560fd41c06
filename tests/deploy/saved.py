"""Model folders of small random models, made without a study."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynexit.core.confidence import CONFIDENCES
from dynexit.core.tradeoff import Configuration, configuration_macs_L
from dynexit.deploy.assembly import HeadStack, attach_exits, exit_positions, reading_of
from dynexit.deploy.card import write_card
from dynexit.deploy.description import FORMAT, PointStatistics, Preprocessing, SavedPoint, SavedTraining
from dynexit.deploy.engine import Engine
from dynexit.deploy.model import Outputs
from dynexit.deploy.model_folder import backbone_config, write_folder
from dynexit.deploy.probe import make_probe
from dynexit.deploy.router import NEAR
from dynexit.models.macs import exit_costs
from dynexit.study.schema import ExitsSettings
from tests.models.tiny import TINY, build_tiny

CLASSES = ("ant", "bee", "cat", "dog", "elk")
TYPES = ("linear", "mlp2x7")


def make_images(input_size: tuple[int, int, int], count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, *input_size, generator=torch.Generator().manual_seed(seed))


def same(a: Outputs, b: Outputs) -> bool:
    return torch.equal(a.exit_index, b.exit_index) and torch.equal(a.prediction, b.prediction)


def thresholds(confidence_PN: np.ndarray, heads: Sequence[int], share: float) -> Configuration:
    """Thresholds at which about `share` of those who reach an exit leave there."""
    inside, exits = np.arange(confidence_PN.shape[1]), []
    for p, head in enumerate(heads):
        order = np.sort(confidence_PN[p, inside])
        cut = len(order) - max(round(share * len(order)), 1)
        threshold = np.float32((order[cut - 1] + order[cut]) / 2) if cut > 0 else np.float32(0)
        exits.append((head, float(threshold) if head >= 0 else 1.0))
        inside = inside[confidence_PN[p, inside] <= threshold] if head >= 0 else inside
    return Configuration(tuple(exits))


def save_random(
    directory: Path,
    family: str = "ResNet",
    *,
    trainings: Sequence[str] = ("aa",),
    head_types: Sequence[str] = TYPES,
    exits: Mapping[str, Any] | None = None,
    shrinkage: float = 0.0,
    by_gates: bool = False,
) -> dict[str, Engine]:
    """Writes the folder of the family's smallest member with random exits. Returns what it was made of.

    `exits` are further keys of the section, `by_gates` adds points that the gates decide.
    """
    backbone = build_tiny(family)
    settings = ExitsSettings(head_types=list(head_types), **(exits or {}))
    positions = exit_positions(backbone, settings)
    costs = exit_costs(backbone, positions, head_types, reading=reading_of(settings))
    stack = HeadStack(tuple(head_types), "float32", shrinkage, True)
    engines, states, saved = {}, {}, {}
    for seed, training in enumerate(trainings):
        model = attach_exits(backbone, positions, settings)
        heads, gates = stack.build(model, [seed])
        assert gates is not None
        gates.weight.mul_(5)
        engines[training] = Engine(model, head_types, heads, gates)
        states[training] = heads.member_state(0) | gates.member_state(0)
        saved[training] = SavedTraining(
            label=f"seed={seed}",
            method="jei_dnn",
            exits=settings.model_dump(mode="json"),
            precision="float32",
            shrinkage=shrinkage,
            has_gates=True,
            costs=costs.to_json(),
            temperatures=(*[(2.0,) * len(head_types)] * len(costs.positions), (0.5,)),
        )
    images = make_images(backbone.input_size, 200, seed=5)
    points = []
    for training, engine in engines.items():
        logits_PHNK, _ = engine.all_logits(images)
        for share, confidence in ((0.4, "max_probability"), (0.15, "entropy")):
            confidence_PN = CONFIDENCES[confidence].function(logits_PHNK[:, 0]).numpy()
            way = thresholds(confidence_PN, [0] * len(costs.positions), share)
            if settings.concatenate and confidence == "entropy":  # its second exit is read, but nobody leaves there
                way = Configuration((way.exits[0], (-1, 1.0), *way.exits[2:]))
            exit_N = engine.router(way, confidence).classify(images).exit_index_B
            statistics = make_statistics(exit_N, configuration_macs_L(way, costs), costs.full_macs, 0.9 - share / 10)
            name = f"{training}-{share}"
            points.append(make_point(name, training, way, statistics, confidence))
        for way in (Configuration(((0, 0.5),) * len(costs.positions)), None) if by_gates else ():
            exit_N = engine.router(way, "gate").classify(images).exit_index_B
            macs_L = saved[training].macs_L(way, "gate")
            statistics = make_statistics(exit_N, macs_L, costs.full_macs, 0.7)
            points.append(make_point(f"{training}-gates-{way is None}", training, way, statistics, "gate"))
    nobody = Configuration(((-1, 1.0),) * len(costs.positions))
    last_N = np.full(len(images), len(costs.positions))
    statistics = make_statistics(last_N, configuration_macs_L(nobody, costs), costs.full_macs, 0.9)
    points = [
        *sorted(points, key=lambda point: point.relative_macs),
        make_point("backbone", trainings[0], nobody, statistics),
    ]
    name, arguments, size = TINY[family]
    config = backbone_config(backbone, arguments, CLASSES, (0.5,) * 3, (0.5,) * 3)
    write_folder(
        directory,
        description={
            "format": FORMAT,
            "dynexit": "0",
            "trainings": saved,
            "points": tuple(points),
            "preprocessing": Preprocessing(
                data={"name": "cifar10", "image_size": size, "test_transform": {}, "normalisation": "half"}
            ),
            "class_names": CLASSES,
            "tolerance": NEAR,
            "provenance": {"study": "random"},
        },
        config=config,
        backbone=backbone,
        heads=states,
        probe=make_probe(make_images(backbone.input_size, 5, seed=7), engines, points),
        card=write_card("random", name, tuple(points), CLASSES, backbone.input_size, kind="timm"),
    )
    return engines


def make_point(
    name: str,
    training: str,
    way: Configuration | None,
    statistics: PointStatistics,
    confidence: Any = "max_probability",
) -> SavedPoint:
    return SavedPoint(
        name=name,
        training=training,
        source="backbone" if name == "backbone" else "gates" if way is None else "search",
        confidence=confidence,
        exits=None if way is None else way.exits,
        validation=statistics,
        test=statistics,
        conformal=((0.05, 0.9), (0.5, 0.6)),
    )


def make_statistics(exit_N: np.ndarray, macs_L: np.ndarray, full_macs: int, accuracy: float) -> PointStatistics:
    return PointStatistics(
        accuracy=accuracy,
        accuracy_interval=(accuracy - 0.05, accuracy + 0.05),
        num_samples=len(exit_N),
        num_originals=len(exit_N),
        relative_macs=float(macs_L[exit_N].mean() / full_macs),
        exit_fractions=tuple((np.bincount(exit_N, minlength=len(macs_L)) / len(exit_N)).tolist()),
        mean_confidence=0.5,
    )
