"""The engine against all exits of the whole batch: same exits, classes and logits, whatever the batch size."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from dynexit.core.confidence import CONFIDENCES, gate_features
from dynexit.core.cost import STEM
from dynexit.core.exit_policy import exit_index_from_gates
from dynexit.core.tradeoff import Configuration, apply_configuration
from dynexit.deploy.engine import Engine, largest_tile
from dynexit.deploy.router import NEAR, Answers, Router, join
from dynexit.deploy.stream import stream
from dynexit.errors import UserError
from dynexit.models.heads import StackedGates, StackedHeads
from dynexit.models.multi_exit import MultiExit
from dynexit.models.products import PlainHead
from dynexit.models.readers import Reading
from tests.models.tiny import build_tiny

TYPES = ("linear", "mlp2x7")
FAMILIES = ("ResNet", "EVA mixed", "ViT", "Swin", "T2T-ViT")


def build(
    family: str, head_types: Sequence[str] = TYPES, shrinkage: float = 0.0, tile: int = 1000
) -> tuple[Engine, StackedHeads, StackedGates]:
    backbone = build_tiny(family)
    model = MultiExit(backbone, range(backbone.num_blocks - 1), head_types)
    heads = StackedHeads(model.feature_dims, model.positions, head_types, 5, [3], shrinkage=shrinkage)
    gates = StackedGates(len(model.positions), [3])
    for module in (heads, gates):
        module.requires_grad_(False)
    return Engine(model, head_types, heads, gates, tile), heads, gates


def images_for(engine: Engine, count: int = 23) -> Tensor:
    return torch.randn(count, *engine.model.backbone.input_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def all_exits(engine: Engine, heads: StackedHeads, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of every exit (P, H, B, K), and of the backbone (B, K)."""
    features, final_BK = engine.model.features(images)
    rows = heads(features)[0]
    return rows.view(len(features), -1, *rows.shape[1:]), final_BK


