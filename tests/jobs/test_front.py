"""Judgements of a study's operating points by its records, and the commands that its page offers."""

import csv
import html
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from dynexit.jobs.reporting.rows import collect_rows
from dynexit.report.judged.outcomes import Outcomes, judge
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
    rows = collect_rows(points)
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
    assert "dynexit: 1 images by macs-" in dynexit(folder, *predict).stderr
    out = dynexit(folder, *infer).stdout
    assert "0 other differences" in out
