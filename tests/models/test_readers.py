# ruff: noqa: E501  the messages that a user reads, whole
"""Readers against naive pooling, their MACs against counting, concatenation, the stem, and what does not fit."""

import numpy as np
import pytest
import torch

from dynexit.core.cost import STEM
from dynexit.core.tradeoff import Configuration
from dynexit.deploy.engine import Engine
from dynexit.errors import UserError
from dynexit.models.heads import StackedHeads
from dynexit.models.macs import backbone_macs, exit_costs, head_macs
from dynexit.models.multi_exit import MultiExit
from dynexit.models.readers import Reading, measure_reads
from tests.models.test_backbones import images
from tests.models.tiny import TINY, build_tiny

OF_MAPS = ("average", "average_max_std", "grid2", "grid4")
MAPS = ("ResNet", "ConvNeXt", "MobileNetV3", "Swin", "SwinV2", "DaViT")
CHANNELS_LAST = ("Swin", "SwinV2")
WITH_TOKEN = ("T2T-ViT", "ViT", "DINOv2", "CLIP", "DeiT", "EVA mixed")


def cells(size: int, parts: int) -> list[range]:
    """The rows (or columns) of a map that each cell of a grid averages; neighbours share a row where it is divided."""
    return [range(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]


def naive(reader: str, x: np.ndarray) -> np.ndarray:
    """The reader on one map (C, H, W), value by value."""
    if reader.startswith("grid"):
        rows, columns = (cells(size, min(int(reader[4:]), size)) for size in x.shape[1:])
        return np.array([[[c[i][:, j].mean() for j in map(list, columns)] for i in map(list, rows)] for c in x]).ravel()
    values = [channel.ravel() for channel in x]
    means = [v.sum() / len(v) for v in values]
    if reader == "average":
        return np.array(means)
    largest = [max(v) for v in values]
    return np.array([*means, *largest, *((((v - m) ** 2).sum() / len(v)) ** 0.5 for v, m in zip(values, means))])  # noqa: B905


@pytest.mark.parametrize("reader", OF_MAPS)
@pytest.mark.parametrize("family", MAPS)
def test_a_map_is_read_as_by_naive_pooling(family: str, reader: str) -> None:
    backbone, x = build_tiny(family), images(build_tiny(family))
    positions = (STEM, *range(backbone.num_blocks - 1))
    features, _ = MultiExit(backbone, positions, reading=Reading(reader)).features(x)  # type: ignore[arg-type]
    h = backbone.stem(x)
    for position, feature in zip(positions, features, strict=True):
        h = backbone.run_block(position, h) if position >= 0 else h
        maps = h.movedim(-1, 1) if family in CHANNELS_LAST else h
        expected = np.stack([naive(reader, image.double().numpy()) for image in maps])
        np.testing.assert_allclose(feature.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*WITH_TOKEN, "ViT mean"])