def middle_thresholds(confidence_PHB: np.ndarray, heads: Sequence[int]) -> Configuration:
    """Thresholds that let about a third leave at each exit, midway between two samples' confidences."""
    inside, exits = np.arange(confidence_PHB.shape[2]), []
    for p, head in enumerate(heads):
        confidence_b = confidence_PHB[p, max(head, 0), inside]
        order = np.sort(confidence_b)
        threshold = np.float32((order[-len(order) // 3 - 1] + order[-len(order) // 3]) / 2) if len(order) > 2 else 1
        exits.append((head, float(threshold)))
        inside = inside[confidence_b <= threshold] if head >= 0 else inside
    return Configuration(tuple(exits))


def in_batches(router: Router, images: Tensor, size: int) -> Answers:
    return join([router.classify(batch) for batch in images.split(size)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("confidence", ["max_probability", "entropy"])
def test_leaves_as_the_configuration_says(family: str, confidence: str) -> None:
    engine, heads, _ = build(family)
    images = images_for(engine)
    kept = images.clone()
    logits_PHBK, final_BK = all_exits(engine, heads, images)
    confidence_PHB = CONFIDENCES[confidence].function(logits_PHBK).numpy()
    num_positions = len(engine.model.positions)
    enabled = [(0, 1, -1)[p % 3] for p in range(num_positions)]
    configuration = middle_thresholds(confidence_PHB, enabled)
    nothing = np.zeros(confidence_PHB.shape, bool)
    exit_B, _ = apply_configuration(configuration, confidence_PHB, nothing, nothing[0, 0])
    assert len(set(exit_B)) > 2
    for size in (1, 2, 7, 23):
        answers = in_batches(engine.router(configuration, confidence), images, size)
        assert ((answers.exit_index_B == exit_B) | answers.near_B).all()
        assert answers.near_B.mean() < 0.2
        for i, p in enumerate(answers.exit_index_B):
            logits_K = final_BK[i] if p == num_positions else logits_PHBK[p, enabled[p], i]
            np.testing.assert_allclose(answers.logits_BK[i], logits_K, atol=2e-5, rtol=1e-5)
            assert answers.prediction_B[i] == logits_K.argmax()
    assert torch.equal(images, kept)


@pytest.mark.parametrize("family", ["ResNet", "ViT"])
def test_leaves_as_the_gates_say(family: str) -> None:
    engine, heads, gates = build(family, ("linear",))
    images = images_for(engine)
    logits_PHBK, _ = all_exits(engine, heads, images)
    rows_PBK = logits_PHBK[:, 0]
    gates.weight.mul_(300)
    outputs_PB = gates(gate_features(rows_PBK)[None])[0]
    gates.bias[0] -= outputs_PB.quantile(0.7, 1)  # so that samples leave at several exits
    outputs_PB = gates(gate_features(rows_PBK)[None])[0].sigmoid()
    engine = Engine(engine.model, ("linear",), heads, gates)
    exit_B = exit_index_from_gates(outputs_PB).numpy()
    assert len(set(exit_B)) > 2
    for size in (1, 5, 23):
        answers = in_batches(engine.router(None), images, size)
        np.testing.assert_array_equal(answers.exit_index_B, exit_B)
    configuration = Configuration(((0, 0.5),) * len(engine.model.positions))
    leaves_PB = outputs_PB.numpy() > np.float32(0.5)
    first_B = np.where(leaves_PB.any(0), leaves_PB.argmax(0), len(leaves_PB))
    for size in (1, 23):
        answers = in_batches(engine.router(configuration, "gate"), images, size)
        np.testing.assert_array_equal(answers.exit_index_B, first_B)


@pytest.mark.parametrize("reader", ["average_max_std", None])
def test_concatenated_features_and_a_stem_exit(reader: str | None) -> None:
    backbone = build_tiny("ResNet")
    positions = [STEM, *range(backbone.num_blocks - 1)]
    model = MultiExit(backbone, positions, ("linear",), Reading(reader, concatenate=True))
    heads = StackedHeads(model.feature_dims, positions, ("linear",), 5, [3]).requires_grad_(False)
    engine = Engine(model, ("linear",), heads, None, 1000)
    images = images_for(engine)
    kept = images.clone()
    logits_PHBK, _ = all_exits(engine, heads, images)
    confidence_PHB = CONFIDENCES["max_probability"].function(logits_PHBK).numpy()
    nothing = np.zeros(confidence_PHB.shape, bool)
    for enabled in ([0, -1, 0, -1, -1, 0, -1, -1], [-1, -1, -1, 0, 0, -1, -1, -1], [0] * 8):
        configuration = middle_thresholds(confidence_PHB, enabled[: len(positions)])
        exit_B, _ = apply_configuration(configuration, confidence_PHB, nothing, nothing[0, 0])
        assert len(set(exit_B)) > 2
        router = engine.router(configuration)
        for size in (1, 7, 23):
            answers = in_batches(router, images, size)
            assert ((answers.exit_index_B == exit_B) | answers.near_B).all()
        streamed = join(list(stream(router, images.split(5), 6)))
        assert ((streamed.exit_index_B == exit_B) | streamed.near_B).all()
    assert torch.equal(images, kept)


def test_additive_heads_add_the_exit_before() -> None:
    engine, heads, _ = build("ResNet", ("linear",), shrinkage=0.5)
    images = images_for(engine)
    logits_PHBK, _ = all_exits(engine, heads, images)
    confidence_PHB = CONFIDENCES["max_probability"].function(logits_PHBK).numpy()
    configuration = middle_thresholds(confidence_PHB, [0] * len(engine.model.positions))
    nothing = np.zeros(confidence_PHB.shape, bool)
    exit_B, _ = apply_configuration(configuration, confidence_PHB, nothing, nothing[0, 0])
    assert len(set(exit_B)) > 2
    for size in (1, 4, 23):
        answers = in_batches(engine.router(configuration), images, size)
        np.testing.assert_array_equal(answers.exit_index_B, exit_B)
    with pytest.raises(UserError, match="additive heads need every exit before one that is used"):
        engine.router(Configuration(((-1, 1.0), *((0, 0.5),) * (len(engine.model.positions) - 1))))


def test_tiles_of_a_batch_give_the_same_answers() -> None:
    whole, heads, _ = build("ResNet")
    images = images_for(whole)
    confidence_PHB = CONFIDENCES["max_probability"].function(all_exits(whole, heads, images)[0]).numpy()
    configuration = middle_thresholds(confidence_PHB, [0] * len(whole.model.positions))
    expected = whole.router(configuration).classify(images)
    router = build("ResNet", tile=4)[0].router(configuration)
    sizes: list[int] = []
    hook = whole.model.backbone.model.conv1.register_forward_hook(lambda m, given, out: sizes.append(len(out)))
    for tiled in (router.classify(images), join(list(stream(router, images.split(11), 16)))):
        np.testing.assert_array_equal(tiled.exit_index_B, expected.exit_index_B)
        np.testing.assert_allclose(tiled.logits_BK, expected.logits_BK, atol=1e-5)
    hook.remove()
    assert max(sizes) == 4


def test_plain_backbone_runs_in_the_tiles_of_a_router() -> None:
    engine = build("ResNet", tile=4)[0]
    images = images_for(engine, 11)
    parts = engine.plain(images)
    assert max(map(len, parts)) <= 4
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts), engine.model.backbone(images))


def test_tile_holds_the_largest_activation_below_32_mib() -> None:
    engine, _, _ = build("ResNet")
    sizes = []
    hooks = [
        module.register_forward_hook(lambda m, i, out: sizes.append(out.nbytes))
        for module in engine.model.backbone.model.modules()
    ]
    engine.model.backbone(images_for(engine, 1))
    for hook in hooks:
        hook.remove()
    tile = largest_tile(engine.model)
    assert tile * max(sizes) < 32 << 20 < (tile + 2) * max(sizes)


def test_samples_near_a_threshold_are_marked() -> None:
    engine, heads, _ = build("ResNet")
    images = images_for(engine)
    logits_PHBK, _ = all_exits(engine, heads, images)
    confidence_B = CONFIDENCES["max_probability"].function(logits_PHBK[1, 0]).numpy()
    exits = [(-1, 1.0)] * len(engine.model.positions)
    exits[1] = (0, float(confidence_B[7]))
    near = np.abs(confidence_B - confidence_B[7]) <= NEAR
    for size in (1, 23):
        answers = in_batches(engine.router(Configuration(tuple(exits))), images, size)
        np.testing.assert_array_equal(answers.near_B, near)


@pytest.mark.parametrize("head_types", [("linear",), ("mlp2x7",), TYPES])
@pytest.mark.parametrize("above", [-1e-3, -1e-7, 0.0, 1e-7, 5e-6, 1e-4, 1e-3, 0.3])
def test_one_image_leaves_as_a_batch_does_at_any_threshold(
    head_types: Sequence[str], above: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynexit.models.products._MANY_WEIGHTS", 1)
    engine, heads, _ = build("ViT", head_types)
    images = images_for(engine, 6)
    logits_PHBK, _ = all_exits(engine, heads, images)
    confidence_PHB = CONFIDENCES["max_probability"].function(logits_PHBK).numpy()
    last = len(head_types) - 1
    for b in range(len(images)):
        thresholds = [(last, float(confidence_P)) for confidence_P in confidence_PHB[:, last, b] + np.float32(above)]
        router = engine.router(Configuration(tuple(thresholds)), tolerance=2e-6)
        one, batch = router.classify(images[b : b + 1]), router.classify(images[[b, b]])
        if abs(above) > 1e-6:
            assert one.exit_index_B[0] == batch.exit_index_B[0] == (len(thresholds) if above > 0 else 0)
        assert one.near_B[0] == batch.near_B[0] == (abs(above) < 2e-6)
        if one.exit_index_B[0] == batch.exit_index_B[0]:
            np.testing.assert_allclose(one.logits_BK[0], batch.logits_BK[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("many", [1, 1 << 15])
def test_one_image_reads_float32_weights_only_where_they_decide(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynexit.models.products._MANY_WEIGHTS", many)
    engine, heads, _ = build("ViT", ("linear",))
    image = images_for(engine, 1)
    logits_PHBK, _ = all_exits(engine, heads, image)
    confidence_P = CONFIDENCES["max_probability"].function(logits_PHBK)[:, 0, 0].tolist()
    calls: list[PlainHead] = []
    last_layer = PlainHead.last_layer
    monkeypatch.setattr(PlainHead, "last_layer", lambda head, x: calls.append(head) or last_layer(head, x))
    far = [(0, confidence + 0.01) for confidence in confidence_P]
    for exits, computed in ((far, []), ([*far[:-1], (0, confidence_P[-1] - 0.01)], [len(far) - 1])):
        calls.clear()
        engine.router(Configuration(tuple(exits))).classify(image)
        assert calls == [engine.head(p, 0) for p in (computed if many == 1 else range(len(far)))]
    for router in (engine.router(Configuration(tuple(far)), "entropy"), engine.router(None)):
        calls.clear()
        router.classify(image)
        assert calls[0] is engine.head(0, 0)


def test_refuses_a_configuration_of_another_model() -> None:
    engine, _, _ = build("ResNet")
    num_positions = len(engine.model.positions)
    with pytest.raises(UserError, match=f"the configuration has 2 positions and the model {num_positions}"):
        engine.router(Configuration(((0, 0.5),) * 2))
    with pytest.raises(UserError, match=r"uses head type 2, and the model has 2 \(linear, mlp2x7\)"):
        engine.router(Configuration(((2, 0.5),) * num_positions))
    with pytest.raises(UserError, match="confidence is 'sure', allowed are max_probability"):
        engine.router(Configuration(((0, 0.5),) * num_positions), "sure")
