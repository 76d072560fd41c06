"""Fitting the backbone: rates by layer, accumulation, precision, what is frozen, and resuming bit for bit."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dynexit.errors import Failure, UserError
from dynexit.jobs.prepare import gap_remark
from dynexit.models.backbones import Backbone
from dynexit.study.schema import PrepareSettings
from dynexit.train.optimizers import parameter_groups
from dynexit.train.parallel import WholeModel
from dynexit.train.transfer import TransferTask
from tests.models.tiny import TINY, build_tiny
from tests.train.fitted import fitted, small_backbone
from tests.train.tiny import RANKS, KilledError, largest_difference, tiny_split


@pytest.mark.parametrize("family", TINY)
def test_every_weight_lies_in_a_layer_and_the_classifier_in_the_tail(family: str) -> None:
    backbone = build_tiny(family)
    layers = backbone.layers()
    assert list(layers) == [name for name, _ in backbone.model.named_parameters()]
    assert set(layers.values()) == set(range(backbone.num_blocks + 2))
    classifiers = backbone.model.default_cfg["classifier"]
    for classifier in [classifiers] if isinstance(classifiers, str) else classifiers:
        assert layers[f"{classifier}.weight"] == backbone.num_blocks + 1
    in_order = [name for name in layers if name.startswith("blocks.") and name.split(".")[1].isdigit()]
    if hasattr(backbone.model, "blocks") and len(backbone.model.blocks) == backbone.num_blocks:
        assert all(layers[name] == 1 + int(name.split(".")[1]) for name in in_order)


def factors(backbone: Backbone, **settings: Any) -> dict[str, tuple[float, float]]:
    """By name of a weight its factor on the learning rate and its weight decay."""
    by_id = {
        id(weight): (group["factor"], group["weight_decay"])
        for group in parameter_groups(backbone, PrepareSettings(**settings))
        for weight in group["params"]
    }
    return {name: by_id[id(weight)] for name, weight in backbone.model.named_parameters() if id(weight) in by_id}


def test_rates_of_stem_blocks_and_head() -> None:
    backbone = small_backbone()
    found = factors(backbone, stem_rate=0.01, block_rate=0.1, weight_decay=0.3)
    assert found["cls_token"] == (0.01, 0.3)
    assert found["patch_embed.proj.bias"] == (0.01, 0.0)
    assert found["blocks.0.attn.qkv.weight"] == found["blocks.2.mlp.fc2.weight"] == (0.1, 0.3)
    assert found["norm.weight"] == (1.0, 0.0)
    assert found["head.weight"] == (1.0, 0.3)
    found = factors(backbone, layer_decay=0.5, decay_all=True, weight_decay=0.3)
    assert {name.split(".")[0] + name.split(".")[1]: value for name, value in found.items() if "blocks" in name} == {
        "blocks0": (0.125, 0.3),
        "blocks1": (0.25, 0.3),
        "blocks2": (0.5, 0.3),
    }
    assert found["head.bias"] == (1.0, 0.3)
    assert found["pos_embed"] == (0.0625, 0.3)
    resnet = factors(small_backbone("resnet18"), layer_decay=0.5, stem_rate=0.1)
    assert resnet["conv1.weight"][0] == 0.1 * 0.5**6
    assert resnet["layer2.1.conv1.weight"][0] == 0.5**3


def test_a_step_of_sgd_and_of_adamw_is_each_groups_own() -> None:
    for optimizer in ("sgd", "adamw"):
        backbone = small_backbone()
        settings = PrepareSettings(
            optimizer=optimizer,
            stem_rate=0.25,
            block_rate=0.5,
            learning_rate=0.01,
            num_warm_up_epochs=0,
            weight_decay=0,
        )
        task = TransferTask(backbone, settings, 4, 5, tiny_split(9), RANKS)
        before = {name: value.clone() for name, value in backbone.model.named_parameters()}
        split = tiny_split()
        split_batch = split.__getitems__(range(13))
        gradients = {}

        def keep(parameter: torch.Tensor, names=dict(backbone.model.named_parameters()), kept=gradients) -> None:  # type: ignore[no-untyped-def]  # noqa: B006, B008
            kept.update({name: p.grad.clone() for name, p in names.items() if p is parameter})

        for parameter in backbone.model.parameters():
            parameter.register_post_accumulate_grad_hook(keep)
        task.train_step(split_batch, 1.0)
        for name, value in backbone.model.named_parameters():
            kind = name.split(".")[0]
            rate = 0.01 * {"blocks": 0.5, "norm": 1, "head": 1}.get(kind, 0.25)
            direction = gradients[name] if optimizer == "sgd" else gradients[name] / (gradients[name].abs() + 1e-8)
            torch.testing.assert_close(value.detach(), before[name] - rate * direction, rtol=1e-4, atol=1e-7)


def test_accumulated_micro_batches_are_the_whole_batch(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole", small_backbone())
    parts = fitted(tmp_path / "parts", small_backbone(), micro_batch_size=5)
    assert largest_difference(whole.weights(), parts.weights()) <= 2e-5
    assert [row["loss"] for row in parts.rows] == pytest.approx([row["loss"] for row in whole.rows], abs=1e-5)
    assert whole.rows[-1]["loss"] < whole.rows[0]["loss"]


def test_the_gradient_of_the_whole_batch_is_clipped(tmp_path: Path) -> None:
    backbone = small_backbone()
    before = {name: value.detach().clone() for name, value in backbone.model.named_parameters()}
    settings = PrepareSettings(momentum=0.0, weight_decay=0.0, learning_rate=1.0, num_warm_up_epochs=0, clip_norm=0.01)
    task = TransferTask(backbone, settings.model_copy(update={"micro_batch_size": 4}), 4, 5, tiny_split(9), RANKS)
    task.train_step(tiny_split().__getitems__(range(13)), 1.0)
    moved = sum((value.detach() - before[name]).square().sum() for name, value in backbone.model.named_parameters())
    assert math.sqrt(float(moved)) == pytest.approx(0.01, rel=1e-3)


def test_precisions_and_channels_last_stay_near_float32(tmp_path: Path) -> None:
    plain = fitted(tmp_path / "plain", small_backbone("resnet18"))
    last = fitted(tmp_path / "last", small_backbone("resnet18"), channels_last=True)
    assert last.backbone.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert largest_difference(plain.weights(), last.weights()) <= 1e-3
    for precision in ("bf16", "fp16"):
        seen: list[torch.dtype] = []
        backbone = small_backbone("resnet18")
        backbone.model.layer1[0].conv1.register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(output.dtype)
        )
        task = fitted(tmp_path / precision, backbone, precision=precision)
        assert {torch.bfloat16, torch.float16} & set(seen)
        assert {torch.bfloat16, torch.float16}.isdisjoint(value.dtype for value in task.weights().values())
        assert abs(task.rows[-1]["loss"] - plain.rows[-1]["loss"]) < 0.2  # fp16's first steps overflow and are left out


def test_fp16s_scale_is_lowered_by_an_overflow_and_the_step_left_out() -> None:
    backbone = small_backbone()
    task = TransferTask(backbone, PrepareSettings(precision="fp16"), 4, 5, tiny_split(9), RANKS)
    updates = task.updates
    assert isinstance(updates, WholeModel)
    updates.scaler.load_state_dict({**updates.scaler.state_dict(), "scale": 2.0**40})
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    batch = tiny_split().__getitems__(range(13))
    task.train_step(batch, 1.0)
    assert largest_difference(before, backbone.model.state_dict()) == 0
    assert updates.scaler.get_scale() == 2.0**39
    for _ in range(40):
        task.train_step(batch, 1.0)
    assert largest_difference(before, backbone.model.state_dict()) > 0


RESUMED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("resnet18", {"drop_rate": 0.2}, {"precision": "fp16", "micro_batch_size": 4, "frozen": ["layer1.0"]}),
    ("vit_tiny_patch16_224", {"drop_path_rate": 0.3}, {"optimizer": "adamw", "layer_decay": 0.7, "clip_norm": 0.5}),
    ("resnet18", {}, {"precision": "bf16", "channels_last": True, "stem_rate": 0.1, "min_learning_rate": 1e-3}),
]


@pytest.mark.parametrize(("name", "arguments", "settings"), RESUMED)
def test_a_killed_training_goes_on_bit_for_bit(
    name: str, arguments: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = fitted(tmp_path / "whole", small_backbone(name, **arguments), **settings)
    for stop in (3, 9):
        folder = tmp_path / str(stop)
        with pytest.raises(KilledError):
            fitted(folder, small_backbone(name, **arguments), stop_at=stop, **settings)
        resumed = fitted(folder, small_backbone(name, **arguments), **settings)
        assert resumed.rows == whole.rows
        assert largest_difference(whole.weights(), resumed.weights()) == 0
        assert resumed.state()[1] == whole.state()[1]
        if settings.get("precision") == "fp16":
            saved = json.loads(sorted(folder.glob("*.json"))[-1].read_text())["facts"]["task"]["updates"]["scaler"]
            assert saved["_growth_tracker"] + round(16 - math.log2(saved["scale"])) > 0  # it has been at work


def test_a_loss_that_is_not_finite_is_told_with_its_step_and_rank_and_never_saved(tmp_path: Path) -> None:
    with pytest.raises(Failure) as caught:
        fitted(tmp_path, small_backbone(), learning_rate=1e30, num_warm_up_epochs=0)
    assert str(caught.value) == (
        "the backbone's loss was not finite at step 1 on rank 0; lower prepare.learning_rate, or fix the data or the "
        "weights it started from"
    )
    with pytest.raises(Failure, match="at step 1 on rank 0"):
        fitted(tmp_path, small_backbone(), learning_rate=1e30, num_warm_up_epochs=0, stop_at=99)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["checkpoint-0000000001.safetensors"]


def test_what_is_frozen_stays_with_its_statistics(tmp_path: Path) -> None:
    backbone = small_backbone("resnet18")
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    task = fitted(tmp_path, backbone, frozen=["layer1", "bn1", "fc.bias"], decay_all=True)
    after = task.weights()
    for name, value in after.items():
        kept = name.startswith(("layer1.", "bn1.")) or name == "fc.bias"
        assert torch.equal(value, before[name]) == kept, name


def test_frozen_names_that_do_not_fit() -> None:
    def build(frozen: list[str]) -> None:
        TransferTask(small_backbone(), PrepareSettings(frozen=frozen), 4, 5, tiny_split(9), RANKS)

    with pytest.raises(UserError) as caught:
        build(["clstoken"])
    assert str(caught.value) == (
        "prepare.frozen: vit_tiny_patch16_224 has no weight or module 'clstoken'; the nearest name is 'cls_token'"
    )
    with pytest.raises(UserError, match=r"no weight is left to train; set prepare\.num_epochs=0"):
        build(["cls_token", "pos_embed", "patch_embed", "blocks", "norm", "head"])


def test_a_checkpoint_of_another_layout_is_refused() -> None:
    task = TransferTask(small_backbone(), PrepareSettings(), 4, 5, tiny_split(9), RANKS)
    tensors, facts = task.state()
    with pytest.raises(UserError) as caught:
        task.restore(tensors, {**facts, "layout": "ZeRO-2 over 2 ranks"})
    assert str(caught.value) == (
        "the checkpoint was left by a run whose model lay ZeRO-2 over 2 ranks, and now it would lie whole: go on with "
        "the same dist.deepspeed_stage and number of ranks, or remove its folder"
    )


def test_a_compiler_that_fails_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*graph: object) -> None:
        raise OSError("c++: no such file\nand a hundred lines more")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    with pytest.raises(Failure, match=r"^prepare\.compile = true: torch\.compile failed \(.*\); fix its comp.*=false$"):
        fitted(tmp_path, small_backbone(), compile=True)


def test_compiled_training_is_the_plain_one_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the default backend needs a compiler and minutes for the same graphs
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    plain = fitted(tmp_path / "plain", small_backbone())
    compiled = fitted(tmp_path / "compiled", small_backbone(), compile=True)
    assert plain.weights().keys() == compiled.weights().keys()
    assert largest_difference(plain.weights(), compiled.weights()) <= 1e-4
    with pytest.raises(KilledError):
        fitted(tmp_path / "killed", small_backbone(), compile=True, stop_at=9)
    resumed = fitted(tmp_path / "killed", small_backbone(), compile=True)
    assert largest_difference(resumed.weights(), compiled.weights()) == 0


def test_training_accuracy_is_of_as_many_samples_as_validation(tmp_path: Path) -> None:
    task = fitted(tmp_path, small_backbone())
    _, images, labels = tiny_split().__getitems__(range(0, 90, 3))  # 90 samples, 41 of validation: every third
    with torch.no_grad():
        correct = task.backbone.model.eval()(images).argmax(1) == labels
    assert task.accuracy(tiny_split()) == pytest.approx(correct.double().mean().item(), abs=1e-12)
    assert task.accuracy(task.validation) == task.accuracy() == task.rows[-1]["validation_accuracy"]


def test_a_gap_between_training_and_validation_is_reported() -> None:
    (warning,) = gap_remark(0.96, 0.94, 5000)
    assert "right on 0.9600 of as many training images and 0.9400 of validation" in warning
    assert [*gap_remark(0.949, 0.94, 5000), *gap_remark(0.9, 0.94, 5000)] == []
    assert list(gap_remark(0.54, 0.5, 100)) == []  # four images may be chance
    assert list(gap_remark(0.96, 0.94, 500)) == []
