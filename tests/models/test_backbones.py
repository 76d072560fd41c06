"""Every family, cut into blocks, is still the model it was."""

import copy

import pytest
import torch
from torch import Tensor

from dynexit.errors import Failure, UserError
from dynexit.models.backbones import Backbone, build_backbone, select
from dynexit.models.families import State
from tests.models.tiny import TINY, build_tiny

DIGITS = {
    "layers": [2, 2, 2, 2],
    "channels": [16, 24, 32, 48],
    "stem_type": "deep",
    "stem_width": 6,
    "output_stride": 8,
}


def images(backbone: Backbone, num: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, *backbone.input_size, generator=generator)


def states(backbone: Backbone, x: Tensor) -> list[State]:
    """The state after the stem and after every block."""
    h = [backbone.stem(x)]
    for i in range(backbone.num_blocks):
        h.append(backbone.run_block(i, h[-1]))
    return h


def tensor(h: State) -> Tensor:
    return h[0] if isinstance(h, tuple) else h


@torch.no_grad()
@pytest.mark.parametrize("family", TINY)
def test_a_cut_model_gives_the_output_of_the_whole_to_the_last_bit(family: str) -> None:
    backbone = build_tiny(family)
    x = images(backbone)
    expected = backbone.model(x)
    assert not backbone.training
    assert not backbone.model.training
    assert expected.shape == (3, 5)
    assert torch.equal(backbone(x), expected)
    assert torch.equal(backbone.tail(states(backbone, x)[-1]), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", [f for f in TINY if not f.startswith("T2T")])
def test_states_between_blocks_are_timms_intermediates(family: str) -> None:
    backbone = build_tiny(family)
    model, x = backbone.model, images(backbone)
    h = [tensor(state) for state in states(backbone, x)]
    if hasattr(model, "num_prefix_tokens"):
        expected = model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
        assert len(expected) == backbone.num_blocks
        assert all(torch.equal(a[:, model.num_prefix_tokens :], b) for a, b in zip(h[1:], expected, strict=True))
        return
    expected = model.forward_intermediates(x, intermediates_only=True)
    if family.startswith("Swin"):
        h = [state.permute(0, 3, 1, 2) for state in h]
    found = [[i for i, state in enumerate(h) if state.shape == y.shape and torch.equal(state, y)] for y in expected]
    # timm's first one may lie inside the stem, before its pooling
    assert all(len(where) == 1 for where in found[1:]), found
    assert [where[0] for where in found[1:]] == sorted({where[0] for where in found[1:]})
    assert found[-1] == [backbone.num_blocks]


@torch.no_grad()
@pytest.mark.parametrize("family", TINY)
def test_features_are_what_an_exit_reads(family: str) -> None:
    backbone = build_tiny(family)
    model = backbone.model
    h = states(backbone, images(backbone))[1:]
    assert len(backbone.feature_dims) == backbone.num_blocks == len(h)
    for i, state in enumerate(h):
        feature = backbone.feature(i, state)
        assert feature.shape == (3, backbone.feature_dims[i])
        tokens = tensor(state)
        if family.startswith("T2T"):
            expected = model.norm(tokens)[:, 0]
        elif hasattr(model, "num_prefix_tokens"):
            prefix = model.num_prefix_tokens
            normed = model.norm(tokens)
            expected = model.fc_norm(normed[:, 0] if model.global_pool == "token" else normed[:, prefix:].mean(1))
        elif family.startswith("Swin"):
            expected = tokens.flatten(1, 2).mean(1)
        else:
            expected = tokens.flatten(2).mean(2)
        torch.testing.assert_close(feature, expected)


@torch.no_grad()
@pytest.mark.parametrize("family", TINY)
def test_a_batch_may_shrink_between_blocks(family: str) -> None:
    backbone = build_tiny(family)
    x = images(backbone, 4)
    expected = backbone.model(x)
    h = backbone.stem(x)
    kept = torch.arange(4)
    for i in range(backbone.num_blocks):
        h = backbone.run_block(i, h)
        if i == 0:
            h, kept = select(h, torch.tensor([3, 1, 0])), kept[[3, 1, 0]]
        if i == 1:
            h, kept = select(h, torch.tensor([True, False, True])), kept[[0, 2]]
    assert kept.tolist() == [3, 0]
    torch.testing.assert_close(backbone.tail(h), expected[kept], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", TINY)
def test_a_copy_runs_its_own_modules(family: str) -> None:
    backbone = build_tiny(family)
    x = images(backbone)
    before = backbone(x)
    copied = copy.deepcopy(backbone)
    for parameter in copied.parameters():
        parameter.zero_()
    assert not copied(x).any()
    assert torch.equal(backbone(x), before)


def test_the_digits_backbone_has_exits_spread_over_its_depth() -> None:
    backbone = build_backbone("resnet18", arguments=DIGITS, num_classes=10, image_size=32, in_channels=1)
    assert backbone.num_blocks == 8
    assert backbone.feature_dims == (16, 16, 24, 24, 32, 32, 48, 48)
    assert backbone.input_size == (1, 32, 32)


def test_image_sizes_that_are_not_square() -> None:
    for name, arguments in [TINY["T2T-ViT"][:2], TINY["ViT"][:2], TINY["Swin"][:2], TINY["ResNet"][:2]]:
        backbone = build_backbone(name, arguments=arguments, num_classes=3, image_size=(32, 64))
        assert backbone.input_size == (3, 32, 64)
        assert backbone(torch.zeros(2, 3, 32, 64)).shape == (2, 3)


def test_the_models_own_image_size_is_the_default() -> None:
    assert build_backbone("test_vit", num_classes=2).input_size == (3, 160, 160)
    assert build_backbone("t2t_vit_7", num_classes=2).input_size == (3, 224, 224)
    assert build_backbone("test_vit", arguments={"img_size": 48}, num_classes=2).input_size == (3, 48, 48)


def test_an_unknown_backbone_names_the_families_and_the_nearest_name() -> None:
    with pytest.raises(UserError) as error:
        build_backbone("resnet51", num_classes=2)
    assert str(error.value) == (
        "unknown backbone 'resnet51' (nearest name: 'resnet50'): use a model of one of the families T2T-ViT, "
        "ViT (DINOv2, CLIP, SigLIP, ...), DeiT, EVA (DINOv3, RoPE-ViT, ...), Swin, SwinV2, ConvNeXt, ConvNeXtV2, "
        "ResNet, ResNeXt, RegNet, DaViT, MaxViT, MobileNetV3, EfficientNet, EfficientViT, EfficientFormerV2"
    )
    with pytest.raises(UserError, match=r"nearest name: 't2t_vit_14'"):
        build_backbone("t2t_vit14", num_classes=2)
    with pytest.raises(UserError, match=r"unknown backbone 'resnet50.none_such': Invalid pretrained tag \(none_such\)"):
        build_backbone("resnet50.none_such", num_classes=2)
    with pytest.raises(UserError, match=r"unknown backbone 'vgg16'"):  # timm knows it, we do not cut it
        build_backbone("vgg16", num_classes=2)


def test_arguments_that_the_model_does_not_take() -> None:
    with pytest.raises(UserError, match=r"backbone 'test_vit' cannot be built with .*'dephts'"):
        build_backbone("test_vit", arguments={"dephts": 3}, num_classes=2)
    with pytest.raises(UserError, match=r"backbone 't2t_vit_7' cannot be built with .*'dephts'"):
        build_backbone("t2t_vit_7", arguments={"dephts": 3}, num_classes=2)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18", {"layers": [1, 1]}, r"with \{'layers': \[1, 1\]\} takes no images of 32x32 pixels \(.*layer3"),
        ("resnet18", {"block": "x"}, "cannot be built with"),
        ("resnet18", {"global_pool": ""}, "takes no images of 32x32 pixels"),
        ("convnext_atto", {"depths": [1, 1]}, "cannot be built with"),
        ("test_vit", {"patch_size": 0}, "cannot be built with"),
        (
            "resnet18",
            {"checkpoint_path": "x.pth"},
            r"arguments.checkpoint_path is not for the study to set: weigh",
        ),
        ("t2t_vit_7", {"num_classes": 0}, r"arguments.num_classes is not for the study to set: weights come from "),
    ],
)
def test_arguments_that_make_no_model(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_backbone(name, arguments=arguments, num_classes=2, image_size=32)


def test_an_image_size_that_the_model_does_not_take() -> None:
    with pytest.raises(UserError, match=r"backbone 'test_maxvit' (takes no images of 40x40 pixels|cannot be built)"):
        build_backbone("test_maxvit", num_classes=2, image_size=40)


def test_pretrained_weights_that_do_not_exist_or_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'t2t_vit_7' has no weights on timm's hub: give a local file"):
        build_backbone("t2t_vit_7", num_classes=2, weights="pretrained")

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("timm.create_model", unreachable)
    with pytest.raises(Failure, match=r"weights of backbone 'resnet18' could not be fetched \(no route\): try again"):
        build_backbone("resnet18", num_classes=2, weights="pretrained")
