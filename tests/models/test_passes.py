"""A frozen backbone compiled or channels last: the plain one's answers but for rounding."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

from dynexit.errors import Failure, UserError
from dynexit.models.multi_exit import MultiExit
from dynexit.models.passes import quicken
from dynexit.models.precision import set_precision
from dynexit.study.grid import expand
from dynexit.study.schema import BackboneSettings, Config
from tests.models.tiny import TINY, build_tiny
from tests.pretend_cuda import CUDA, pretend_cuda

CPU = torch.device("cpu")


def model_of(family: str) -> MultiExit:
    backbone = copy.deepcopy(build_tiny(family))
    return MultiExit(backbone, range(backbone.num_blocks - 1))


def images_of(model: MultiExit, count: int) -> Tensor:
    return torch.randn(count, *model.backbone.input_size, generator=torch.Generator().manual_seed(count))


def largest_difference(a: MultiExit, b: MultiExit, images: Tensor) -> float:
    """Of any feature or logit, relative to the largest."""
    (features, final_BK), (others, other_BK) = a.features(images), b.features(images)
    pairs = zip([*features, final_BK], [*others, other_BK], strict=True)
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs)


@pytest.mark.parametrize("family", TINY)
def test_channels_last_changes_rounding_alone(family: str) -> None:
    model, plain = model_of(family), model_of(family)
    quicken(model, BackboneSettings(channels_last=True), CPU, 4)
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight[0, 0].numel() > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    assert largest_difference(model, plain, images_of(model, 5)) <= 1e-5


@pytest.mark.slow  # compiling takes half a minute beside other work
def test_compiled_passes_change_rounding_alone() -> None:
    model, plain = model_of("ResNet"), model_of("ResNet")
    quicken(model, BackboneSettings(compile=True, channels_last=True), CPU, 20)
    for count in (20, 17):
        assert 0 < largest_difference(model, plain, images_of(model, count)) <= 1e-5
    features, final_BK = model.features(images_of(model, 0))
    assert [len(part) for part in (*features, final_BK)] == [0] * (len(features) + 1)


def test_auto_is_on_for_half_precision_on_gpus_alone() -> None:
    found = {}
    with pretend_cuda():
        for device, precision in ((CPU, "bf16"), (CUDA, "float32"), (CUDA, "tf32"), (CUDA, "bf16")):
            model = model_of("ResNet").to(device)
            set_precision(model.backbone, precision)
            quicken(model, BackboneSettings(), device, 2)
            found[device.type, precision] = model.memory_format == torch.channels_last
    assert found == {("cpu", "bf16"): False, ("cuda", "float32"): False, ("cuda", "tf32"): True, ("cuda", "bf16"): True}


def test_a_compiler_that_fails_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*graph: object) -> None:
        raise OSError("c++: no such file\nand a hundred lines more")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    with pytest.raises(Failure) as caught:
        quicken(model_of("ResNet"), BackboneSettings(compile=True), CPU, 2)
    assert str(caught.value).startswith("backbone.compile = true: torch.compile failed (")
    assert str(caught.value).endswith("or set backbone.compile=false")


def test_a_module_that_looks_at_strides_is_one_message() -> None:
    model = model_of("ResNet")
    model.backbone.cut.blocks[0] = lambda h: h.view(len(h), -1).view(h.shape)  # type: ignore[index]
    with pytest.raises(UserError) as caught:
        quicken(model, BackboneSettings(channels_last=True), CPU, 2)
    assert str(caught.value).startswith("backbone.channels_last = true: resnet18 takes no maps with their chan")
    assert str(caught.value).endswith("set backbone.channels_last=false")


def test_passes_are_no_part_of_an_id() -> None:
    (plain,), (quick,) = (
        expand(Config(backbone=settings), {})
        for settings in (BackboneSettings(), BackboneSettings(compile=True, channels_last=True))
    )
    assert plain.ids == quick.ids
