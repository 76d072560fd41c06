"""A whole small study of which part of validation is kept from the search."""

import csv
from pathlib import Path

import pytest

from dynexit.record.shards import Record
from dynexit.search.operating_points import read_csv
from dynexit.study.read import load_study
from launch.__main__ import main as run
from tests.command_line import TINY

pytestmark = pytest.mark.slow


def test_what_is_held_back_chooses_nothing_and_calibrates(tmp_path: Path) -> None:
    keys = (f"runs_dir={tmp_path}", "report.mlflow=false", "seed=0", "jei_dnn.ce_ic_tradeoff=0.1")
    keys = (*keys, "data.num_validation=100", "data.num_evaluation_views=2", "search.calibration_share=0.25")
    assert run(["run", str(TINY), *keys]) == 0
    report = tmp_path / "tiny_study" / "report"
    (point,) = load_study(TINY, keys).points
    record = Record.open(tmp_path / "tiny_study" / "record" / point.ids["record"] / "validation")
    assert record.num_samples == 200
    assert record.layout.topk == 10  # all classes, as there are few
    for row in read_csv(report / "operating_points.csv"):
        if row.split == "validation":  # right on a whole number of the 150 samples that chose
            assert 150 * row.accuracy == pytest.approx(round(150 * row.accuracy), abs=1e-9), row.source
            assert sum(150 * share % 1 > 1e-6 and 150 * share % 1 < 1 - 1e-6 for share in row.exit_fractions) == 0
    with (report / "uncertainty.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert {row["variant"] for row in found} == {"", "general", "gated_all", "gated_strict", "gated"}
    assert {"temperature", "ece_quantile", "ece_width", "ece_width_scaled"} < {row["name"] for row in found}
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "Calibration and prediction sets" in page
    assert "What calibrates is the share of validation, 25 %," in page
