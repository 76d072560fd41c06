import re
from dataclasses import replace

import numpy as np
import pytest

from dynexit.errors import UserError
from dynexit.jobs import aggregate
from dynexit.jobs.aggregate import Aggregate, study_folders
from dynexit.jobs.infer import choose
from dynexit.report.budgets import budget_cells
from dynexit.report.table import at_tenths, backbone_accuracy, front_of, mark_front, summary, within_budgets
from dynexit.search.operating_points import BASELINES, RowTime
from dynexit.study.outcomes import InferSettings
from tests.report.synthetic_rows import row, synthetic_rows

ROWS = synthetic_rows(tradeoffs=(0.1, 1.0, 5.0), accuracy_weights=(0.5, 0.7, 0.8, 0.9, 0.95))


def pair(validation, test, **fields):
    """One operating point: its (relative MACs, accuracy) on both splits."""
    return [row(*validation, "validation", **fields), row(*test, "test", **fields)]


def test_the_front_is_what_no_other_point_beats_on_validation():
    validation = [one for one in ROWS if one.split == "validation"]
    for one in validation:
        beaten = any(
            other.accuracy >= one.accuracy
            and other.relative_macs <= one.relative_macs
            and (other.accuracy, other.relative_macs) != (one.accuracy, one.relative_macs)
            for other in validation
        )
        assert one.on_front != beaten
    chosen = {one.key for one in validation if one.on_front}
    assert {one.key for one in ROWS if one.split == "test" and one.on_front} == chosen


def test_test_values_do_not_choose():
    worse = [replace(one, accuracy=0.0, relative_macs=9.0) if one.split == "test" else one for one in ROWS]
    assert [one.on_front for one in mark_front(worse)] == [one.on_front for one in ROWS]


def test_equal_points_stay_both_and_lonely_test_rows_are_off_the_front():
    rows = [*pair((0.5, 0.9), (0.5, 0.8), accuracy_weight=0.5), *pair((0.5, 0.9), (0.5, 0.8), accuracy_weight=0.6)]
    rows.append(row(0.1, 1.0, "test", point_id="lonely"))
    assert [one.on_front for one in mark_front(rows)] == [True, True, True, True, False]
    assert len(front_of(rows)) == 1
    assert mark_front([]) == []


def test_within_a_budget_the_best_on_validation_is_taken():
    front = front_of(ROWS)
    validation = [one for one in ROWS if one.split == "validation"]
    for budget in np.linspace(0.1, 1.2, 50):
        accuracies = [one.accuracy for one in validation if one.relative_macs <= budget]
        taken = within_budgets(front, [budget])
        assert [point.validation.accuracy for point in taken] == ([max(accuracies)] if accuracies else [])
    assert within_budgets(front, [2, 3, 4]) == front[-1:]
    assert at_tenths([]) == []
    assert at_tenths(front)[0] == front[0]
    assert len(at_tenths(front)) <= 11


def test_summary_by_hand():
    rows = [
        *pair((1.0, 0.99), (1.0, 0.98), source="backbone", method="backbone", seed=None),
        *pair((0.5, 0.90), (0.6, 0.80), source="gates", point_id="a", seed=0),
        *pair((0.3, 0.95), (0.2, 0.60), source="gates", point_id="b", seed=1),
        *pair((0.4, 0.97), (0.5, 0.96), accuracy_weight=0.9),
    ]
    read = summary(rows)
    assert read.backbone_accuracy == 0.98
    assert [point.test.relative_macs for point in read.front] == [0.2, 0.5, 1.0]
    assert [point.accuracy_drop for point in read.front] == pytest.approx([0.38, 0.02, 0.0])
    assert read.gates_span == (0.2, 0.6)
    gates, search = read.hypervolumes
    # on validation gate a is beaten by gate b, so only b counts when both stand together
    assert (gates.source, gates.all_seeds) == ("gates", pytest.approx(0.6 * 0.8))
    assert gates.per_seed == pytest.approx((0.8 * 0.4, 0.6 * 0.8))
    assert (search.method, search.all_seeds) == ("jei_dnn", pytest.approx(0.96 * 0.5))


def test_lines_of_files_outside_the_folder_are_not_shown(tmp_path):
    (tmp_path / "secret").write_text("password: 12345\n")
    study = tmp_path / "runs" / "study"
    study.mkdir(parents=True)
    (study / "study.yaml").symlink_to(tmp_path / "secret")
    for given in (tmp_path / "runs", study):
        with pytest.raises(UserError, match=rf"study\.yaml is a link to a file outside {given}; remove it or copy"):
            study_folders([given])
    assert study_folders([tmp_path]) == [study]


