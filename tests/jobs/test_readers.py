"""Studies with readers, concatenated features and an exit on the stem: the engine answers as the record says."""

import json
from pathlib import Path

import pytest

import dynexit
from dynexit.core.cost import STEM, ExitCosts
from dynexit.errors import UserError
from dynexit.jobs.infer import run_infer
from dynexit.jobs.load import check_model
from dynexit.jobs.save import run_save
from dynexit.record.shards import Record
from dynexit.run_dir import RunDir
from dynexit.study.read import load_study
from tests.command_line import TINY
from tests.jobs.test_methods import done

VIT = (
    "backbone.name=vit_tiny_patch16_224",
    "backbone.arguments={embed_dim: 24, depth: 4, num_heads: 2, patch_size: 8}",
    "prepare.optimizer=adamw",
    "prepare.learning_rate=0.003",
)
RICH = ("exits.concatenate=true", "exits.stem=true")
PROBE = ("train.method=probe", "exits.whiten=true", "seed=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")  # one for all, so that each backbone is fitted once


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (*PROBE, "exits.reader=average_max_std"),
        (*PROBE, "exits.reader=average_max_std", *RICH),
        (*PROBE, "exits.reader=grid2", "exits.concatenate=true", "exits.head_types=[linear, mlp2x9]"),
        (*PROBE, "exits.reader=grid4", "exits.stem=true"),
        (*PROBE, "exits.stem=true"),
        (*PROBE, *VIT, "exits.reader=tokens_average_std", *RICH),
        (*PROBE, *VIT, "exits.reader=token", "exits.stem=true"),
        (*PROBE, *VIT, "exits.reader=average", "exits.concatenate=true", "exits.head_types=[linear, mlp2x9]"),
        (
            "jei_dnn.warm_up=convex",
            "exits.standardise=true",
            "exits.reader=average_max_std",
            *RICH,
            "infer.source=gates",
        ),
        ("jei_dnn.ce_ic_tradeoff=1", "seed=0", "exits.reader=average", *RICH, "search.confidence=gate"),
        ("train.method=boosted", "seed=0", "exits.reader=average_max_std", *RICH, "exits.whiten=true"),
    ],
    ids=" ".join,
)
def test_the_engine_answers_as_the_record_says(
    folder: Path, overrides: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    study, rows = done(folder, "search.relative_macs=[0.7]", "infer.batch_size=37", *overrides)
    point = study.points[-1]
    run_infer(study.points)
    assert "0 other differences" in capsys.readouterr().out
    costs = ExitCosts.from_json(RunDir(point, "record").read_json("costs.json"))
    record = Record.open(RunDir(point, "record") / "test")
    assert (costs.positions[0] == STEM) == (record.positions[0] == STEM) == ("exits.stem=true" in overrides)
    assert record.rows[-1] == (-1, "backbone")
    has_std = any(name.endswith("std") for name in overrides)
    assert any(costs.reader_macs) == (has_std and "exits.concatenate=true" in overrides)
    for file in (study.directory / "infer").glob("*/summary.json"):
        assert json.loads(file.read_text())["unexplained_differences"] == 0
    assert {row.source for row in rows} >= {"search", "fixed", "backbone"}
    page = (study.directory / "report" / "report.html").read_text()
    assert ("the stem" in page) == ("exits.stem=true" in overrides)
    assert "block -2" not in page


@pytest.mark.slow
def test_methods_with_exits_of_their_own_share_a_report(folder: Path, tmp_path: Path) -> None:
    zipped = {
        "train.method": ["jei_dnn", "probe"],
        "exits.reader": [None, "average_max_std"],
        "exits.stem": [False, True],
        "exits.head_types": [["linear"], ["linear", "mlp2x9"]],
    }
    path = tmp_path / "two_ways.yaml"
    path.write_text(f"{TINY.read_text()}  zip: {json.dumps(zipped)}\n")
    study, rows = done(folder, "search.relative_macs=[0.99]", "seed=0", "jei_dnn.ce_ic_tradeoff=1", path=path)
    assert [point.method for point in study.points] == ["jei_dnn", "probe"]
    num_exits = {row.method: len(row.exit_fractions) for row in rows if row.source == "search"}
    assert num_exits["probe"] == num_exits["jei_dnn"] + 1
    page = (study.directory / "report" / "report.html").read_text()
    assert "the stem (linear)" in page
    for point in study.points:  # each is saved with its own exits
        saved = run_save(study.points, tmp_path / point.method, identity=point.id)
        assert {one.training for one in saved} == {point.id}
        dynexit.load(tmp_path / point.method)  # which verifies the answers


def test_wide_features_are_not_whitened(tmp_path: Path) -> None:
    wide = ("backbone.name=resnet50", "backbone.arguments={}", "exits.reader=average_max_std", "exits.concatenate=true")
    config = load_study(TINY, [*wide, "train.method=probe", "exits.whiten=true"]).points[0].config
    message = r"exits of resnet50 read up to 39,168 features, whose covariances take [\d.]+ GB; at most 1.0 GB"
    with pytest.raises(UserError, match=message):
        check_model(config, weights=False)
    narrow = load_study(TINY, [*wide, "train.method=probe", "exits.standardise=true"]).points[0].config
    check_model(narrow, weights=False)


def test_standardised_features_of_two_kinds_need_a_reader(tmp_path: Path) -> None:
    two = (*VIT, "exits.head_types=[linear, mlp2x9]", "train.method=independent", f"runs_dir={tmp_path}")
    check_model(load_study(TINY, two).points[0].config, weights=False)
    for key in ("exits.standardise=true", "exits.whiten=true", "train.method=probe"):
        config = load_study(TINY, [*two, key]).points[0].config
        with pytest.raises(UserError, match=r"set exits.reader, as token or tokens_average_std$"):
            check_model(config, weights=False)
        check_model(load_study(TINY, [*two, key, "exits.reader=average"]).points[0].config, weights=False)
