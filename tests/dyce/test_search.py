"""The drop-in for DyCE's `search_and_eval`: its arguments, its files, its columns, and where it must differ."""

import ast
import copy
import csv
import json
import warnings

import numpy as np
import pytest

from dynexit.errors import UserError
from dynexit.search import search_and_eval
from dynexit.search.problem import Problem
from tests.reference import exit_search
from tests.reference.exit_problems import random_problem
from tests.search.recorded import macs_info, write_json, write_npz

# as published: the index comes first, without a name
HEADER = (
    ",relative_macs,raw_macs,relative_acc,raw_acc,relative_macs_tr,raw_macs_tr,relative_acc_tr,raw_acc_tr,"
    "config,exit_ratio,lambda"
)


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    whole = random_problem(np.random.default_rng(0), 500, 3, 2)
    parts = {"train": slice(0, 300), "val": slice(300, 500)}
    return {
        name: Problem(
            whole.correct_PHN[..., part], whole.confidence_PHN[..., part], whole.base_correct_N[part], whole.costs
        )
        for name, part in parts.items()
    }


@pytest.fixture
def arguments(problems, tmp_path) -> dict:
    return {
        "sim_index": "dyce_resnet50",
        "macs_info": macs_info(problems["train"]),
        "train_record_path": str(write_npz(tmp_path / "train.npz", problems["train"])),
        "val_record_path": str(write_npz(tmp_path / "val.npz", problems["val"])),
        "search_range": [0.5, 1.0],
        "save_dir": f"{tmp_path}/sim_results/",
    }


