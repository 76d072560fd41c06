"""The studies that come with the program: each says what it is and can be planned without data or weights."""

from pathlib import Path

import pytest

from dynexit.errors import counted
from dynexit.jobs.report import published_beside
from dynexit.study.read import load_study, resolved_yaml
from launch.__main__ import main

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if "_t2t_vit_" in path.name or path.name.startswith("imagenet_")]


def head_of(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    first_key = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:first_key])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_study_loads_resolves_and_dry_runs_without_its_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = load_study(path)
    again = tmp_path / path.name
    again.write_text(resolved_yaml(study), encoding="utf-8")
    assert load_study(again).points == study.points
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(path), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert f"study {path.stem}: {counted(len(study.points), 'point')} in" in plan
    assert all(point.id in plan for point in study.points)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name]  # a plan leaves nothing


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_study_says_what_it_is_in_its_first_lines(path: Path) -> None:
    assert f"dynexit run configs/{path.name}" in head_of(path)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_study_names_its_paper_and_where_to_get_data_and_weights(path: Path) -> None:
    head = head_of(path)
    assert head.startswith("# Reproduces ")
    assert "arXiv 2310.09163" in head or "arXiv 2403.01695" in head
    assert "Data:" in head
    assert "Weights:" in head


def test_every_published_study_is_there() -> None:
    jei = [("cifar10", 7), ("cifar10", 14), ("cifar100", 7), ("cifar100", 14), ("svhn", 7)]
    jei += [("cifar100_lt", 7), ("cifar100_lt", 14)]
    dyce = ("resnet50", "resnet152", "convnextv2_atto", "convnextv2_tiny", "davit_base")
    expected = [f"{data}_t2t_vit_{depth}" for data, depth in jei] + [f"imagenet_{name}" for name in dyce]
    assert sorted(path.stem for path in PUBLISHED) == sorted(expected)


def test_the_missing_data_are_named_when_something_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = next(path for path in PUBLISHED if path.stem == "cifar10_t2t_vit_7")
    assert main(["prepare", str(path)]) == 2
    assert "weights file 'weights/71.7_T2T_ViT_7.pth.tar' does not exist" in capsys.readouterr().err
    assert main(["prepare", str(path), "backbone.weights=null"]) == 2
    error = capsys.readouterr().err
    assert "data.dir = data: there is no such folder" in error
    (tmp_path / "data").mkdir()
    assert main(["prepare", str(path), "backbone.weights=null"]) == 2
    assert "cifar10 was looked for in data/cifar-10-batches-py" in capsys.readouterr().err


@pytest.mark.parametrize("path", [p for p in PUBLISHED if "_t2t_vit_" in p.name], ids=lambda path: path.stem)
def test_a_study_of_jei_dnn_has_its_authors_points_beside_it(path: Path) -> None:
    assert len(published_beside(load_study(path).points[0])) > 80
    assert published_beside(load_study(path, ["report.published=none"]).points[0]) == []
