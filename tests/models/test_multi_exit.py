"""All exits at once and one stretch after another."""

import copy

import pytest
import torch
from torch import nn

from dynexit.errors import UserError
from dynexit.models.backbones import build_backbone
from dynexit.models.heads import StackedHeads
from dynexit.models.multi_exit import MultiExit, select
from tests.models.test_backbones import images
from tests.models.tiny import TINY, build_tiny


@pytest.mark.parametrize("family", TINY)
def test_features_of_some_positions_and_the_backbones_logits(family: str) -> None:
    backbone = build_tiny(family)
    positions = [0, backbone.num_blocks - 2] if backbone.num_blocks > 2 else [0]
    model, x = MultiExit(backbone, positions), images(backbone)
    features, logits = model.features(x)
    assert [f.shape for f in features] == [(3, d) for d in model.feature_dims]
    with torch.no_grad():
        assert torch.equal(logits, backbone.model(x))
        h = backbone.stem(x)
        for i in range(backbone.num_blocks):
            h = backbone.run_block(i, h)
            if i in positions:
                assert torch.equal(features[positions.index(i)], backbone.feature(i, h))


def test_stretches_give_what_one_pass_gives_on_the_samples_that_stay() -> None:
    backbone = build_tiny("EVA mixed")
    model, x = MultiExit(backbone, [0, 1]), images(backbone, 5)
    features, logits = model.features(x)
    h = model.advance(model.start(x), -1, 0)
    assert torch.equal(model.feature(0, h), features[0])
    stay = torch.tensor([True, False, True, True, False])
    h = model.advance(select(h, stay), 0, 1)
    torch.testing.assert_close(model.feature(1, h), features[1][stay])
    torch.testing.assert_close(model.tail(h, 1), logits[stay])
    skipped = model.advance(model.start(x), -1, 1)
    assert torch.equal(model.feature(1, skipped), features[1])
    assert torch.equal(model.tail(model.start(x), -1), logits)


def test_every_block_runs_once_and_nothing_after_the_last_asked_for() -> None:
    backbone = build_backbone(*TINY["ResNet"][:1], arguments=TINY["ResNet"][1], num_classes=5, image_size=32)
    calls: list[str] = []
    for name, module in backbone.model.named_modules():
        if name.count(".") == 1 and name.startswith("layer"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model, x = MultiExit(backbone, [1, 4]), images(backbone)
    names = [f"layer{a}.{b}" for a in range(1, 5) for b in range(2)]
    model.features(x)
    assert calls == names
    calls.clear()
    model.advance(model.start(x), -1, 1)
    assert calls == names[:5]


def test_the_backbone_is_frozen_whatever_mode_is_asked_for() -> None:
    backbone = build_backbone("resnet18", arguments=TINY["ResNet"][1], num_classes=5, image_size=32)
    assert all(p.requires_grad for p in backbone.parameters())
    model = MultiExit(backbone, [0, 3]).train()
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in backbone.modules())
    x = images(backbone)
    statistics = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    features, logits = model.features(x)
    assert all(torch.equal(value, statistics[name]) for name, value in backbone.model.state_dict().items())
    assert not logits.requires_grad
    # plain tensors: a head can be trained on them
    head = nn.Linear(model.feature_dims[0], 2)
    head(features[0]).sum().backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize("positions", [[], [-1, 2], [0, 7], [2, 1], [1, 1]])
def test_positions_that_do_not_fit(positions: list[int]) -> None:
    backbone = build_tiny("ResNet")
    with pytest.raises(UserError) as error:
        MultiExit(backbone, positions)
    assert str(error.value) == (
        f"exit positions {positions} do not fit resnet18: give block indices in rising order from 0 to 6 (it has 8 "
        "blocks, and its own classifier sits after the last)"
    )


@torch.no_grad()
@pytest.mark.parametrize("family", ["T2T-ViT", "ViT", "DINOv2", "DeiT distilled", "EVA mixed", "ViT mean", "ResNet"])
def test_mlp_heads_read_pooled_features_and_linear_heads_the_class_token(family: str) -> None:
    backbone, mlp = build_tiny(family), "mlp2x7"
    x, model = images(backbone), backbone.model
    token = family not in ("ViT mean", "ResNet")
    assert backbone.has_class_token == token
    h = backbone.run_block(0, backbone.stem(x))
    tokens = h[0] if isinstance(h, tuple) else h
    expected = backbone.feature(0, h)
    if token:
        first = model.num_prefix_tokens if hasattr(model, "num_prefix_tokens") else 1
        expected = getattr(model, "fc_norm", nn.Identity())(model.norm(tokens)[:, first:].mean(1))
        assert not torch.allclose(expected, backbone.feature(0, h), atol=1e-2)
    torch.testing.assert_close(MultiExit(backbone, [0], [mlp]).features(x)[0][0], expected)

    types = ["linear", mlp]
    (both,), _ = MultiExit(backbone, [0], types).features(x)
    dims = backbone.feature_dims[:1]
    assert both.shape == ((3, 2, *dims) if token else (3, *dims))
    logits = StackedHeads(dims, [0], types, 5, [4, 9])([both])
    heads = StackedHeads(dims, [0], types, 5, [4, 9])
    torch.testing.assert_close(logits[0, 0], heads.plain("0.linear")(backbone.feature(0, h)))
    torch.testing.assert_close(logits[0, 1], heads.plain(f"0.{mlp}")(expected))


@torch.no_grad()
def test_what_no_head_reads_is_not_computed() -> None:
    backbone = copy.deepcopy(build_tiny("ViT"))
    seen: list[int] = []
    backbone.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].dim()))
    MultiExit(backbone, [0]).features(images(backbone))
    assert seen == [2, 3]  # the class token of the exit alone; all tokens once, for the backbone's own classifier
