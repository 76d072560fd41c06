"""The static networks of a study: their ids, what they share, and what is wrong with section baselines."""

from pathlib import Path

import pytest

from dynexit.errors import UserError
from dynexit.study.baselines import network_name
from dynexit.study.grid import Study
from dynexit.study.read import load_study, resolved_yaml
from tests.command_line import TINY

SMALL, SMALLER = "{channels: [4, 5, 6, 7]}", "{layers: [1, 1, 1, 1], channels: [3, 4, 5, 6]}"


def study(*overrides: str, static: str = f"[{SMALL}, {SMALLER}]") -> Study:
    return load_study(TINY, [f"baselines.static={static}", *overrides])


def test_baselines_change_no_id_of_the_study() -> None:
    before = [point.ids for point in load_study(TINY).points]
    assert [point.ids for point in study("baselines.cascade=true").points] == before
    assert not load_study(TINY).static


def test_a_static_network_differs_in_the_arguments_given() -> None:
    one = study()
    assert list(map(network_name, one.static)) == [SMALL, SMALLER, "backbone"]
    assert [point.label for point in one.static] == [f"static={SMALL}", f"static={SMALLER}", "static=backbone"]
    given = one.config.backbone.arguments
    arguments = [point.config.backbone.arguments for point in one.static]
    assert arguments[0] == {**given, "channels": [4, 5, 6, 7]}
    assert arguments[2] == given
    assert one.static[2].ids["prepare"] == one.points[0].ids["prepare"]
    assert {(p.config.train.method, p.config.exits.positions) for p in one.static} == {("probe", "last")}
    assert {point.networks for point in one.static} == {tuple(point.ids["record"] for point in one.static)}


def test_networks_are_shared_and_only_cascades_depend_on_all() -> None:
    both, first = study().static, study(static=f"[{SMALL}]").static
    cascade = study("baselines.cascade=true").static
    for stage in ("prepare", "train", "record"):
        assert first[0].ids[stage] == both[0].ids[stage] == cascade[0].ids[stage]
    assert len({group[0].ids["search"] for group in (both, first, cascade)}) == 3
    twice = study(static=f"[{SMALL}, {SMALL}]").static
    assert [point.ids for point in twice] == [point.ids for point in first]


def test_every_prepared_backbone_has_networks_of_its_own() -> None:
    one = study("data.seed=[0, 1]", static=f"[{SMALL}]")
    assert [point.label for point in one.static] == [
        f"seed={seed} static={name}" for seed in (0, 1) for name in (SMALL, "backbone")
    ]
    assert len({point.networks for point in one.static}) == 2


def test_heads_read_what_the_probes_of_the_study_read() -> None:
    swept = ("train.method=[independent, probe]", "exits.reader=[average, grid2]", "sweep.jei_dnn.ce_ic_tradeoff=[1]")
    one = study(*swept, static=f"[{SMALL}]")
    assert [point.config.exits.reader for point in one.static] == ["average", "average", "grid2", "grid2"]
    assert len({point.ids["prepare"] for point in one.static}) == 2


def test_the_resolved_study_has_the_same_networks(tmp_path: Path) -> None:
    one = study("baselines.cascade=true")
    (tmp_path / "again.yaml").write_text(resolved_yaml(one), encoding="utf-8")
    again = load_study(tmp_path / "again.yaml")
    assert [point.ids for point in again.static] == [point.ids for point in one.static]
    moved = again.at(tmp_path / "moved")
    assert {point.study_dir for point in moved.all_points} == {tmp_path / "moved"}


MISTAKES = {
    "prepare.num_epochs=0": "baselines.static: needs prepare.num_epochs of at least 1, since static networks are "
    "fitted from random weights; remove it or fit the backbone too",
    "baselines.static=[]": "baselines.cascade = true: needs baselines.static, the networks that run before the "
    "backbone, as [{channels: [8, 12, 16, 24]}]",
    "baselines.static=[{}]": "baselines.static: {} is the backbone itself; give arguments that differ from "
    "backbone.arguments",
    "baselines.static=3": "baselines.static = 3: should be a valid list",
    "baselines.cascade=3": "baselines.cascade = 3: should be a valid boolean",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_what_a_mistake_in_baselines_is_called(override: str) -> None:
    with pytest.raises(UserError) as caught:
        study("baselines.cascade=true", override)
    assert str(caught.value) == MISTAKES[override]
