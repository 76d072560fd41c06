"""A backbone in bfloat16 or TF32: images in, heads in float32, and one error where a device lacks it."""

import copy
from pathlib import Path

import pytest
import torch

from dynexit.errors import UserError
from dynexit.models.multi_exit import MultiExit
from dynexit.models.precision import check_precision, products_of, set_precision
from dynexit.study.grid import expand
from dynexit.study.schema import BackboneSettings, Config, TrainSettings
from dynexit.train.independent import IndependentTask
from tests.models.tiny import build_tiny
from tests.train.tiny import run, seed_members, tiny_pack

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["ResNet", "ViT", "Swin", "T2T-ViT", "DINOv3", "ConvNeXt"])
def test_bf16_features_are_near_float32s(family: str) -> None:
    backbone = copy.deepcopy(build_tiny(family))
    model = MultiExit(backbone, range(backbone.num_blocks - 1))
    images = torch.randn(5, *model.backbone.input_size, generator=torch.Generator().manual_seed(1))
    exact, exact_BK = model.features(images)
    set_precision(model.backbone, "bf16")
    found, found_BK = model.features(images)
    for near, feature in zip([*found, found_BK], [*exact, exact_BK], strict=True):
        assert near.dtype == torch.bfloat16
        assert 0 < (near.float() - feature).abs().max() <= 0.05 * (1 + feature.abs().max())


def test_heads_train_in_float32_on_a_bf16_backbone(tmp_path: Path) -> None:
    def train(precision: str) -> IndependentTask:
        pack = tiny_pack(seed_members([0]), TrainSettings(num_epochs=2, global_batch_size=18))
        set_precision(pack.model.backbone, precision)
        task = IndependentTask(pack)
        run(task, tmp_path / precision)
        return task

    exact, found = train("float32"), train("bf16")
    assert found.stopped == {}
    state, expected = found.member_state(0), exact.member_state(0)
    for name, value in state.items():
        assert value.dtype == torch.float32
        assert 0 < (value - expected[name]).abs().max() <= 0.05


def test_a_rank_without_images_runs_no_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MultiExit(build_tiny("ViT"), range(2), ("linear", "mlp2x7"))
    some, some_BK = model.features(torch.randn(3, *model.backbone.input_size))
    monkeypatch.setattr(model.backbone, "stem", lambda x: pytest.fail("ran the backbone"))
    none, none_BK = model.features(torch.empty(0, *model.backbone.input_size))
    for empty, full in zip([*none, none_BK], [*some, some_BK], strict=True):
        assert empty.shape == (0, *full.shape[1:])


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_tf32_is_on_only_within(precision: str) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with products_of(precision):
        within = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        assert within == (precision == "tf32",) * 2
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_a_device_that_lacks_a_precision_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision in ("float32", "bf16"):
        check_precision(precision, CPU)
    with pytest.raises(UserError) as caught:
        check_precision("tf32", CPU)
    assert str(caught.value) == ("backbone.precision = 'tf32': a cpu device does not compute it; set float32 or bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(UserError) as caught:
        check_precision("bf16", torch.device("cuda", 0))
    assert str(caught.value) == (
        "backbone.precision = 'bf16': Tesla V100 (compute capability 7.0, needed is 8.0) does not compute it; set "
        "float32"
    )


def test_only_another_precision_is_in_an_id() -> None:
    ids = {}
    for precision in ("float32", "tf32", "bf16"):
        (point,) = expand(Config(backbone=BackboneSettings(precision=precision)), {})
        ids[precision] = point.ids
    (default,) = expand(Config(), {})
    assert default.ids == ids["float32"]
    assert len({one["train"] for one in ids.values()}) == 3
