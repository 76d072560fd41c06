"""The file of operating points: columns, exact floats, and what is refused."""

import random
import re
from dataclasses import fields, replace

import numpy as np
import pytest

from dynexit.errors import Failure
from dynexit.search.operating_points import COLUMNS, ReportRow, read_csv, write_csv
from tests.report.synthetic_rows import row, synthetic_rows

ROWS = synthetic_rows(tradeoffs=(0.1, 1.0, 5.0), accuracy_weights=(0.5, 0.7, 0.8, 0.9, 0.95))


def test_the_file_is_the_documented_table(tmp_path):
    rows = [
        row(0.5, 0.9, source="gates"),
        row(1.0, 0.95, source="backbone", method="backbone", seed=None, ce_ic_tradeoff=None, point_id="b"),
        row(0.1 + 0.2, 0.8, "test", accuracy_weight=0.5, configuration='[[0,0.5],[-1,0.0]]', on_front=True),
    ]  # fmt: skip
    write_csv(tmp_path / "t.csv", rows)
    assert (tmp_path / "t.csv").read_text() == (
        "source,method,seed,ce_ic_tradeoff,accuracy_weight,split,accuracy,macs,relative_macs,exit_0,exit_1,"
        "on_front,point_id,search_id,configuration,budget\n"
        "backbone,backbone,,,,validation,0.95,100.0,1.0,0.25,0.75,false,b,,,\n"
        "gates,jei_dnn,0,1.0,,validation,0.9,50.0,0.5,0.25,0.75,false,p,,,\n"
        "search,jei_dnn,0,1.0,0.5,test,0.8,30.000000000000004,0.30000000000000004,0.25,0.75,true,p,,"
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
    "change", [{"accuracy": float("nan")}, {"macs": float("inf")}, {"source": "magic"}, {"split": "training"}]
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


def test_every_column_has_a_meaning():
    assert list(COLUMNS) == [field.name for field in fields(ReportRow)]


def test_rows_keep_their_order_where_asked_to(tmp_path):
    rows = [row(0.5, 0.9, "train", accuracy_weight=0.9), row(0.5, 0.8, "val", accuracy_weight=0.1)]
    write_csv(tmp_path / "t.csv", rows, sort=False)
    assert read_csv(tmp_path / "t.csv") == rows
    with pytest.raises(ValueError, match="known: "):
        write_csv(tmp_path / "t.csv", [rows[0], row(split="validation")])
