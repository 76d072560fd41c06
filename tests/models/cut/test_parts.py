"""Stages as JSON: they give the same logits without the module, and nothing foreign is run."""

import json
from typing import Any

import pytest
import torch

from dynexit.models.cut.backbone import OwnBackbone
from dynexit.models.cut.own import read_stages, stages_of
from dynexit.models.cut.parts import PartError, Parts
from tests.models.cut.own import NUM_CLASSES, built, cut, images, logits

WAYS = ("Sequential", "DenseNet", "Swin", "Hugging Face ViT")


def written(backbone: OwnBackbone) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    stages = stages_of(backbone)
    assert stages is not None
    return json.loads(json.dumps(stages[0])), stages[1]


@pytest.mark.parametrize("name", WAYS)
def test_written_stages_give_the_same_logits(name: str) -> None:
    backbone = cut(name)
    content, tensors = written(backbone)
    state = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    size = {"num_classes": NUM_CLASSES, "input_size": (3, 32, 32)}
    again = read_stages(content, tensors, state, name="again", **size)  # type: ignore[arg-type]
    assert torch.equal(again(images()), backbone(images()))
    torch.testing.assert_close(again(images()), logits(built(name), images()), rtol=1e-5, atol=1e-5)
    assert (again.places, again.feature_dims) == (backbone.places, backbone.feature_dims)
    assert set(again.model.state_dict()) == set(state)
    del state[next(iter(state))]
    with pytest.raises(PartError, match="is missing"):
        read_stages(content, tensors, state, name="again", **size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "step",
    [
        ["x", "aten.from_file.default", ["/etc/passwd"], {}],
        ["x", "aten._no_such.default", [], {}],
        ["x", "os.system", ["true"], {}],
        ["x", "eval", ["1"], {}],
        ["x", "weight", ["model.__class__"], {}],
        ["x", "weight", ["self.forward"], {}],
        ["x", "weight", ['model.a"]; import os'], {}],
        ["x; import os", "aten.relu.default", [{"node": "h"}], {}],
        ["x", "aten.relu.default", [{"node": "none"}], {}],
        ["x", "aten.relu.default", [{"dtype": "load"}], {}],
        ["x", "aten.relu.default", [{"node": "h"}], {"a=1, b": 1}],
    ],
)
def test_other_operations_are_refused(step: list[Any]) -> None:
    steps = [["h", "state", [], {}], step, ["output", "output", [{"node": "x"}], {}]]
    with pytest.raises(PartError):
        Parts.from_json([steps], {}).bind(torch.nn.Linear(1, 1))
