"""Fitting the backbone on two ranks: as on one, the same statistics on each, and divided by ZeRO without loss."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dynexit.errors import UserError
from dynexit.train import parallel
from tests.conftest import require
from tests.train.fitted import fitted, small_backbone
from tests.train.ranks import run_ranks
from tests.train.tiny import largest_difference

VIT, RESNET = "vit_tiny_patch16_224", "resnet18"


def fit_on_two(folder: Path, *fittings: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """By name the whole weights that the main rank was left with; fails where ranks differ in statistics."""
    run_ranks(2, [sys.executable, "-m", "tests.train.one_transfer_rank", str(folder), json.dumps(fittings)])
    weights = {}
    for name in (fitting["name"] for fitting in fittings):
        weights[name] = load_file(folder / f"{name}.safetensors")
        statistics = [load_file(folder / f"{name}.statistics{rank}.safetensors") for rank in range(2)]
        if statistics[0]:
            assert largest_difference(*statistics) == 0
            assert all(torch.equal(value, weights[name][key]) for key, value in statistics[0].items())
    return weights


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path: Path) -> None:
    clipped = {"clip_norm": 0.3, "micro_batch_size": 3, "layer_decay": 0.8}
    one_image = {"global_batch_size": 1, "num_epochs": 1, "learning_rate": 1e-3, "num_warm_up_epochs": 0}
    found = fit_on_two(
        tmp_path,
        {"name": "vit", "model": VIT},
        {"name": "clipped", "model": VIT, **clipped},
        {"name": "fp16", "model": VIT, "precision": "fp16"},
        {"name": "one image", "model": VIT, **one_image},
        {"name": "norms", "model": RESNET, "micro_batch_size": 4, "arguments": {"drop_rate": 0.1}},
        {
            "name": "norms resumed",
            "model": RESNET,
            "micro_batch_size": 4,
            "stop_at": 9,
            "arguments": {"drop_rate": 0.1},
        },
    )
    for name, settings in (("vit", {}), ("clipped", clipped), ("one image", one_image)):
        alone = fitted(tmp_path / f"{name} alone", small_backbone(VIT), **settings)
        assert largest_difference(alone.weights(), found[name]) <= 2e-5
    assert largest_difference(found["norms"], found["norms resumed"]) == 0
    assert largest_difference(found["fp16"], found["vit"]) <= 0.05


@pytest.mark.slow
def test_zero_divides_the_backbone_and_loses_nothing(tmp_path: Path) -> None:
    require(find_spec("deepspeed") is not None, "DeepSpeed is not installed (the extra `deepspeed`)")
    frozen = {"frozen": ["cls_token", "blocks.0", "patch_embed"], "micro_batch_size": 3, "clip_norm": 0.5}
    adam = {"optimizer": "adamw", "learning_rate": 1e-3, "layer_decay": 0.7}
    norms = {"model": RESNET, "global_batch_size": 18}
    fittings: list[dict[str, Any]] = [
        {"name": "plain", "model": VIT, **frozen},
        {"name": "adam", "model": VIT, **adam},
        {"name": "norms", **norms},
    ]
    for stage in (1, 2, 3):
        fittings.append({"name": f"plain{stage}", "model": VIT, "stage": stage, "stop_at": 3, **frozen})
    fittings += [
        {"name": "adam3", "model": VIT, "stage": 3, **adam},
        {"name": "adam3 resumed", "model": VIT, "stage": 3, "stop_at": 9, **adam},
        {"name": "norms2", "stage": 2, **norms},
        {"name": "bf16", "model": VIT, "stage": 2, "precision": "bf16", "frozen": ["blocks.0"]},
        {"name": "one image", "model": VIT, "stage": 3, "global_batch_size": 1, "num_epochs": 1},
        {"name": "last", "model": VIT, "stage": 2, "channels_last": True, "num_epochs": 1},
    ]
    found = fit_on_two(tmp_path, *fittings)
    for name in ("plain1", "plain2", "plain3", "adam3", "norms2"):
        assert largest_difference(found[name.rstrip("123")], found[name]) <= 1e-5, name
        layout, rows = json.loads((tmp_path / f"{name}.json").read_text())
        assert layout == f"ZeRO-{name[-1]} over 2 ranks"
        expected = json.loads((tmp_path / f"{name.rstrip('123')}.json").read_text())[1]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
    assert largest_difference(found["adam3"], found["adam3 resumed"]) == 0
    untouched = small_backbone(VIT).model.state_dict()
    for name in ("plain3", "bf16", "one image", "last"):
        assert found[name].keys() == untouched.keys()
        assert all(value.dtype == torch.float32 for value in found[name].values())
        small_backbone(VIT).model.load_state_dict(found[name])
    assert all(torch.equal(found["bf16"][key], value) == ("blocks.0." in key) for key, value in untouched.items())
    kept = ("cls_token", "blocks.0.", "patch_embed.")
    assert all(torch.equal(found["plain3"][key], value) == key.startswith(kept) for key, value in untouched.items())


def test_without_deepspeed_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        parallel.check_installed(2)
    assert str(caught.value) == (
        "dist.deepspeed_stage = 2 needs DeepSpeed, which is not installed: pip install 'dynexit[deepspeed]'"
    )