def test_tokens_are_read_through_the_final_norm(family: str) -> None:
    backbone, x = build_tiny(family), images(build_tiny(family))
    model, h = backbone.model, backbone.stem(x)
    tokens = h[0] if isinstance(h, tuple) else h
    has_token = family in WITH_TOKEN
    num_prefix = 1 if family == "T2T-ViT" else model.num_prefix_tokens
    fc_norm = getattr(model, "fc_norm", torch.nn.Identity())
    normed = model.norm(tokens)
    token, mean = fc_norm(normed[:, 0]), fc_norm(normed[:, num_prefix:].mean(1))
    patches = fc_norm(normed[:, num_prefix:])
    std = (patches - patches.mean(1, keepdim=True)).square().mean(1).sqrt()
    expected = {"average": [mean], "tokens_average_std": [*([token] if has_token else []), mean, std]}
    expected |= {"token": [token]} if has_token else {}
    for reader, parts in expected.items():
        features, _ = MultiExit(backbone, (STEM, 0), reading=Reading(reader)).features(x)
        torch.testing.assert_close(features[0], torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "reader", "message"),
    [
        ("ResNet", "token", "exits.reader = token: resnet18 has maps between its blocks; use one of average, average_max_std, grid2, grid4, or null for the family's own"),
        ("Swin", "tokens_average_std", "exits.reader = tokens_average_std: swin_tiny_patch4_window7_224 has maps between its blocks; use one of average, average_max_std, grid2, grid4, or null for the family's own"),
        ("ViT", "grid4", "exits.reader = grid4: test_vit has tokens, with a class token, between its blocks; use one of token, average, tokens_average_std, or null for the family's own"),
        ("ViT mean", "token", "exits.reader = token: test_vit4 has tokens, without a class token, between its blocks; use one of average, tokens_average_std, or null for the family's own"),
    ],
)  # fmt: skip
def test_a_reader_that_does_not_fit_is_refused(family: str, reader: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        MultiExit(build_tiny(family), (0,), reading=Reading(reader))
    assert str(caught.value) == message
    with pytest.raises(UserError):
        exit_costs(build_tiny(family), [0], ["linear"], reading=Reading(reader))


@pytest.mark.parametrize("family", ["ResNet", "Swin", "ViT", "ViT mean", "EVA mixed"])
def test_macs_of_readers_count_the_values_whose_deviation_is_taken(family: str) -> None:
    backbone = build_tiny(family)
    positions, reader = (STEM, 0, 1), "average_max_std" if family in ("ResNet", "Swin") else "tokens_average_std"
    h, squares = backbone.stem(images(backbone, 1)), []
    for position in positions:
        h = backbone.run_block(position, h) if position >= 0 else h
        values = h[0] if isinstance(h, tuple) else h
        patches = values[:, getattr(backbone.model, "num_prefix_tokens", 0) :] if values.dim() == 3 else values
        squares.append(patches.numel())
    own = exit_costs(backbone, positions, ["linear", "mlp2x7"], reading=Reading(reader))
    widths, macs = measure_reads(backbone, positions, reader)
    assert macs == squares
    assert own.reader_macs == ()
    types = ("linear", "mlp2x7")
    assert own.head_macs == tuple(tuple(squares[p] + head_macs(name, widths[p], 5) for name in types) for p in range(3))
    joined = exit_costs(backbone, positions, ["linear"], reading=Reading(reader, concatenate=True))
    assert joined.reader_macs == tuple(squares)
    assert joined.head_macs == tuple((sum(widths[: p + 1]) * 5,) for p in range(3))
    per_block, full = backbone_macs(backbone)
    assert (joined.backbone_macs[1:], joined.full_macs) == (tuple(per_block[:2]), full)
    assert 0 < joined.backbone_macs[0] < per_block[0]
    free = exit_costs(backbone, positions, ["linear"], reading=Reading("average", concatenate=True))
    assert free.reader_macs == ()


@pytest.mark.parametrize("reader", [None, "average_max_std"])
def test_concatenated_features_are_those_of_all_exits_before(reader: str | None) -> None:
    backbone, x = build_tiny("ResNet"), images(build_tiny("ResNet"))
    positions = (STEM, 0, 2, 5)
    own, _ = MultiExit(backbone, positions, reading=Reading(reader)).features(x)
    model = MultiExit(backbone, positions, reading=Reading(reader, concatenate=True))
    joined, logits = model.features(x)
    for p, feature in enumerate(joined):
        assert torch.equal(feature, torch.cat(own[: p + 1], 1))
    assert model.feature_dims == tuple(feature.shape[1] for feature in joined)
    assert torch.equal(logits, backbone(x))


def test_concatenation_keeps_what_linear_and_mlp_heads_read_apart() -> None:
    backbone, x = build_tiny("ViT"), images(build_tiny("ViT"))
    model = MultiExit(backbone, (0, 1), ("linear", "mlp2x7"), Reading(concatenate=True))
    features, _ = model.features(x)
    h = backbone.run_block(0, backbone.stem(x))
    after = backbone.run_block(1, h)
    assert torch.equal(features[1][:, 0], torch.cat((backbone.feature(0, h), backbone.feature(1, after)), 1))
    pooled = torch.cat((backbone.pooled_feature(0, h), backbone.pooled_feature(1, after)), 1)
    assert torch.equal(features[1][:, 1], pooled)


@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize("family", ["ResNet", "Swin", "ViT"])
def test_the_engine_answers_as_all_exits_at_once(family: str, concatenate: bool) -> None:
    backbone, x = build_tiny(family), images(build_tiny(family), 24)
    reading = Reading("tokens_average_std" if family == "ViT" else "average_max_std", concatenate)
    model = MultiExit(backbone, (STEM, *range(backbone.num_blocks - 1)), reading=reading)
    heads = StackedHeads(model.feature_dims, model.positions, ["linear"], 5, [0])
    features, final_BK = model.features(x)
    with torch.no_grad():
        logits_PBK = heads(features)[0]
    confidence_PB = logits_PBK.softmax(-1).amax(-1)
    num_positions = len(model.positions)
    reads: list[int] = []
    reader_at = model.reader_at
    model.reader_at = lambda p: lambda h: (reads.append(p), reader_at(p)(h))[1]  # type: ignore[method-assign]
    for enabled in ({0, num_positions - 1}, {1}, set(range(num_positions)), set()):
        middles = [float(confidence_PB[p].quantile(0.8)) for p in range(num_positions)]
        exits = [(0, middles[p]) if p in enabled else (-1, 1.0) for p in range(num_positions)]
        router = Engine(model, ["linear"], heads, None, 1000).router(Configuration(tuple(exits)))
        reads.clear()
        answers = router.classify(x)
        last = max(enabled, default=-1)
        assert set(reads) == (set(range(last + 1)) if concatenate else enabled)
        exit_B = torch.full((24,), num_positions)
        prediction_B = final_BK.argmax(-1)
        for p in sorted(enabled, reverse=True):
            leaves_B = confidence_PB[p] > middles[p]
            exit_B[leaves_B], prediction_B[leaves_B] = p, logits_PBK[p].argmax(-1)[leaves_B]
        sure = torch.from_numpy(~answers.near_B)
        assert torch.equal(torch.from_numpy(answers.exit_index_B)[sure], exit_B[sure])
        assert torch.equal(torch.from_numpy(answers.prediction_B)[sure], prediction_B[sure])
        assert sure.sum() >= 20


def test_all_families_have_places_for_readers() -> None:
    for family in TINY:
        backbone = build_tiny(family)
        has_tokens = backbone.cut.places(backbone.stem(images(backbone, 1))).dim() == 3
        reader = "tokens_average_std" if has_tokens else "average_max_std"
        model = MultiExit(backbone, (STEM, 0), reading=Reading(reader, concatenate=True))
        features, _ = model.features(images(backbone))
        assert tuple(feature.shape[1] for feature in features) == model.feature_dims