def read(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_files_columns_and_figures_are_as_published(arguments, problems, tmp_path):
    search_and_eval(**arguments, search_step=0.1)
    path = tmp_path / "sim_results" / "unfiltered" / "dyce_resnet50_onepass.csv"
    assert path.read_text().splitlines()[0] == HEADER
    rows = read(path)
    assert [row[""] for row in rows] == ["0", "1", "2", "3", "4"]
    macs = [float(row["relative_macs"]) for row in rows]
    assert macs == sorted(macs)
    assert sorted(float(row["lambda"]) for row in rows) == [0.5, 0.6, 0.7, 0.8, 0.9]
    for row in rows:
        config = ast.literal_eval(row["config"])
        exits = [(head, threshold) for head, threshold in config["exit_config"][0]]
        assert config["lambda"] == float(row["lambda"])
        assert config["exit_config"][1:] == (float(row["relative_macs_tr"]), float(row["relative_acc_tr"]))
        for suffix, problem in (("", problems["val"]), ("_tr", problems["train"])):
            correct, macs_sum = exit_search.evaluate(problem, exits)
            assert float(row[f"raw_acc{suffix}"]) == correct / problem.num_samples
            assert float(row[f"raw_macs{suffix}"]) == macs_sum / problem.num_samples
            assert float(row[f"relative_acc{suffix}"]) == pytest.approx(correct / problem.base_correct)
            full = problem.num_samples * problem.costs.full_macs
            assert float(row[f"relative_macs{suffix}"]) == pytest.approx(macs_sum / full)
        ratios = ast.literal_eval(row["exit_ratio"])
        assert sum(ratios) == pytest.approx(1)
        assert ratios[-1] > 0
    better = read(tmp_path / "sim_results" / "dyce_resnet50_onepass.csv")
    accuracies = [float(row["relative_acc"]) for row in better]
    assert accuracies == sorted(set(accuracies))
    assert better[0]["config"] == rows[0]["config"]
    assert max(float(row["relative_acc"]) for row in rows) == accuracies[-1]


def test_the_objective_is_the_normalised_one(arguments, problems, tmp_path):
    search_and_eval(**arguments, search_step=0.1, method="exact", save_name="mine")
    for row in read(tmp_path / "sim_results" / "unfiltered" / "mine.csv"):
        exits = [(head, threshold) for head, threshold in ast.literal_eval(row["config"])["exit_config"][0]]
        weight = float(row["lambda"])
        ours = exit_search.objective(problems["train"], exits, weight, normalize=True)
        theirs = exit_search.dyce_onepass(problems["train"], weight, normalize=True)
        assert ours <= exit_search.objective(problems["train"], theirs, weight, normalize=True) + 1e-12


def test_weights_above_1_become_1_with_one_warning(arguments, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        search_and_eval(**arguments | {"search_range": [0.9, 1.045]}, search_step=0.01)
    assert [str(warning.message) for warning in caught] == [
        "4 of 15 values of λ are above 1 (up to 1.04), where more MACs would count as better; they are taken as 1"
    ]
    rows = read(tmp_path / "sim_results" / "unfiltered" / "dyce_resnet50_onepass.csv")
    assert len(rows) == 15
    assert max(float(row["lambda"]) for row in rows) == 1.0


def test_dyces_default_range_gives_no_warning(arguments, tmp_path):
    del arguments["search_range"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_and_eval(**arguments)
    rows = read(tmp_path / "sim_results" / "unfiltered" / "dyce_resnet50_onepass.csv")
    assert sorted(float(row["lambda"]) for row in rows) == [hundredths / 100 for hundredths in range(50, 101)]


def test_samethres_takes_the_weight_for_the_threshold(arguments, problems, tmp_path):
    search_and_eval(**arguments, search_step=0.1, method="samethres")
    for row in read(tmp_path / "sim_results" / "unfiltered" / "dyce_resnet50_samethres.csv"):
        threshold = float(np.float32(float(row["lambda"])))
        assert ast.literal_eval(row["config"])["exit_config"][0] == [[0, threshold]] * 3
        correct, _ = exit_search.evaluate(problems["val"], [(0, threshold)] * 3)
        assert float(row["raw_acc"]) == correct / 200


def test_a_result_that_is_there_is_kept_unless_refreshed(arguments, tmp_path, capsys):
    path = tmp_path / "sim_results" / "kept.csv"
    path.parent.mkdir()
    path.write_text("old")
    search_and_eval(**arguments, save_name="kept")
    assert path.read_text() == "old"
    assert "kept.csv exists, skip" in capsys.readouterr().out
    search_and_eval(**arguments, save_name="kept", refresh=True, device="cpu")
    assert path.read_text().startswith(HEADER)


def test_the_callers_macs_are_left_alone_and_may_be_a_file(arguments, tmp_path):
    macs = {**arguments["macs_info"], "shared": {"macs": [1, 1, 1, 1]}}
    before = copy.deepcopy(macs)
    search_and_eval(**arguments | {"macs_info": macs}, save_name="shared")
    assert macs == before
    search_and_eval(**arguments | {"macs_info": str(write_json(tmp_path / "m.json", macs))}, save_name="file")
    results = [(tmp_path / "sim_results" / f"{name}.csv").read_text() for name in ("shared", "file")]
    assert results[0] == results[1]


def test_pickled_meta_info_is_skipped_with_a_warning(arguments, problems, tmp_path):
    pickled = np.array({"epoch": 3}, dtype=object)
    path = write_npz(tmp_path / "pickled.npz", problems["train"], meta_info=pickled)
    with pytest.warns(UserWarning, match="meta_info is pickled or not JSON and was skipped"):
        search_and_eval(**arguments | {"train_record_path": path})
    assert (tmp_path / "sim_results" / "dyce_resnet50_onepass.csv").exists()
    path = write_npz(tmp_path / "json.npz", problems["train"], meta_info=np.array(json.dumps({"epoch": 3})))
    search_and_eval(**arguments | {"train_record_path": path}, refresh=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": True}, "calibration=True asks for DyCE's pessimistic accuracy"),
        ({"method": "best"}, "method is 'best', allowed are exact, onepass, circular, samethres"),
        ({"search_range": [0.9, 0.5]}, r"search_range is \[0.9, 0.5\]"),
        ({"search_range": [-0.5, 1]}, r"search_range is \[-0.5, 1\]"),
        ({"search_range": [0.5, 0.5]}, r"search_range \[0.5, 0.5\] holds no λ"),
        ({"search_step": 0}, "search_step 0, allowed are"),
        ({"macs_info": {}}, "macs_info holds neither"),
        ({"train_record_path": "none.npz"}, "there is no record none.npz"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(arguments, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        search_and_eval(**{**arguments, **changes})
    assert not (tmp_path / "sim_results").exists()
