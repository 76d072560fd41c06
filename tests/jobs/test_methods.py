"""All training methods through the jobs: what points without gates record, cost and report; gates as confidence."""

from pathlib import Path

import numpy as np
import pytest

from dynexit.core.cost import ExitCosts
from dynexit.data import load_data
from dynexit.dist import start_ranks
from dynexit.jobs.infer import run_infer
from dynexit.jobs.load import load_heads, load_model
from dynexit.jobs.planning.missing import make_packs
from dynexit.jobs.report import beyond_published
from dynexit.record.shards import Record
from dynexit.run_dir import RunDir
from dynexit.search.operating_points import ReportRow, read_csv
from dynexit.study.grid import Study
from dynexit.study.read import load_study
from tests.command_line import TINY, do_all_jobs, run_stage

pytestmark = pytest.mark.slow

METHODS = ("jei_dnn", "independent", "boosted", "weighted", "probe", "dyce")


def done(folder: Path, *overrides: str, path: Path = TINY) -> tuple[Study, list[ReportRow]]:
    """The study after all of its jobs, called as functions, and the rows of its report."""
    quick = ("report.mlflow=false", "dist.checkpoint_seconds=1000", "dyce.num_warm_up_epochs=1")
    study = load_study(path, [f"runs_dir={folder}", *quick, *overrides])
    do_all_jobs(study)
    return study, read_csv(study.directory / "report" / "operating_points.csv")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[ReportRow]]:
    folder = tmp_path_factory.mktemp("methods")
    overrides = (f"train.method=[{', '.join(METHODS)}]", "jei_dnn.ce_ic_tradeoff=[0.1, 1]", "seed=[0, 3]")
    return done(folder, *overrides)


def test_one_pack_a_method_and_no_point_twice(finished: tuple[Study, list[ReportRow]]) -> None:
    study, _ = finished
    assert len(study.points) == 2 * 2 + 5 * 2
    sizes = {pack[0].config.train.method: len(pack) for pack in make_packs(study.points, 64)}
    assert sizes == {"jei_dnn": 4, "independent": 2, "boosted": 2, "weighted": 2, "probe": 2, "dyce": 2}


def test_only_methods_that_distil_are_named() -> None:
    (text,) = beyond_published(load_study(TINY, ["train.distillation=0.2", "train.method=[probe, jei_dnn]"]).points)
    assert text.startswith("Exits of jei_dnn also learned from the backbone's own classifier (train.di")
    assert not beyond_published(load_study(TINY, ["train.distillation=0.2", "train.method=probe"]).points)


def test_only_jei_dnn_has_gates(finished: tuple[Study, list[ReportRow]]) -> None:
    study, rows = finished
    for point in study.points:
        gated = point.config.train.method == "jei_dnn"
        source = RunDir(point, "record")
        record = Record.open(source / "test")
        costs = ExitCosts.from_json(source.read_json("costs.json"))
        assert (record.gate is not None) == gated
        assert all(macs > 0 for macs in costs.gate_macs) == gated
        assert any(costs.gate_macs) == gated
        sources = {row.source for row in rows if row.point_id in (point.id, point.ids["search"])}
        assert sources == ({"gates", "search", "fixed"} if gated else {"search", "fixed"})
        assert {row.ce_ic_tradeoff is None for row in rows if row.point_id in (point.id, point.ids["search"])} == {
            not gated
        }


def test_the_record_of_boosted_heads_holds_the_summed_logits(finished: tuple[Study, list[ReportRow]]) -> None:
    study, _ = finished
    point = next(point for point in study.points if point.config.train.method == "boosted")
    ranks = start_ranks("cpu")
    model, _ = load_model(point, ranks)
    heads, gates = load_heads([point], model)
    assert gates is None
    images = load_data(point.config.data).test.images
    features, _ = model.features(images)
    summed = None
    record = Record.open(RunDir(point, "record") / "test")
    for p, (name, feature) in enumerate(zip(heads.row_names, features, strict=True)):
        own = heads.plain(name)(feature)
        summed = own if summed is None else own + 0.5 * summed
        confidence = summed.softmax(-1).amax(-1).numpy()
        np.testing.assert_allclose(record.confidence("max_probability")[p], confidence, atol=1e-5)


@pytest.mark.parametrize("source", ["search", "fixed"])
@pytest.mark.parametrize("method", ["boosted", "probe", "dyce"])
def test_infer_leaves_where_the_record_says(
    finished: tuple[Study, list[ReportRow]],
    method: str,
    source: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    study, _ = finished
    (tmp_path / "tiny_study").symlink_to(study.directory)
    same = load_study(
        TINY,
        [
            f"runs_dir={tmp_path}",
            "report.mlflow=false",
            "dyce.num_warm_up_epochs=1",
            f"train.method={method}",
            "seed=[0, 3]",
            f"infer.source={source}",
            "infer.batch_size=37",
        ],
    )
    run_stage("report", same.points)  # this method's rows alone
    run_infer(same.points)
    assert "0 other differences" in capsys.readouterr().out
    run_stage("report", study.points)


def test_search_over_gate_outputs_end_to_end(
    finished: tuple[Study, list[ReportRow]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, before = finished
    overrides = ("jei_dnn.ce_ic_tradeoff=[0.1, 1]", "seed=[0, 3]", "infer.source=search", "infer.batch_size=37")
    (tmp_path / "tiny_study").symlink_to(study.directory)
    gated, rows = done(tmp_path, *overrides, "search.confidence=gate")
    trained = {point.id for point in study.points if point.config.train.method == "jei_dnn"}
    assert {point.id for point in gated.points} == trained  # searched again, not trained again
    point = gated.points[1]
    record = Record.open(RunDir(point, "record") / "validation")
    costs = ExitCosts.from_json(RunDir(point, "record").read_json("costs.json"))
    assert record.gate is not None
    entries = RunDir(point, "search").read_json("configurations.json")
    for entry in entries:
        exit_N = np.full(record.num_samples, len(costs.positions))
        macs_N = np.full(record.num_samples, float(costs.full_macs))
        passed = 0
        inside = np.ones(record.num_samples, bool)
        for p, (head, threshold) in enumerate(entry["exits"]):
            if head < 0:
                continue
            passed += costs.head_macs[p][0] + costs.gate_macs[p]
            leaves = inside & (record.gate[p] > np.float32(threshold))
            exit_N[leaves], macs_N[leaves] = p, costs.backbone_macs[p] + passed
            inside &= ~leaves
        macs_N[inside] += passed
        assert entry["validation"]["macs"] == pytest.approx(macs_N.mean())
        assert entry["validation"]["accuracy"] == pytest.approx(
            record.correct_RN[exit_N, np.arange(len(exit_N))].mean()
        )
    run_infer(gated.points)
    assert "0 other differences" in capsys.readouterr().out
    changed = {row.configuration for row in rows if row.source == "search"}
    assert changed != {row.configuration for row in before if row.source == "search" and row.method == "jei_dnn"}
