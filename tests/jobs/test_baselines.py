"""Baselines through the jobs: what static networks and cascades are worth, beside a study that never chooses them."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dynexit.baselines.comparison import compare
from dynexit.baselines.rows import baselines_of, judge_baselines
from dynexit.core.cost import ExitCosts
from dynexit.core.statistics import mean_interval, verdict
from dynexit.core.tradeoff import Configuration, apply_configuration
from dynexit.errors import Failure
from dynexit.jobs.finished import report_is_done
from dynexit.jobs.planning.missing import missing_jobs
from dynexit.jobs.save import run_save
from dynexit.record.shards import Record
from dynexit.run_dir import RunDir
from dynexit.search.operating_points import BASELINES, ReportRow, read_csv
from dynexit.search.problem import Problem
from dynexit.study.baselines import network_name
from dynexit.study.grid import Point, Study
from dynexit.study.read import load_study
from tests.command_line import TINY, do_all_jobs, run_stage

pytestmark = pytest.mark.slow

SMALL, LARGE = "{channels: [4, 5, 6, 7]}", "{channels: [8, 10, 12, 14]}"  # the latter is larger than the backbone


def tiny(folder: Path, *overrides: str, static: str = f"[{SMALL}, {LARGE}]") -> Study:
    quick = ("report.mlflow=false", "dist.checkpoint_seconds=1000", "train.method=probe", "probe.max_iterations=5")
    own = ("seed=0", "sweep.jei_dnn.ce_ic_tradeoff=[1]", "prepare.num_epochs=2", "exits.reader=average_max_std")
    more = (
        "baselines.cascade=true",
        "baselines.one_threshold=true",
        "search.relative_macs=[0.7, 0.9]",
        "data.num_evaluation_views=2",
    )
    return load_study(TINY, [f"runs_dir={folder}", *quick, *own, *more, f"baselines.static={static}", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[ReportRow]]:
    study = tiny(tmp_path_factory.mktemp("baselines"))
    do_all_jobs(study)
    return study, read_csv(study.directory / "report" / "operating_points.csv")


def record_of(point: Point, split: str) -> tuple[Record, ExitCosts]:
    source = RunDir(point, "record")
    return Record.open(source / split), ExitCosts.from_json(source.read_json("costs.json"))


def test_a_static_network_has_its_own_and_the_studys_heads(finished: tuple[Study, list[ReportRow]]) -> None:
    study, rows = finished
    full_macs = record_of(study.static[-1], "test")[1].full_macs
    for split in ("validation", "test"):
        found = {(r.method, r.configuration): r for r in rows if r.source == "static" and r.split == split}
        assert len(found) == 5  # the backbone's own classifier is a row of its own
        for point in study.static:
            record, costs = record_of(point, split)
            assert record.positions == (3,)
            macs = {"own classifier": costs.full_macs}
            macs["linear on average_max_std"] = costs.backbone_macs[0] + costs.head_macs[0][0]
            for method, place in (("own classifier", -1), ("linear on average_max_std", 0)):
                row = found.get((method, json.dumps([[network_name(point), None]])))
                if row is None:
                    assert (method, network_name(point)) == ("own classifier", "backbone")
                    continue
                assert row.accuracy == record.correct_RN[place].mean()
                assert (row.macs, row.relative_macs) == (macs[method], macs[method] / full_macs)
                assert row.exit_fractions == (1.0,)
    assert max(row.relative_macs for row in rows if row.source == "static") > 1


def test_cascades_run_networks_in_order_of_their_macs(finished: tuple[Study, list[ReportRow]]) -> None:
    study, _ = finished
    by_name = {network_name(point): point for point in study.static}
    full_macs = record_of(study.static[-1], "test")[1].full_macs
    cascades = [one for one in baselines_of(study.points) if one.test.source == "cascade"]
    assert {one.head for one in cascades} == {"own classifier", "linear"}
    for one in cascades:
        place = -1 if one.head == "own classifier" else 0
        networks = [(by_name[name], threshold) for name, threshold in json.loads(one.test.configuration)]
        for row in (one.validation, one.test):
            right, paid, before = [], [], 0
            outputs = []
            for point, threshold in networks:
                record, costs = record_of(point, row.split)
                macs = costs.full_macs if place else costs.backbone_macs[0] + costs.head_macs[0][0]
                outputs.append((record.correct_RN[place], record.probability()[place], macs, threshold))
                assert macs > before
                before = macs
            for sample in range(len(outputs[0][0])):
                macs_so_far = 0
                for correct_N, probability_N, macs, threshold in outputs:
                    macs_so_far += macs
                    if threshold is None or probability_N[sample] > np.float32(threshold):
                        right.append(correct_N[sample])
                        paid.append(macs_so_far)
                        break
            assert row.accuracy == np.mean(right)
            assert row.macs == pytest.approx(np.mean(paid))
            assert row.relative_macs == pytest.approx(np.mean(paid) / full_macs)
        assert one.correct("test").tolist() == right


def test_one_threshold_is_the_same_at_every_exit(finished: tuple[Study, list[ReportRow]]) -> None:
    study, rows = finished
    baselines = [one for one in baselines_of(study.points) if one.test.source == "one_threshold"]
    assert baselines
    assert sum(row.source == "one_threshold" for row in rows) == 2 * len(baselines)
    for one in baselines:
        ((point,),) = [[p for p in study.points if p.id == one.test.point_id]]
        exits = json.loads(one.test.configuration)
        assert (one.test.method, {head for head, _ in exits}) == ("probe, linear", {0})
        ((_, threshold), *others) = exits
        assert {each for _, each in others} == {threshold}
        for row in (one.validation, one.test):
            record, costs = record_of(point, row.split)
            right, paid = record.correct_RN[-1].copy(), np.full(record.num_samples, costs.full_macs)
            heads = np.cumsum([macs for (macs,) in costs.head_macs])
            paid += heads[-1]
            for place in reversed(range(len(costs.positions))):
                leaves = record.probability()[place] > np.float32(threshold)
                right[leaves] = record.correct_RN[place][leaves]
                paid[leaves] = costs.backbone_macs[place] + heads[place]
            assert (row.accuracy, row.macs) == (np.mean(right), pytest.approx(np.mean(paid)))
        assert one.correct("test").tolist() == right.tolist()
    best = [(-one.validation.macs, one.validation.accuracy) for one in baselines]
    assert sorted(best) == sorted(best, key=lambda each: -each[1])  # none is beaten by another


def test_the_study_chooses_no_baseline(finished: tuple[Study, list[ReportRow]], tmp_path: Path) -> None:
    study, rows = finished
    assert {row.source for row in rows if row.on_front} <= {"backbone", "search", "fixed"}
    saved = run_save(study.points, tmp_path / "saved")
    assert {point.source for point in saved} <= {"backbone", "search", "fixed"}
    plain = tiny(study.directory.parent, "baselines.cascade=false", "baselines.one_threshold=false", static="[]")
    run_stage("report", plain.points)
    ours = [row for row in rows if row.source not in BASELINES]
    assert read_csv(study.directory / "report" / "operating_points.csv") == ours
    assert not (study.directory / "report" / "baselines.csv").exists()
    assert not report_is_done(study.points)
    assert not report_is_done(tiny(study.directory.parent, "baselines.cascade=false", static="[]").points)
    run_stage("report", study.points)
    assert report_is_done(study.points)
    assert read_csv(study.directory / "report" / "operating_points.csv") == rows


def test_the_comparison_is_paired_and_chosen_on_validation(finished: tuple[Study, list[ReportRow]]) -> None:
    study, rows = finished
    with (study.directory / "report" / "baselines.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    ours = [row for row in rows if row.source not in BASELINES and row.split == "validation"]
    tests = {row.key: row for row in rows if row.split == "test"}
    baselines = {
        (one.test.method, one.test.accuracy, one.test.relative_macs): one for one in baselines_of(study.points)
    }
    assert {line["source"] for line in table} == set(BASELINES)
    for one in compare(study.points, [row for row in rows if row.source == "backbone"], baselines_of(study.points)):
        is_cheaper = (one.budget or one.baseline.validation.relative_macs) < 1
        assert (one.ours is None) == is_cheaper == (one.verdict == "none as cheap")
    for line in table:
        one = baselines[line["classifier"], float(line["accuracy"]), float(line["relative_macs"])]
        most = float(line["budget"]) if line["budget"] else one.validation.relative_macs
        assert one.validation.relative_macs <= most
        within = [row for row in ours if row.relative_macs <= most]
        best = max(within, key=lambda row: (row.accuracy, -row.relative_macs))
        assert float(line["our_accuracy"]) == tests[best.key].accuracy
        difference = float(line["difference"])
        assert difference == pytest.approx(tests[best.key].accuracy - one.test.accuracy)
        low, high = float(line["low"]), float(line["high"])
        assert low <= difference <= high
        if line["our_configuration"]:
            record, costs = record_of(study.points[0], "test")
            problem = Problem.from_record(record, costs)
            arrays = problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N
            ours_N = apply_configuration(Configuration.from_json(json.loads(line["our_configuration"])), *arrays)[1]
            paired = mean_interval(ours_N.astype(int) - one.correct("test"), np.arange(len(ours_N)) % 160)
            assert (paired.low, paired.high, verdict(paired)) == (low, high, line["verdict"])
    page = (study.directory / "report" / "report.html").read_text(encoding="utf-8")
    assert "Against baselines" in page
    assert "cascade within 0.9" in page.replace("\N{NO-BREAK SPACE}", " ")


def test_intervals_of_baselines_are_of_their_own_rows(finished: tuple[Study, list[ReportRow]]) -> None:
    study, rows = finished
    base = {row.split: row.accuracy for row in rows if row.source == "backbone"}
    baselines = baselines_of(study.points)
    judged = judge_baselines(baselines, {one.test.key for one in baselines})
    assert len(judged) == 2 * len(baselines)
    for one in baselines:
        for row in (one.validation, one.test):
            found = judged[row.key, row.split]
            assert found.accuracy.value == pytest.approx(row.accuracy, abs=1e-12)
            assert found.accuracy.low < row.accuracy < found.accuracy.high or row.accuracy == 1
            assert found.difference.value == pytest.approx(row.accuracy - base[row.split], abs=1e-12)
    page = (study.directory / "report" / "report.html").read_text(encoding="utf-8")
    chart = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    kinds = {chart["series"][point["series"]]["kind"]: point for point in chart["points"]}
    for kind in BASELINES:
        assert re.fullmatch(
            r"[\d.]+ % \([\d.]+ to [\d.]+\)", kinds[kind]["test"]["text"].replace("\N{NO-BREAK SPACE}", " ")
        )
        assert kinds[kind]["verdict"]


def test_only_what_is_missing_of_baselines_is_done(finished: tuple[Study, list[ReportRow]], tmp_path: Path) -> None:
    study, _ = finished
    assert not any(missing_jobs(study, stage) for stage in ("prepare", "train", "record", "search"))
    more = tiny(study.directory.parent, static=f"[{SMALL}, {LARGE}, {{channels: [3, 4, 5, 6]}}]")
    for stage in ("prepare", "train", "record"):
        (job,) = missing_jobs(more, stage)
        assert [point.label for point in job.points] == ["static={channels: [3, 4, 5, 6]}"]
    (job,) = missing_jobs(more, "search")  # the cascades of all; the points of the study stay
    assert job.points == more.static
    with pytest.raises(Failure, match=r"static network \w+ is not recorded, and static={channels: \[4, 5, 6, 7\]} is"):
        run_stage("search", job.points)
    copy = tmp_path / study.directory.name
    shutil.copytree(study.directory, copy)
    lost = study.at(copy)
    shutil.rmtree(RunDir(lost.static[0], "search").path)
    run_stage("report", lost.points)
    assert "static={channels: [4, 5, 6, 7]}: search is not done" in (copy / "report" / "report.html").read_text()
