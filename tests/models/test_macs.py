"""MACs, against torch's own counter and against published figures."""

import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynexit.errors import UserError
from dynexit.models.backbones import build_backbone
from dynexit.models.heads import StackedHeads
from dynexit.models.macs import backbone_macs, exit_costs, head_macs, macs_report
from launch.__main__ import main
from tests.models.test_backbones import DIGITS
from tests.models.tiny import TINY, build_tiny


def torch_macs(function: nn.Module, *inputs: torch.Tensor) -> float:
    """torch's count, which knows fused attention and no norms."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("family", TINY)
def test_macs_equal_torchs_counter_for_the_whole_and_for_every_part(family: str) -> None:
    backbone = build_tiny(family)
    per_block, full = backbone_macs(backbone)
    assert full == pytest.approx(torch_macs(backbone.model, torch.zeros(1, *backbone.input_size)), rel=1e-3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        h = backbone.stem(torch.zeros(1, *backbone.input_size))
        for i in range(backbone.num_blocks):
            h = backbone.run_block(i, h)
            assert per_block[i] == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)
    assert 0 < per_block[0] < full


def test_macs_do_not_change_the_model() -> None:
    backbone = build_tiny("EfficientViT MSRA")
    x = torch.ones(2, *backbone.input_size)
    before = backbone.model(x)
    backbone_macs(backbone)
    assert torch.equal(backbone.model(x), before)
    assert not backbone.training


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet50", 4089.2),
        ("vit_tiny_patch16_224", 1253.7),
        ("convnextv2_atto", 547.3),
        ("t2t_vit_7", 1146.9),
        ("t2t_vit_14", 4783.5),
    ],
)
def test_published_figures_at_224_pixels(name: str, millions: float) -> None:
    assert backbone_macs(build_backbone(name, num_classes=1000))[1] / 1e6 == pytest.approx(millions, abs=0.05)


def test_the_digits_backbone_costs_three_million_spread_over_its_depth() -> None:
    costs = exit_costs(
        build_backbone("resnet18", arguments=DIGITS, num_classes=10, image_size=32), range(7), ["linear"]
    )
    assert costs.full_macs == 2_972_640
    assert [round(macs / costs.full_macs, 2) for macs in costs.backbone_macs] == [
        0.19,
        0.29,
        0.34,
        0.39,
        0.48,
        0.58,
        0.78,
    ]
    assert costs.head_macs == ((160,), (160,), (240,), (240,), (320,), (320,), (480,))
    assert costs.gate_macs == (4,) * 7


@pytest.mark.parametrize("head_type", ["linear", "mlp1x7", "mlp2x7", "mlp5x3"])
def test_head_macs_equal_torchs_counter(head_type: str) -> None:
    head = StackedHeads([11], [0], [head_type], 5, [0])
    expected = torch_macs(head, [torch.zeros(1, 11)])
    assert head_macs(head_type, 11, 5) == expected


def test_another_image_size_costs_more() -> None:
    backbone = build_tiny("ResNet")
    assert backbone_macs(backbone, 64)[1] > 3 * backbone_macs(backbone, (32, 32))[1]
    costs = exit_costs(backbone, [1, 4], ["linear", "mlp2x3"], (32, 64))
    assert costs.positions == (1, 4)
    assert costs.head_macs == ((8 * 5, 8 * 3 + 3 * 5), (16 * 5, 16 * 3 + 3 * 5))
    assert costs.backbone_macs[0] == pytest.approx(2 * backbone_macs(backbone)[0][1], rel=1e-6)


def test_the_report_has_dyces_published_macs() -> None:
    report = macs_report("convnextv2_atto", image_size=224)
    assert json.loads(json.dumps(report)) == report
    assert report["full_macs"] == 547_332_480
    assert report["image_size"] == [224, 224]
    assert report["positions"] == list(range(11))
    # DyCE's published example for this model, which leaves some blocks out
    published = {
        0: (52308480, 40000, 770000),
        2: (151845120, 80000, 790000),
        5: (288449280, 160000, 830000),
        7: (371804160, 160000, 830000),
        9: (455159040, 160000, 830000),
        10: (506103360, 320000, 910000),
    }
    for i, macs in published.items():
        heads = report["head_macs"]
        assert (report["backbone_macs"][i], heads["mlp1x1000"][i], heads["mlp3x500"][i]) == macs
    assert report["gate_macs"] == [4] * 11
    with pytest.raises(UserError, match="unknown backbone 'resnet5'"):
        macs_report("resnet5")


def test_a_report_of_chosen_positions_and_head_types(capsys: pytest.CaptureFixture[str]) -> None:
    report = macs_report("test_resnet", num_classes=7)
    asked = ["macs", "test_resnet", "--num-classes", "7", "--positions", "0", "2", "--head-types", "mlp3x500", "linear"]
    assert main([*asked, "--dyce"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["backbone"]["macs"] == [*(report["backbone_macs"][i] for i in (0, 2)), report["full_macs"]]
    assert [head["name"] for head in info["head"]] == ["mlp3x500", "linear"]
    assert info["head"][0]["macs"] == [*(report["head_macs"]["mlp3x500"][i] for i in (0, 2)), 0]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["positions"] == [0, 2]
    assert main([*asked, "--reader", "average_max_std", "--concatenate", "--stem", "--json"]) == 0
    rich = json.loads(capsys.readouterr().out)
    assert rich["positions"] == [-2, 0, 2]
    assert rich["backbone_macs"][0] < rich["backbone_macs"][1] == report["backbone_macs"][0]
    assert rich["head_macs"]["linear"] == [7 * width for width in rich["num_features"]]
    assert all(macs > 0 for macs in rich["reader_macs"])
    assert main([*asked, "--reader", "average_max_std", "--stem"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["position", "backbone", "M", "relative", "features"]
    assert [line.split()[0] for line in lines[2:]] == ["stem", "0", "2"]
    assert main([*asked, "--reader", "average_max_std", "--concatenate", "--dyce"]) == 2
    assert "--dyce has no place for MACs of features that several exits read" in capsys.readouterr().err
    for wrong, message in (
        ({"positions": [0, 9]}, r"exit positions \[0, 9\] do not fit test_resnet: give block indices in rising order"),
        ({"head_types": ["mlp"]}, "unknown head type 'mlp': use 'linear'"),
    ):
        with pytest.raises(UserError, match=message):
            macs_report("test_resnet", **wrong)
