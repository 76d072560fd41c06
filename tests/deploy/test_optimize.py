"""An optimised model gives the same answers, within what its precision allows."""

import copy
from pathlib import Path

import pytest
import torch

import dynexit
from dynexit.deploy.optimize import QuickLinear, QuickMaxPool, fold_batch_norms, optimized_backbone, with_quick_pooling
from dynexit.errors import Failure, UserError
from tests.conftest import require
from tests.deploy.saved import make_images, save_random
from tests.models.tiny import TINY, build_tiny

FOLDED = {"ResNet": True, "EfficientNet": True, "RegNet": True, "MobileNetV3": True, "ViT": False, "ConvNeXt": False}


@pytest.mark.parametrize("family", FOLDED)
def test_folding_changes_no_answer(family: str, tmp_path: Path) -> None:
    save_random(tmp_path / "model", family)
    model = dynexit.load(tmp_path / "model", verify=False)
    before = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.backbone.modules())
    faster = model.optimize("cpu")
    after = sum(isinstance(module, torch.nn.BatchNorm2d) for module in faster.backbone.modules())
    assert (after == 0 < before) if FOLDED[family] else after == before == 0
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.backbone.modules()) == before
    images = make_images(model.input_size, 30)
    for point in model.points:
        slow, fast = model.use(point)(images), faster.use(point)(images)
        sure = ~fast.near
        assert sure.double().mean() > 0.8
        assert torch.equal(slow.exit_index[sure], fast.exit_index[sure])
        torch.testing.assert_close(slow.probabilities[sure], fast.probabilities[sure], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", TINY)
def test_every_family_folds_to_the_same_logits(family: str) -> None:
    backbone = copy.deepcopy(build_tiny(family))
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:  # not those of an identity
        norm.running_mean.normal_(generator=generator)  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    images = torch.randn(3, *backbone.input_size, generator=generator)
    with torch.no_grad():
        before = backbone(images)
        num_folded = fold_batch_norms(backbone)
        torch.testing.assert_close(copy.deepcopy(backbone)(images), before, rtol=1e-3, atol=1e-4)  # cut again
    # norms that follow no convolution, and in MaxViT one whose convolution a shortcut reads too
    assert len(norms) - num_folded == {"EfficientFormerV2": 1, "MaxViT": 4}.get(family, 0)


def test_bf16_stays_within_its_tolerance(tmp_path: Path) -> None:
    require(torch.cpu._is_avx512_bf16_supported(), "this CPU has no bf16")
    save_random(tmp_path / "model")
    model = dynexit.load(tmp_path / "model", verify=False)
    faster = model.optimize("cpu", precision="bf16")
    assert next(faster.backbone.parameters()).dtype == torch.bfloat16
    assert faster.tolerance > model.tolerance
    images = make_images(model.input_size, 60)
    for point in model.points:
        slow, fast = model.use(point)(images), faster.use(point)(images)
        differs = slow.exit_index != fast.exit_index
        assert not (differs & ~fast.near).any()
        assert fast.probabilities.dtype == torch.float32


def test_a_fold_that_changes_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(tmp_path / "model")
    model = dynexit.load(tmp_path / "model", verify=False)

    def wrong(backbone) -> None:  # type: ignore[no-untyped-def]
        fold_batch_norms(backbone)
        next(module for module in backbone.modules() if isinstance(module, torch.nn.Conv2d)).weight.data *= 1.5

    monkeypatch.setattr("dynexit.deploy.optimize.fold_batch_norms", wrong)
    with pytest.raises(Failure, match="on its probe the backbone gives logits that differ"):
        model.optimize("cpu")
    with pytest.raises(UserError, match="precision is 'int8', allowed are float32, bf16"):
        model.optimize("cpu", precision="int8")
    with pytest.raises(UserError, match="device = 'gpu' cannot be used"):
        model.optimize("gpu")


@pytest.mark.parametrize("shape", [(2, 3, 9, 11), (40, 12, 16, 16), (5, 64, 30, 31)])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_quick_pooling_gives_the_same_bits(shape: tuple[int, ...], ceil_mode: bool) -> None:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for kernel, stride, padding in ((3, 2, 1), (2, 2, 0), ((3, 2), (1, 2), (1, 0))):
        plain = torch.nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)
        quick = QuickMaxPool(kernel, stride, padding, ceil_mode=ceil_mode)
        for given in (maps, maps.to(memory_format=torch.channels_last), maps[:, :, 1:]):
            assert torch.equal(plain(given), quick(given))


def test_a_backbone_with_quick_pooling_is_another() -> None:
    backbone = build_tiny("ResNet")
    quick = with_quick_pooling(backbone)
    images = torch.randn(70, *backbone.input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), quick(images), rtol=0, atol=0)
    assert isinstance(quick.model.maxpool, QuickMaxPool)
    assert type(backbone.model.maxpool) is torch.nn.MaxPool2d


def test_linear_layers_become_quick() -> None:
    backbone = build_tiny("ViT")
    quick = optimized_backbone(backbone, "float32", torch.device("cpu"))
    kinds = {type(module) for module in quick.model.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {QuickLinear}
    assert not any(isinstance(module, QuickLinear) for module in backbone.model.modules())
    images = torch.randn(300, *backbone.input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), quick(images), rtol=1e-3, atol=1e-4)
