"""What cannot be cut is refused with the reason and a remedy; stages of one's own are the fallback."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynexit
from dynexit.errors import UserError
from tests.models.cut.own import Residual, images, logits


class Branching(nn.Module):
    """Decides by the images' values which way to go, which torch cannot export."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 12, 3, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.first(x) if x.isfinite().all() else x
        return self.head(self.second(x).mean((2, 3)))


class Around(nn.Module):
    """A model whose answer is changed."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.change = Residual(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.inner(x))


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def batch_statistics() -> nn.Module:
    model = Residual()
    model.blocks[1].norm = nn.BatchNorm2d(8, track_running_stats=False)
    return model.eval()


def always_dropping() -> nn.Module:
    model = Around(lambda y: nn.functional.dropout(y, 0.5, training=True))
    torch.manual_seed(0)
    return model.eval()


def refusal(model: nn.Module, example: Any = None, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        dynexit.cut(model, images(1) if example is None else example, **options)
    return str(error.value)


def test_a_module_that_torch_cannot_export() -> None:
    message = refusal(Branching().eval())
    assert re.fullmatch(
        r"Branching cannot be exported by torch \(Could not guard on data-dependent expression .{1,200}\); change it, "
        r"or give its parts: dynexit\.cut\(model, example, stages=\[stem, block1, \.\.\.\], tail=head\)",
        message,
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda y: (y, y), "a tuple of 2"),
        (lambda y: {"out": y, "aux": y}, "a dict of out, aux"),
        (lambda y: y.sum(), "a tensor ()"),
        (lambda y: y[:, :, None], "a tensor (3, 5, 1)"),
        (lambda y: None, "a NoneType"),
    ],
)
def test_answers_that_are_no_logits(change: Callable[[Tensor], Any], what: str) -> None:
    assert refusal(Around(change).eval()) == (
        f"Around returns {what} for 3 images; return their logits alone, a tensor (3, K), as in a module around it"
    )


def test_answers_that_change_between_calls() -> None:
    message = refusal(always_dropping())
    assert message.startswith("Around gives other logits when it is called again with the same images (by up to ")
    assert message.endswith("); remove what is random or counts calls, such as a dropout that is always on")


def test_batch_norms_in_train_mode() -> None:
    assert refusal(Residual().train()) == (
        "Residual has batch norms in train mode (first: blocks.0.norm), so that an image's logits depend on the others "
        "of its batch; call eval() on it first"
    )
    message = refusal(batch_statistics())
    assert message.startswith("Residual gives other logits for an image alone than in a batch (by up to ")
    assert message.endswith("), also in eval mode; let its norms keep running statistics (track_running_stats=True)")


def test_examples_of_another_size() -> None:
    assert refusal(Residual().eval(), torch.zeros(1, 4, 32, 32)) == (
        "Residual takes no images of 4x32x32 (Given groups=1, weight of size [8, 3, 3, 3], expected input[3, 4, 32, 32]"
        " to have 3 channels, but got 4 channels instead)"
    )
    assert refusal(Residual().eval(), torch.zeros(3, 32, 32)) == (
        "example is (3, 32, 32); give images as a tensor of floating point (B, C, H, W)"
    )
    backbone = dynexit.cut(Residual().eval(), images(1))
    with pytest.raises(UserError) as error:
        backbone(images(2, size=40))
    assert str(error.value) == (
        "Residual was cut for images of 3x32x32, and these are 3x40x40; give such images, or cut it again with an "
        "example of that size"
    )


def test_options_that_do_not_exist_or_fit() -> None:
    model = Residual().eval()
    assert refusal(model, feature="maps") == (
        "feature is 'maps', allowed are channels_first, channels_last, tokens, class_token; name one of them, or give "
        "None"
    )
    assert (
        refusal(model, at=["stem"], stages=[model.stem]) == "at is ['stem'] and stages are given; give one of the two"
    )


def test_a_module_without_a_legal_place() -> None:
    assert refusal(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))) == (
        "Sequential has no place where one tensor alone is alive, as the end of a block; give its parts: "
        "dynexit.cut(model, example, stages=[stem, block1, ...], tail=head)"
    )


def test_stages_of_ones_own_are_the_fallback() -> None:
    model = Branching().eval()
    tail, x = nn.Sequential(Pool(), model.head), images()
    backbone = dynexit.cut(model, images(1), stages=[model.stem, model.first, model.second], tail=tail)
    assert backbone.places == ("stage 1",)
    assert backbone.feature_dims == (8, 12)
    torch.testing.assert_close(backbone(x), logits(model, x))
    assert set(backbone.layers().values()) == {0, 1, 2, 3}
    before, copied = backbone(x), copy.deepcopy(backbone)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert not copied(x).any()
    assert torch.equal(backbone(x), before)


def test_stages_that_are_not_the_modules() -> None:
    model = Branching().eval()
    stages, tail = [model.stem, model.first, model.second], nn.Sequential(Pool(), model.head)
    remedy = "give stages that are its own forward one after another"
    message = refusal(model, stages=[*stages, nn.ReLU()], tail=tail)
    assert message.startswith("the stages of Branching give other logits than the module (by up to ")
    assert message.endswith(f"; {remedy}")
    assert refusal(model, stages=stages) == (
        f"the stages of Branching give (3, 12, 6, 6) instead of logits (3, 5); {remedy}"
    )
    assert refusal(model, stages=[*stages, nn.Conv2d(12, 12, 1)], tail=tail) == (
        "stages[3] has a weight of its own, weight; build it from sub-modules of Branching"
    )
    assert refusal(model, stages=[model.second, model.first, model.stem], tail=tail) == (
        "the stages of Branching cannot be run one after another (Given groups=1, weight of size [12, 8, 3, 3], "
        f"expected input[3, 3, 32, 32] to have 8 channels, but got 3 channels instead); {remedy}"
    )
    assert refusal(model, stages=stages[:2]) == (
        "stages: 2 of them; give a stem and at least two blocks, all of them modules (nn.Module)"
    )
    assert refusal(model, stages=[*stages, lambda h: h]) == (
        "stages: a function among them; give a stem and at least two blocks, all of them modules (nn.Module)"
    )
