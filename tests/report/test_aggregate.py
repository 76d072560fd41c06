import random
import re
from dataclasses import replace

import numpy as np
import pytest

from dynexit.errors import Failure
from dynexit.report.table import (
    Row,
    at_tenths,
    backbone_accuracy,
    front_of,
    mark_front,
    read_csv,
    summary,
    within_budgets,
    write_csv,
)
from tests.report.synthetic_rows import synthetic_rows

ROWS = synthetic_rows(tradeoffs=(0.1, 1.0, 5.0), accuracy_weights=(0.5, 0.7, 0.8, 0.9, 0.95))


def row(relative_macs=0.5, accuracy=0.9, split="validation", source="search", **fields):
    values = {"method": "jei_dnn", "seed": 0, "ce_ic_tradeoff": 1.0, "accuracy_weight": None, "point_id": "p", **fields}
    return Row(source, values.pop("method"), values.pop("seed"), values.pop("ce_ic_tradeoff"),
               values.pop("accuracy_weight"), split, accuracy, 100 * relative_macs, relative_macs,
               (0.25, 0.75), **values)  # fmt: skip


def pair(validation, test, **fields):
    """One operating point: its (relative MACs, accuracy) on both splits."""
    return [row(*validation, "validation", **fields), row(*test, "test", **fields)]


def test_the_file_is_the_documented_table(tmp_path):
    rows = [
        row(0.5, 0.9, source="gates"),
        row(1.0, 0.95, source="backbone", method="backbone", seed=None, ce_ic_tradeoff=None, point_id="b"),
        row(0.1 + 0.2, 0.8, "test", accuracy_weight=0.5, configuration='[[0,0.5],[-1,0.0]]', on_front=True),
    ]  # fmt: skip
    write_csv(tmp_path / "t.csv", rows)
    assert (tmp_path / "t.csv").read_text() == (
        "source,method,seed,ce_ic_tradeoff,accuracy_weight,split,accuracy,macs,relative_macs,exit_0,exit_1,"
        "on_front,point_id,configuration,budget\n"
        "backbone,backbone,,,,validation,0.95,100.0,1.0,0.25,0.75,false,b,,\n"
        "gates,jei_dnn,0,1.0,,validation,0.9,50.0,0.5,0.25,0.75,false,p,,\n"
        "search,jei_dnn,0,1.0,0.5,test,0.8,30.000000000000004,0.30000000000000004,0.25,0.75,true,p,"
        '"[[0,0.5],[-1,0.0]]",\n'
    )


def test_reading_gives_the_same_bits_and_order_does_not_matter(tmp_path):
    shuffled = list(ROWS)
    random.Random(3).shuffle(shuffled)
    write_csv(tmp_path / "a.csv", ROWS)
    write_csv(tmp_path / "b.csv", shuffled)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    read = read_csv(tmp_path / "a.csv")
    assert len(read) == len(ROWS)
    assert set(read) == set(ROWS)
    write_csv(tmp_path / "c.csv", read)
    assert (tmp_path / "c.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()


def test_numpy_numbers_are_written_as_numbers(tmp_path):
    plain = row(0.5, 0.1, seed=3)
    write_csv(tmp_path / "a.csv", [plain])
    arrays = replace(
        plain,
        accuracy=np.float64(0.1),
        seed=np.int64(3),
        on_front=np.bool_(False),
        exit_fractions=np.array([0.25, 0.75]),
    )
    write_csv(tmp_path / "b.csv", [arrays])
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_points_with_fewer_exits_leave_the_last_columns_empty(tmp_path):
    rows = [replace(row(point_id=str(num)), exit_fractions=(1 / num,) * num) for num in (2, 5, 3)]
    write_csv(tmp_path / "t.csv", rows)
    assert {len(read.exit_fractions) for read in read_csv(tmp_path / "t.csv")} == {2, 3, 5}
    assert set(read_csv(tmp_path / "t.csv")) == set(rows)


def test_no_rows_are_a_table_too(tmp_path):
    write_csv(tmp_path / "t.csv", [])
    assert read_csv(tmp_path / "t.csv") == []


@pytest.mark.parametrize(
    "change", [{"accuracy": float("nan")}, {"macs": float("inf")}, {"source": "magic"}, {"split": "train"}]
)
def test_nonsense_is_not_written(tmp_path, change):
    with pytest.raises(ValueError):
        write_csv(tmp_path / "t.csv", [replace(row(), **change)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("source,", "sauce,", 1),
        ("0.9,", "0.9.1,", 2),
        ("false", "maybe", 2),
        ("search,", "search,,", 2),
        ("0.9,", "", 2),
    ],
)
def test_a_damaged_table_is_refused_by_name_and_line(tmp_path, old, new, line):
    path = tmp_path / "report" / "t.csv"
    write_csv(path, [row(0.5, 0.9)])
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(Failure, match=re.escape(f"{path} is damaged in line {line} (")) as failure:
        read_csv(path)
    assert "mv " in str(failure.value)


def test_an_empty_file_is_damaged(tmp_path):
    (tmp_path / "t.csv").write_text("")
    with pytest.raises(Failure, match=r"t\.csv is damaged in line 0"):
        read_csv(tmp_path / "t.csv")


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


def test_a_study_without_backbone_or_test_rows_has_a_summary():
    assert summary([]).front == ()
    only = summary([row()])
    assert (only.backbone_accuracy, only.front, only.gates_span) == (None, (), None)
    assert np.isnan(front_of(pair((0.5, 0.9), (0.5, 0.9)))[0].accuracy_drop)
    two = [row(accuracy=a, split="test", source="backbone", point_id=str(a)) for a in (0.25, 0.75)]
    assert backbone_accuracy(two) == 0.5
