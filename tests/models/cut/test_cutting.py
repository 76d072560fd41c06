"""Any module, cut along its graph, is still the module that it was."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynexit
from dynexit.core.tradeoff import Configuration
from dynexit.deploy.engine import Engine, largest_tile
from dynexit.deploy.optimize import optimized_backbone
from dynexit.errors import UserError
from dynexit.models.backbones import select
from dynexit.models.cut.backbone import GraphCut
from dynexit.models.heads import StackedHeads
from dynexit.models.macs import backbone_macs
from dynexit.models.multi_exit import MultiExit
from dynexit.models.readers import Reading
from tests.models.cut.own import MODELS, NUM_CLASSES, Residual, built, cut, images, logits

AUTO = {
    "Sequential": ("3", "5"),
    "Residual": ("blocks.0", "blocks.1"),
    "tied weights": ("blocks.0", "blocks.1"),
    "ResNet": ("layer1.0", "layer2.0", "layer3.0"),
    "DenseNet": ("features.denseblock1",),
    "MobileNetV3": ("features.1", "features.2", "features.3"),
    "ViT": ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"),
    "Swin": ("features.1.0", "features.3.0"),
    "Hugging Face ViT": ("vit.layers.0", "vit.layers.1"),
    "Hugging Face ConvNeXt": ("convnext.encoder.stages.0.layers.0", "convnext.encoder.stages.1.layers.0"),
}


@pytest.mark.parametrize("name", MODELS)
def test_cut_modules_give_their_own_logits(name: str) -> None:
    backbone, x = cut(name), images()
    assert backbone.places == AUTO[name]
    assert backbone.num_blocks == len(AUTO[name]) + 1
    for num in (1, 2, 4):
        torch.testing.assert_close(backbone(x[:num]), logits(built(name), x[:num]), rtol=1e-5, atol=1e-5)
    h = select(backbone.stem(x), torch.tensor([0, 2, 3]))
    for i in range(backbone.num_blocks):
        h = backbone.run_block(i, h)
        assert backbone.feature(i, h).shape == (3, backbone.feature_dims[i])
    torch.testing.assert_close(backbone.tail(h), logits(built(name), x[[0, 2, 3]]), rtol=1e-5, atol=1e-5)


def test_parts_need_no_strides_of_the_device_they_were_cut_on() -> None:
    how = cut("ViT").how
    assert isinstance(how, GraphCut)
    targets = [node.target for graph in how.parts.graphs for node in graph.nodes]
    assert torch.ops.aten.view.default not in targets
    assert torch.ops.aten.reshape.default in targets


@pytest.mark.parametrize("name", MODELS)
def test_macs_are_those_of_torchs_counter(name: str) -> None:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # of attention, which the counter does not know
    try:
        with FlopCounterMode(display=False) as counter:
            logits(built(name), images(1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    path, full = backbone_macs(cut(name))
    assert full == counter.get_total_flops() / 2
    assert path == sorted(path)
    assert 0 < path[0] < full


@pytest.mark.parametrize("name", MODELS)
def test_early_exits_give_the_answers_of_all_exits(name: str) -> None:
    model = MultiExit(copy.deepcopy(cut(name)), range(cut(name).num_blocks - 1))
    heads = StackedHeads(model.feature_dims, model.positions, ("linear",), NUM_CLASSES, [0]).requires_grad_(False)
    engine, x = Engine(model, ("linear",), heads), images(8)
    all_heads, own = engine.all_logits(x)
    confidence = all_heads[0, 0].softmax(-1).amax(-1)
    threshold = float(confidence.sort().values[3:5].mean())
    exits = ((0, threshold), *((-1, 1.0),) * (len(model.positions) - 1))
    answers = engine.router(Configuration(exits), "max_probability").classify(x)
    leaves = confidence > threshold
    assert 0 < leaves.sum() < 8
    assert (torch.from_numpy(answers.exit_index_B == 0) == leaves).all()
    expected = torch.where(leaves, all_heads[0, 0].argmax(-1), own.argmax(-1))
    assert torch.equal(torch.from_numpy(answers.prediction_B), expected)
    assert largest_tile(model) >= 1


def test_trained_weights_are_those_of_the_stages() -> None:
    model = Residual().eval()
    backbone, x = dynexit.cut(model, images(1)), images()
    before = backbone(x)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    model.eval()
    assert not torch.allclose(backbone(x), before)
    torch.testing.assert_close(backbone(x), logits(model, x), rtol=1e-5, atol=1e-5)
    assert set(backbone.layers().values()) == {0, 1, 2, 3, 4}
    assert backbone.layers()["blocks.2.conv.weight"] == 3


def test_a_copy_has_its_own_weights() -> None:
    backbone, x = cut("Residual"), images()
    before = backbone(x)
    copied = copy.deepcopy(backbone)
    for parameter in copied.parameters():
        parameter.zero_()
    assert not copied(x).any()
    assert torch.equal(backbone(x), before)
    torch.testing.assert_close(optimized_backbone(backbone, "float32", torch.device("cpu"))(x), before)


def test_states_stay_when_the_next_block_runs() -> None:
    backbone = dynexit.cut(built("Sequential"), images(1), at=["1", "4"])  # an activation in place follows
    h = backbone.run_block(0, backbone.stem(images()))
    before = h.clone()
    backbone.run_block(1, h)
    assert torch.equal(h, before)


@pytest.mark.parametrize("name", ["ViT", "Hugging Face ViT"])
def test_class_tokens_are_found_and_read(name: str) -> None:
    backbone, x = cut(name), images()
    assert backbone.has_class_token
    h = backbone.run_block(0, backbone.stem(x))
    normed = nn.functional.layer_norm(h, h.shape[-1:])
    torch.testing.assert_close(backbone.feature(0, h), normed[:, 0])
    torch.testing.assert_close(backbone.pooled_feature(0, h), normed[:, 1:].mean(1))
    model = MultiExit(copy.deepcopy(backbone), [0], reading=Reading("tokens_average_std"))
    assert model.features(x)[0][0].shape == (4, 48)


def test_maps_are_read_where_their_channels_are() -> None:
    swin = cut("Swin")
    h = swin.run_block(0, swin.stem(images()))
    assert h.shape == (4, 16, 16, 8)
    torch.testing.assert_close(swin.feature(0, h), h.mean((1, 2)))
    other = dynexit.cut(built("Sequential"), images(1), at=["3"], feature="channels_last")
    h = other.run_block(0, other.stem(images()))
    torch.testing.assert_close(other.feature(0, h), h.mean((1, 2)))


def test_places_are_named_by_modules() -> None:
    backbone = dynexit.cut(built("ResNet"), images(1), at=["maxpool", "layer1", "layer4"])
    assert backbone.places == ("maxpool", "layer1", "layer4")
    assert backbone.num_blocks == 4
    assert backbone.feature_dims[:3] == (64, 64, 512)
    torch.testing.assert_close(backbone(images()), logits(built("ResNet"), images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (
            ["features.denseblock1.denselayer1"],
            "features.denseblock1.denselayer1 is no place for an exit: 2 tensors cross it (max_pool2d of "
            "features.pool0, 8x8x8, conv2d_2 of features.denseblock1.denselayer1.conv2, 4x8x8); legal places near it "
            "are features.relu0, features.pool0, features.denseblock1",
        ),
        (
            ["features.denseblok1"],
            "DenseNet runs no module 'features.denseblok1' on the images; legal places near it are "
            "features.denseblock1, features.denseblock2, features.transition1",
        ),
        (
            ["features.denseblock1", "features.pool0"],
            "DenseNet reaches features.pool0 before features.denseblock1, or at once; give places in rising order",
        ),
    ],
)
def test_illegal_places_are_refused(at: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        dynexit.cut(built("DenseNet"), images(1), at=at)
    assert str(error.value) == message
