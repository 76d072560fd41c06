"""Judgements of a study's operating points by its records, and the commands that its page offers."""

import csv
import html
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from dynexit.errors import Failure
from dynexit.jobs.report import run_report
from dynexit.jobs.reporting.rows import collect_rows
from dynexit.record.shards import Record
from dynexit.report.judged.classes import classes_section
from dynexit.report.judged.exits import exits_section
from dynexit.report.judged.methods import compare_methods
from dynexit.report.judged.outcomes import Outcomes, judge
from dynexit.report.table import front_of
from dynexit.run_dir import RunDir
from dynexit.search.operating_points import ReportRow
from dynexit.study.grid import Point
from dynexit.study.read import load_study
from tests.command_line import TINY, dynexit

pytestmark = pytest.mark.slow
PLAIN = ("report.mlflow=false", "train.num_epochs=3", "search.calibration_share=0.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny study is done."""
    folder = tmp_path_factory.mktemp("front")
    dynexit(folder, "run", TINY, *PLAIN)
    return folder


def test_judgements_agree_with_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    points = load_study(TINY, list(PLAIN)).points
    rows = collect_rows(points, [])
    judged = judge(points, rows)
    assert {row.source for row in rows} == {"backbone", "gates", "search", "fixed"}
    base = {row.split: row.accuracy for row in rows if row.source == "backbone"}
    for row in rows:
        found = judged[row.key, row.split]
        assert found.accuracy.value == pytest.approx(row.accuracy, abs=1e-12)
        assert found.relative_macs.value == pytest.approx(row.relative_macs, abs=1e-12)
        assert found.difference.value == pytest.approx(row.accuracy - base[row.split], abs=1e-12)
    outcomes = Outcomes(points[0], "validation")
    assert len(np.unique(outcomes.origin_N)) == 120  # of 150 originals a fifth calibrates


def test_commands_of_the_page_run(folder: Path) -> None:
    report = folder / "runs/tiny_study/report"
    text = (report / "report.html").read_text()
    commands = [html.unescape(one) for one in re.findall(r'<code class="command">(.*?)</code>', text)]
    save, predict, infer = (shlex.split(one)[1:] for one in commands[:3])
    assert (save[0], predict[0], infer[0]) == ("save", "predict", "infer")
    said = dynexit(folder, *save).stdout
    assert said.splitlines()[0] == f"{save[2]}: 2 operating points"
    _, _, _, point, *_ = save[1:]
    with (report / "front.csv").open() as file:
        front = {row["point_id"]: row for row in csv.DictReader(file)}
    assert point in front
    images = Path(__file__).parents[2] / "configs"
    predict[predict.index("IMAGE_OR_FOLDER")] = str(images / "digits_pareto.png")
    assert "dynexit: 1 image by macs-" in dynexit(folder, *predict).stderr
    out = dynexit(folder, *infer).stdout
    assert "0 other differences" in out


def slow_exits(point: Point, row: ReportRow) -> tuple[list[int], list[int], list[bool]]:
    """The exit of every test sample, its label, and whether it is right there, sample by sample."""
    record = Record.open(RunDir(point, "record") / "test")
    predicted_RN, sure_RN, exits, right = record.prediction(), record.probability(), [], []
    for n in range(record.num_samples):
        way = enumerate(json.loads(row.configuration))
        ways = [place for place, (head, limit) in way if head >= 0 and sure_RN[place, n] > limit]
        exits.append(ways[0] if ways else len(predicted_RN) - 1)
        right.append(bool(predicted_RN[exits[-1], n] == record.label[n]))
    return exits, record.label.tolist(), right


def test_exits_and_classes_equal_loops(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder)
    points = load_study(TINY, list(PLAIN)).points
    front = [one.test for one in front_of(collect_rows(points, [])) if one.test.source == "search"]
    row = max(front, key=lambda one: sum(share > 0 for share in one.exit_fractions))
    point = next(one for one in points if one.ids["search"] == row.search_id)
    exits, labels, right = slow_exits(point, row)
    (section,) = exits_section(points, {"the point": row})
    assert section.remark.count("Here the point;") == 1
    enabled = [p for p, (head, _) in enumerate(json.loads(row.configuration)) if head >= 0]
    for exit_, cells in zip([*enabled, len(row.exit_fractions) - 1], section.table, strict=True):
        those = [right[n] for n, place in enumerate(exits) if place == exit_]
        assert cells["share leaving"] == f"{100 * len(those) / len(exits):.1f} %"
        shown = cells["accuracy of those"].replace("\xa0", " ").partition(" %")[0]
        assert shown == (f"{100 * sum(those) / len(those):.2f}" if those else "")
    names = ["<b>", "=1+1", "-2", *"3456789"]
    classes_section(point, "the point", row, names, tmp_path)
    with (tmp_path / "classes.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [one["name"] for one in table] == ["<b>", "'=1+1", "-2", *"3456789"]
    for label, one in enumerate(table):
        those = [right[n] for n, found in enumerate(labels) if found == label]
        assert int(one["images"]) == len(those)
        assert float(one["accuracy"]) == pytest.approx(sum(those) / len(those), abs=1e-12)


def test_methods_are_compared_seed_by_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    points = load_study(TINY, list(PLAIN)).points
    rows = collect_rows(points, [])
    found = compare_methods(points, rows, (0.5, 0.92, 0.95))
    base = {split: next(r.accuracy for r in rows if (r.source, r.split) == ("backbone", split)) for split in ("test",)}
    assert [one.budget for one in found] == [0.92, 0.95]  # nothing is as cheap as 0.5
    for one in found:
        assert [point.test.seed for point in one.points] == [0, 1]
        for point in one.points:
            own = [r for r in rows if (r.source, r.seed, r.split) == ("search", point.test.seed, "validation")]
            within = [r.accuracy for r in own if r.relative_macs <= one.budget]
            assert point.validation.accuracy == max(within)
        gains = [point.test.accuracy - base["test"] for point in one.points]
        assert one.against_backbone.value == pytest.approx(np.mean(gains), abs=1e-12)
        assert one.backbone_spread == pytest.approx((min(gains), max(gains)), abs=1e-12)
        assert one.against_backbone.low <= one.against_backbone.value <= one.against_backbone.high
        assert one.against_best is None


def test_points_without_a_record_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    points = load_study(TINY, list(PLAIN)).points
    first = points[0]
    shutil.rmtree(first.study_dir / "record" / first.ids["record"])
    run_report(points)
    page = (first.study_dir / "report" / "report.html").read_text()
    assert f"<strong>1 point is missing</strong>\n<ul><li>{first.label}: record is not done</li></ul>" in page
    run_report([points[1]])  # a study of one point
    text = (first.study_dir / "report" / "report.html").read_text()
    assert "is missing" not in text
    assert "<summary>The trained point</summary>" in text
    assert len(text) < 3_000_000
    shutil.rmtree(first.study_dir / "shards")
    with pytest.raises(Failure) as error:
        run_report(points[1:])
    wanted = f"nothing to report: no point is finished; {points[1].label}: its record is missing; run "
    assert str(error.value).startswith(wanted)
