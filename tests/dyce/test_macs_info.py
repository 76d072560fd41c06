"""DyCE's macs_info: written as published, and read back as the same costs."""

from dynexit.core.cost import ExitCosts
from dynexit.dyce.macs_info import costs_from_macs_info, dyce_macs_info
from dynexit.models.macs import macs_report


def test_macs_info_has_dyces_form_and_reads_back() -> None:
    report = macs_report("test_resnet", image_size=64)
    info = dyce_macs_info(report)
    assert [head["name"] for head in info["head"]] == list(report["head_macs"])
    assert info["head"][0]["macs"] == [*report["head_macs"]["linear"], 0]
    assert info["backbone"] == {
        "name": "test_resnet",
        "macs": [*report["backbone_macs"], report["full_macs"]],
        "ori_macs": report["full_macs"],
    }
    heads = report["head_macs"]
    assert costs_from_macs_info(info) == ExitCosts(
        full_macs=report["full_macs"],
        positions=tuple(report["positions"]),
        backbone_macs=tuple(report["backbone_macs"]),
        head_types=tuple(heads),
        head_macs=tuple(zip(*heads.values(), strict=True)),
        gate_macs=(0,) * len(report["positions"]),
    )