def test_baselines_are_never_chosen():
    better = [
        one
        for source in BASELINES
        for one in pair((0.05, 0.999), (0.05, 0.999), source=source, method="own classifier", seed=None, budget="")
    ]
    assert mark_front([*ROWS, *better])[: len(ROWS)] == ROWS
    assert not any(one.on_front for one in mark_front([*ROWS, *better])[len(ROWS) :])
    assert front_of([*ROWS, *better]) == front_of(ROWS)
    assert summary([*ROWS, *better]) == summary(ROWS)
    assert budget_cells([*ROWS, *better], {}, str) == budget_cells(ROWS, {}, str)
    for budget in (None, 0.3):
        settings = InferSettings(relative_macs=budget)
        assert choose([*better, *ROWS], settings) == choose(ROWS, settings)


def test_infer_keeps_within_a_budget_of_time():
    times = {one.key: (RowTime(1, 2 * one.relative_macs, 0.5), RowTime(8, 9.0, 0.9)) for one in ROWS}
    timed = [replace(one, times=times[one.key]) for one in ROWS]
    own = [one for one in timed if one.split == "validation" and one.source != "backbone"]
    for most in (0.5, 1.0, 1.5):
        found = choose(timed, InferSettings(latency_ms=most))
        assert found.accuracy == max(one.accuracy for one in own if one.times[0].latency_ms <= most)
    assert choose(timed, InferSettings(latency_ms=9.0, latency_batch_size=8)).accuracy == max(o.accuracy for o in own)
    for rows, settings, message in (
        (ROWS, {}, "infer.latency_ms: no time was measured; set search.latency=measured, and run the study again"),
        (
            timed,
            {"latency_batch_size": 3},
            "infer.latency_batch_size = 3: measured are 1, 8; name one, or add it to bench",
        ),
        (timed, {}, "infer.latency_ms = 0.001: no operating point is within it; the nearest has "),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            choose(rows, InferSettings(latency_ms=0.001, **settings))


def test_studies_of_other_data_have_no_common_front(tmp_path, monkeypatch):
    other = [replace(one, accuracy=0.8 * one.accuracy, point_id=f"o{one.point_id}") for one in ROWS]
    lines, draw = [], aggregate.pareto_figure
    monkeypatch.setattr(
        aggregate, "pareto_figure", lambda rows, *_, **more: lines.append(rows) or draw(rows, *_, **more)
    )
    Aggregate({"runs/a": ROWS, "runs/b": other}, {"runs/a": 6, "runs/b": 6}).write(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "2 studies of different backbones or data. Fronts of different data cannot be compared" in html
    for absent in ("this study reaches", 'class="tiles"', "<h2>The front", "Brackets", "brackets", "front.csv has"):
        assert absent not in html
    assert not any(one.source == "backbone" for rows in lines for one in rows)
    for study, rows in (("a", ROWS), ("b", other)):
        base = backbone_accuracy(rows)
        (best,) = within_budgets(front_of(rows), [0.5])
        line = re.search(rf'<td data-label="study">{study}</td>.*?</tr>', html, re.DOTALL)[0]
        change = f"{100 * (best.test.accuracy - base):+.2f}".replace("-", "−")
        cells = re.findall(r">([^<>]*%[^<>]*)<", line)
        assert cells[0] == f"{100 * base:.2f} %"
        assert f"{100 * best.test.accuracy:.2f} % ({change})" in cells


def test_studies_of_one_backbone_share_a_front(tmp_path):
    probes = [replace(one, method="probe", point_id=f"p{one.point_id}") for one in ROWS if one.source != "backbone"]
    probes += [one for one in ROWS if one.source == "backbone"]
    Aggregate({"runs/a": ROWS, "runs/b": probes}, {"runs/a": 6, "runs/b": 6}).write(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "this study reaches" in html
    assert "<h2>The front" in html
    for absent in ("Brackets", "brackets", "front.csv has", "cannot be compared: look"):
        assert absent not in html


def test_a_study_without_backbone_or_test_rows_has_a_summary():
    assert summary([]).front == ()
    only = summary([row()])
    assert (only.backbone_accuracy, only.front, only.gates_span) == (None, (), None)
    assert np.isnan(front_of(pair((0.5, 0.9), (0.5, 0.9)))[0].accuracy_drop)
    two = [row(accuracy=a, split="test", source="backbone", point_id=str(a)) for a in (0.25, 0.75)]
    assert backbone_accuracy(two) == 0.5
