"""Areas, classes, curves and downloads of the page on made-up figures, bad ones among them."""

import base64
import csv
import io
import re
from pathlib import Path

import markupsafe
import numpy as np
import pytest

from dynexit.contents import MetricsRow
from dynexit.core.tradeoff import hypervolume
from dynexit.deploy.predict import Prediction, Predictions
from dynexit.files import spreadsheet_text
from dynexit.report.judged.areas import NUM_RESAMPLES, hypervolume_section, intervals_of
from dynexit.report.judged.classes import ClassAnswers, class_table
from dynexit.report.judged.curves import Training, curves_section
from dynexit.report.page import Download, Page, PageSection, write_page
from tests.report.synthetic_rows import synthetic_rows

SLY = "</svg><script>alert(1)</script>"


def test_area_interval_equals_a_loop_over_resamples() -> None:
    random = np.random.default_rng(3)
    num_points, num_originals = 4, 30
    count_G = random.integers(1, 4, num_originals)
    correct_KG = random.binomial(count_G, np.linspace(0.5, 0.9, num_points)[:, None])
    macs_KG = count_G * random.uniform(0.2, 0.9, (num_points, num_originals))
    sums_K3G = np.stack([correct_KG, macs_KG, np.tile(count_G, (num_points, 1))], axis=1).astype(float)
    low, high = intervals_of({("search", "x"): sums_K3G})["search", "x"]
    draws = np.random.default_rng(0)
    areas = []
    for _ in range(NUM_RESAMPLES // 50):
        for drawn in draws.integers(0, num_originals, (50, num_originals)):
            total = sum(count_G[g] for g in drawn)
            accuracies = [sum(correct_KG[k, g] for g in drawn) / total for k in range(num_points)]
            costs = [sum(macs_KG[k, g] for g in drawn) / total for k in range(num_points)]
            areas.append(hypervolume(np.array(accuracies), np.array(costs)))
    assert (low, high) == pytest.approx(tuple(np.quantile(areas, [0.025, 0.975])), abs=1e-9)
    assert low < high


def test_areas_are_shown_with_their_limits() -> None:
    rows = synthetic_rows(tradeoffs=(0.1, 1.0), accuracy_weights=(0.5, 0.8))
    (section,) = hypervolume_section(rows, {("search", "jei_dnn"): (0.25, 0.75)})
    by_source = {cells["source"]: cells["all seeds together"] for cells in section.table}
    assert by_source["search"].endswith("(0.2500 to 0.7500)")
    assert "(" not in by_source["gates"]
    assert hypervolume_section([]) == []


def test_a_thousand_classes_are_counted() -> None:
    random = np.random.default_rng(0)
    label_N = random.permutation(np.arange(4000) % 1000)
    label_N[label_N == 7] = 8  # a class without images has no row
    correct_N, base_N = random.random((2, 4000)) < 0.8
    table = class_table(ClassAnswers(label_N, correct_N, base_N, random.random(4000), np.arange(4000)), None)
    assert [row["class"] for row in table] == [label for label in range(1000) if label != 7]
    for row in table[::100]:
        those = label_N == row["class"]
        assert row["images"] == those.sum()
        assert row["accuracy"] == pytest.approx(correct_N[those].mean())
        assert row["backbone_accuracy"] == pytest.approx(base_N[those].mean())


def test_curves_mark_the_kept_epoch_and_escape_labels() -> None:
    rows = [{"epoch": epoch, "exit_accuracy": [0.5, 0.6 + epoch / 50]} for epoch in range(5)]
    rows[3]["validation_accuracy"] = 0.7
    single, empty = Training("one epoch", rows[:1], 0), Training("none", [], None)
    (section,) = curves_section([Training(SLY, rows, 3), single, empty])
    (drawing,) = section.drawings
    assert isinstance(drawing, markupsafe.Markup)
    assert "kept: 3" in drawing
    assert "<script" not in drawing
    assert drawing.count('class="exit"') == 2
    assert curves_section([]) == []
    equal = [{"epoch": epoch, "exit_accuracy": [1.0]} for epoch in range(2)]
    assert "nan" not in curves_section([Training("equal", equal, None)])[0].drawings[0]


def test_losses_are_curves_of_their_own() -> None:
    rows: list[MetricsRow] = [
        {"epoch": epoch, "exit_accuracy": [0.5], "train_head_loss": 100 / 10**epoch} for epoch in range(3)
    ]
    rows[1]["train_gate_loss"] = 0.3
    (drawing,) = curves_section([Training("one", rows, 1)])[0].drawings
    accuracies, losses = drawing.split("</svg>")[:2]
    assert "loss" not in accuracies
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", losses)
    assert {"head loss", "gate loss", "100", "10", "1"} <= set(texts)
    (line,) = [path for path in re.findall(r'd="M([^"]*)"', losses) if path.count("L") == 2]
    places = [[float(part) for part in place.split()] for place in line.split("L")]
    assert places[1] == pytest.approx(np.mean([places[0], places[2]], axis=0), abs=0.11)  # a factor of ten each
    assert losses.count("<circle") == 1  # of a term that one epoch has
    assert losses.count('class="kept"') == 1
    (plain,) = curves_section([Training("one", [{**row, "train_head_loss": -1.0} for row in rows], 1)])[0].drawings
    assert "nan" not in plain


def test_small_files_are_in_the_page_and_others_linked(tmp_path: Path) -> None:
    (tmp_path / "front.csv").write_text("a,b\n")
    (tmp_path / "large & odd.csv").write_text("c\n")
    files = [Download(tmp_path / "front.csv", SLY, embedded=True), Download(tmp_path / "large & odd.csv", "all")]
    write_page(tmp_path / "report.html", Page("x", [], downloads=files))
    html = (tmp_path / "report.html").read_text()
    encoded = base64.b64encode(b"a,b\n").decode()
    assert f"data:text/csv;base64,{encoded}" in html
    assert 'href="large%20%26%20odd.csv" download="large &amp; odd.csv"' in html
    assert "<script" not in html


def test_missing_points_are_a_banner_below_the_verdict(tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", Page("x", [], missing=[SLY, *(f"point {n}" for n in range(9))]))
    html = (tmp_path / "report.html").read_text()
    assert html.index('class="headline"') < html.index("10 points are missing") < html.index("<h2>The front")
    assert "the other 5" in html
    assert "<script" not in html


def test_folded_tables_and_policy_by_hash(tmp_path: Path) -> None:
    section = PageSection("x", "y", [{"a": 1}], folded=[(SLY, [{"b": "no"}])])
    write_page(tmp_path / "report.html", Page("x", [], sections=[section]))
    html = (tmp_path / "report.html").read_text()
    assert html.count('<details class="folded">') == 1
    assert "unsafe" not in html
    assert "style=" not in html


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("=1+1", "'=1+1"), ("@x", "'@x"), ("+a", "'+a"), ("-a", "'-a"), ("\tx", "'\tx"), ("-1.5e3", "-1.5e3"),
     (-1.5, -1.5),
     ("a=b", "a=b"), ("", ""), (None, None)],
)  # fmt: skip
def test_formulas_are_text_and_numbers_stay(value: object, wanted: object) -> None:
    assert spreadsheet_text(value) == wanted


def test_predictions_hold_no_formula() -> None:
    file = io.StringIO()
    Predictions((Prediction("a.png", "=cmd()", 0, 0.5, 1, 10),), {}).write_csv(file)
    assert list(csv.reader(io.StringIO(file.getvalue())))[1] == ["a.png", "'=cmd()", "0.500000", "1", "10"]
