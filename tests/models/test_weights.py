"""Weights from local files: every form in which people have them, and every way in which they do not fit."""

import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dynexit.errors import UserError
from dynexit.models.backbones import Backbone, build_backbone
from dynexit.models.weights import load_weights
from tests.models.cut.own import tied

T2T = {"embed_dim": 24, "depth": 2, "num_heads": 2, "token_dim": 8}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def t2t(weights: Path | None = None, num_classes: int = 7, image_size: int = 48) -> Backbone:
    path = None if weights is None else str(weights)
    return build_backbone("t2t_vit_7", arguments=T2T, num_classes=num_classes, image_size=image_size, weights=path)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return t2t().model.state_dict()


def save(path: Path, content: object) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def same(model: torch.nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def renamed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


FORMS = ["bare", "state_dict", "state_dict_ema", "net", "module", "jei_dnn", "timm", "model_state_dict", "empty_ema"]
FORMS += ["two_containers", "weights", "lightning", "averaged", "torchvision_ema", "thop"]
FORMS += ["_orig_mod.module.", "module._orig_mod.", "model._orig_mod.", "backbone.", "module.model.backbone."]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("file", ["weights.pth.tar", "weights.pth"])
def test_the_forms_of_published_files(tmp_path: Path, state: dict[str, Tensor], form: str, file: str) -> None:
    wrong = {name: value + 1 for name, value in state.items()}
    module, averaged = renamed(state, "module."), {"n_averaged": torch.tensor(7)}
    counts = {f"{name}total_{what}": torch.zeros(1) for name in ("", "blocks.0.") for what in ("ops", "params")}
    exits = {"module.intermediate_heads.0.weight": torch.ones(1), "module.gates.0.linear.bias": torch.ones(1)}
    content = {
        "bare": state,
        "state_dict": {"epoch": 3, "state_dict": state},
        "state_dict_ema": {"state_dict": wrong, "state_dict_ema": state, "arch": "t2t"},
        "net": {"net": module, "acc": 94.9, "epoch": 59},
        "module": module,
        "jei_dnn": {"net": {**module, **exits}},
        "timm": {"epoch": 3, "arch": "t2t", "args": Namespace(lr=0.1, model="t2t"), "version": 2, "state_dict": state},
        "model_state_dict": {
            "model_state_dict": state,
            "optimizer_state_dict": {"state": wrong},
            "loss": torch.ones(()),
        },
        "empty_ema": {"state_dict": state, "state_dict_ema": {}},
        "two_containers": {"arch": "t2t", "model": {"state_dict": state}},
        "weights": {"weights": state, "meta": {"mean": torch.ones(3)}},
        "lightning": {"state_dict": renamed(state, "model."), "pytorch-lightning_version": "2.4", "loops": {}},
        "averaged": {**averaged, **module},
        "torchvision_ema": {"model": wrong, "model_ema": {**averaged, **module}, "args": Namespace()},
        "thop": {**state, **counts},
    }.get(form, renamed(state, form))
    assert same(t2t(save(tmp_path / file, content)).model, state)


def test_safetensors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    assert same(t2t(save(tmp_path / "weights.safetensors", state)).model, state)


def test_the_head_is_left_out_where_the_classes_differ(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = save(tmp_path / "weights.pth", state)
    torch.manual_seed(4)
    model = t2t(path, num_classes=3).model
    torch.manual_seed(4)
    fresh = t2t(num_classes=3).model.state_dict()
    assert same(model, {**state, "head.weight": fresh["head.weight"], "head.bias": fresh["head.bias"]})
    del state["head.weight"], state["head.bias"]  # a feature extractor
    loaded = t2t(save(tmp_path / "features.pth", state)).model.state_dict()
    assert torch.equal(loaded["norm.weight"], state["norm.weight"])


def test_positions_are_resized_to_another_image_size(tmp_path: Path, state: dict[str, Tensor]) -> None:
    model = t2t(save(tmp_path / "weights.pth", state), image_size=80).model
    assert model.pos_embed.shape == (1, 26, 24)
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert torch.equal(model.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("name", "arguments", "image_size", "other_size", "resized"),
    [
        ("deit_tiny_patch16_224", VIT, 48, 64, "pos_embed"),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2]},
            32,
            56,
            "layers.1.blocks.0.attn.relative_position_bias_table",
        ),
        ("resnet18", {"layers": [1, 1, 1, 1], "channels": [4, 6, 8, 10]}, 32, 64, None),
        ("mobilenetv3_small_050", {}, 32, 64, None),
        ("efficientformerv2_s0", {}, 64, 64, None),
    ],
)
def test_timm_models(
    tmp_path: Path, name: str, arguments: dict, image_size: int, other_size: int, resized: str | None
) -> None:
    state = build_backbone(name, arguments=arguments, num_classes=6, image_size=image_size).model.state_dict()
    path = str(save(tmp_path / "weights.safetensors", state))
    again = build_backbone(name, arguments=arguments, num_classes=6, image_size=image_size, weights=path)
    assert same(again.model, state)
    other = build_backbone(name, arguments=arguments, num_classes=4, image_size=other_size, weights=path).model
    loaded = other.state_dict()
    changed = {key for key in state if loaded[key].shape != state[key].shape}
    classifier = other.default_cfg["classifier"]
    of_classifier = {key for key in changed if key.startswith(classifier)}
    assert of_classifier
    if resized:
        assert resized in changed
        if name.startswith("swin"):  # the bias between a patch and itself is in the middle, whatever the window
            middle, own_middle = (s[resized][len(s[resized]) // 2] for s in (loaded, state))
            torch.testing.assert_close(middle, own_middle, rtol=1e-5, atol=1e-6)
    kept = [key for key in state if key not in changed and not key.startswith(classifier)]
    assert kept
    assert all(torch.equal(loaded[key], state[key]) for key in kept)


def test_old_files_without_batch_counts(tmp_path: Path) -> None:
    arguments = {"layers": [1, 1, 1, 1], "channels": [4, 6, 8, 10]}
    state = build_backbone("resnet18", arguments=arguments, num_classes=6).model.state_dict()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    path = str(save(tmp_path / "old.pth", old))
    assert same(build_backbone("resnet18", arguments=arguments, num_classes=6, weights=path).model, state)


def test_wrong_shapes_missing_and_unknown_weights_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    del state["norm.weight"], state["blocks.1.norm1.bias"], state["blocks.1.norm2.bias"], state["blocks.0.norm1.bias"]
    state["block.0.gamma"] = torch.ones(2)
    state["tokens_to_token.project.bias"] = torch.ones(25)
    path = save(tmp_path / "weights.pth", state)
    with pytest.raises(UserError) as error:
        t2t(path)
    assert str(error.value) == (
        f"weights file '{path}' is not of backbone 't2t_vit_7': 4 weights are missing (first: blocks.0.norm1.bias, "
        "blocks.1.norm1.bias, blocks.1.norm2.bias); 1 is unknown to it (first: block.0.gamma); 1 has another shape "
        "(first: tokens_to_token.project.bias (25,) instead of (24,)); give that model's own weights, or the name and "
        "arguments of the model that the file is of"
    )


def test_another_models_weights(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = save(tmp_path / "t2t.pth", state)
    for name in (
        "resnet18",
        "test_vit",
        "test_convnext",
        "davit_tiny",
        "swin_tiny_patch4_window7_224",
        "efficientvit_m0",
    ):
        with pytest.raises(UserError, match=rf"'{path}' is not of backbone '{name}': \d+ weights are missing"):
            build_backbone(name, num_classes=7, weights=str(path))


def test_a_classifier_of_other_classes_is_refused_where_none_is_trained(tmp_path: Path) -> None:
    arguments = {"layers": [1, 1, 1, 1], "channels": [4, 6, 8, 10]}
    state = build_backbone("resnet18", arguments=arguments, num_classes=6).model.state_dict()
    bare = {name: value for name, value in state.items() if not name.startswith("fc.")}
    for name, content, has in (("six.pth", state, "6 classes"), ("bare.pth", bare, "no classifier")):
        path = str(save(tmp_path / name, content))
        build_backbone("resnet18", arguments=arguments, num_classes=4, weights=path)
        with pytest.raises(UserError) as error:
            build_backbone("resnet18", arguments=arguments, num_classes=4, weights=path, classifier_is_trained=False)
        assert str(error.value) == (
            f"weights file '{path}' has {has} and the data set 4: set prepare.num_epochs to train a classifier, or "
            "give weights of these classes"
        )
    path = str(tmp_path / "six.pth")
    build_backbone("resnet18", arguments=arguments, num_classes=6, weights=path, classifier_is_trained=False)
    torch.save({name: value for name, value in state.items() if name != "fc.bias"}, path)  # half a classifier is none
    for classifier_is_trained in (False, True):
        with pytest.raises(UserError, match=r"not of backbone 'resnet18': 1 weight is missing \(first: fc.bias\)"):
            build_backbone(
                "resnet18",
                arguments=arguments,
                num_classes=6,
                weights=path,
                classifier_is_trained=classifier_is_trained,
            )
    with pytest.raises(UserError, match="'resnet18' has 1000 classes on timm's hub and the data set 4: set prepare"):
        build_backbone("resnet18", num_classes=4, weights="pretrained", classifier_is_trained=False)


class Trap:
    """An object whose unpickling would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path: Path, state: dict[str, Tensor]) -> None:
    trap = tmp_path / "trap"
    path = save(tmp_path / "weights.pth", {"state_dict": state, "args": Trap(trap)})
    with pytest.raises(UserError, match=rf"weights file '{path}' cannot be read as plain weights \("):
        t2t(path)
    path.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(UserError, match="cannot be read as plain weights"):
        t2t(path)
    assert not trap.exists()


def test_tensors_that_are_no_weights(tmp_path: Path, state: dict[str, Tensor]) -> None:
    norm, not_finite = state["norm.weight"], state["norm.weight"].clone()
    not_finite[3] = float("nan")
    for name, value, message in (
        ("norm.weight", norm.to(torch.complex64), "norm.weight is complex; give a file of whole, plain weights"),
        ("norm.weight", norm.to_sparse(), "norm.weight is not dense; give a file of whole"),
        ("norm.weight", not_finite, "norm.weight holds values that are not finite; give"),
        (
            "norm.weight",
            norm.long(),
            r"1 is of another type \(first: norm.weight of torch.int64 instead of",
        ),
        ("pos_embed", torch.ones(5), r"1 has another shape \(first: pos_embed \(5,\) instead of"),
        ("pos_embed", torch.ones(()), r"1 has another shape \(first: pos_embed \(\) instead of"),
        ("pos_embed", torch.ones(1, 0, 24), r"1 has another shape \(first: pos_embed \(1, 0, 24\) instead of"),
    ):
        path = save(tmp_path / "odd.pth", {**state, name: value})
        with pytest.raises(UserError, match=message):
            t2t(path)
    path = save(tmp_path / "odd.pth", {**state, "head.weight": torch.ones(())})  # as one of other classes: left out
    assert t2t(path).model.head.weight.shape == (7, 24)
    (tmp_path / "cut.pth").write_bytes(save(tmp_path / "whole.pth", state).read_bytes()[:3000])
    with pytest.raises(UserError, match=r"plain weights \([A-Za-z][^0-9]+\): give"):
        t2t(tmp_path / "cut.pth")


def test_files_that_are_no_weights(tmp_path: Path, state: dict[str, Tensor]) -> None:
    missing = tmp_path / "none.pth"
    with pytest.raises(UserError, match=f"weights file '{missing}' does not exist: give the path of a .safetensors"):
        t2t(missing)
    for name, content in (
        ("empty.pth", b""),
        ("text.pth", b"hello there"),
        ("cut.pth", save(tmp_path / "whole.pth", state).read_bytes()[:5000]),
        ("empty.safetensors", b""),
        ("text.safetensors", b"hello world, this is text"),
        ("cut.safetensors", save(tmp_path / "whole.safetensors", state).read_bytes()[:5000]),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"weights file '{path}' cannot be read as plain weights \(.+\): give"):
            t2t(path)
    (tmp_path / "text.pth").write_bytes(b"not weights at all")
    for path, sentence in (
        (tmp_path, "is no file: give the path of a .safetensors or .pth file, or 'pretrained'"),
        (
            tmp_path / "text.pth",
            "cannot be read as plain weights (it holds something else than tensors, or is no checkpoint): give a "
            "complete .safetensors file, or a .pth file that torch.load reads with weights_only=True",
        ),
    ):
        with pytest.raises(UserError) as error:
            t2t(path)
        assert str(error.value) == f"weights file '{path}' {sentence}"
    itself: dict[str, object] = {"epoch": 3}
    itself["model"] = itself
    advice = (
        "give a file with a state dict, bare or under 'state_dict_ema', 'model_ema', 'state_dict', 'model_state_dict', "
        "'model', 'net', 'weights'"
    )
    for content, holds in (
        ({"epoch": 3}, "no tensors"),
        ([1, 2], "no tensors"),
        (itself, "no tensors"),
        (torch.ones(3), "no state dict, but a Tensor"),
        ([torch.ones(3)], "tensors under '0', where no state dict is expected"),
        (
            {"epoch": 3, "ema": state, "students": [state]},
            "tensors under 'ema', 'students', where no state dict is expected",
        ),
        ({"model": {}, "teacher": {"backbone": state}}, "tensors under 'teacher', where no state dict is expected"),
    ):
        with pytest.raises(UserError) as error:
            t2t(save(tmp_path / "other.pth", content))
        assert str(error.value) == f"weights file '{tmp_path / 'other.pth'}' holds {holds}: {advice}"


def test_only_a_namespace_is_safe_and_others_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for content, name in (
        ({"state_dict": state, "args": Namespace(path=tmp_path)}, r"it holds a pathlib\.\w+"),
        ({"state_dict": state, "metric": np.float64(3)}, r"it holds a numpy\.\S+\.scalar"),
        (torch.nn.Linear(1, 1), r"it holds a torch\.nn\.modules\.linear\.Linear"),
    ):
        path = save(tmp_path / "foreign.pth", content)
        with pytest.raises(UserError, match=rf"cannot be read as plain weights \({name}\): give a complete"):
            t2t(path)
    assert Namespace not in torch.serialization.get_safe_globals()


def test_prefixes_are_kept_where_the_model_has_them(tmp_path: Path) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.ModuleDict({"fc": torch.nn.Linear(3, 2)})
            self.default_cfg = {"classifier": "backbone.fc"}

    source, filled = Wrapped(), Wrapped()
    load_weights(filled, save(tmp_path / "own.pth", renamed(source.state_dict(), "module.")), "wrapped")
    assert same(filled, source.state_dict())


def test_no_prefix_is_removed_that_some_names_lack(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = save(tmp_path / "mixed.pth", {**renamed(state, "model."), "criterion.weight": torch.ones(7)})
    with pytest.raises(UserError, match=r"are unknown to it \(first: model\.cls_token"):
        t2t(path)


def test_tied_weights_may_be_in_a_file_once(tmp_path: Path) -> None:
    source, filled = tied(), tied()
    once = {name: t for name, t in source.state_dict().items() if name != "blocks.2.conv.weight"}
    load_weights(filled, save(tmp_path / "w.pth", once), "tied")
    assert same(filled, source.state_dict())
