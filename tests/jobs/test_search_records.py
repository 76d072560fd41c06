"""`search-records` end to end: the files, the figures in them, and every mistake in one sentence, nothing written."""

import argparse
import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from dynexit.core.cost import ExitCosts
from dynexit.core.latency import BatchTimes, LatencyTable
from dynexit.core.tradeoff import Configuration
from dynexit.dyce.inputs import parse_costs
from dynexit.errors import UserError
from dynexit.jobs.search_records import RecordFiles, search_records, weights_of
from dynexit.record.shards import Record
from dynexit.search.budgets import KINDS, Unattainable, budgets_of, latency_costs
from dynexit.search.driver import SearchRequest, search_record
from dynexit.search.exact import sweep
from dynexit.search.operating_points import read_csv
from dynexit.search.problem import Problem
from launch.tools import add_tools
from tests.reference import exit_search
from tests.reference.exit_problems import random_problem
from tests.search.recorded import macs_info, write_json, write_npz, write_shards


@pytest.fixture
def problems() -> dict[str, Problem]:
    whole = random_problem(np.random.default_rng(0), 700, 3, 2)
    parts = {"train": slice(0, 400), "val": slice(400, 700)}
    return {
        name: Problem(
            whole.correct_PHN[..., part], whole.confidence_PHN[..., part], whole.base_correct_N[part], whole.costs
        )
        for name, part in parts.items()
    }


@pytest.fixture
def files(problems, tmp_path) -> dict:
    return {
        "train": write_shards(tmp_path / "train", problems["train"]),
        "val": write_npz(tmp_path / "val.npz", problems["val"]),
        "macs": write_json(tmp_path / "costs.json", problems["train"].costs.to_json()),
        "out": tmp_path / "out",
    }


def search(*, out, accuracy_weights=None, **options) -> list[dict]:
    """`search_records` with options by the names of the two dataclasses and of the kinds of budgets."""
    names = RecordFiles.__dataclass_fields__
    files = RecordFiles(**{name: options.pop(name) for name in names if name in options})
    budgets = budgets_of({kind: options.pop(kind) for kind in KINDS if kind in options})
    return search_records(files, SearchRequest(weights_of(accuracy_weights), budgets, **options), out)


def test_the_entries_hold_the_search_on_train_and_its_figures_on_both(files, problems, capsys):
    search(**files, accuracy_weights="0.5:0.9:0.1")
    entries = json.loads((files["out"] / "configurations.json").read_text())
    assert [entry["accuracy_weight"] for entry in entries] == [0.5, 0.6, 0.7, 0.8, 0.9]
    for entry, result in zip(entries, sweep(problems["train"], [0.5, 0.6, 0.7, 0.8, 0.9]), strict=True):
        configuration = Configuration.from_json(entry["exits"])
        assert configuration == result.configuration
        for split, problem in problems.items():
            point = problem.evaluate(configuration)
            value = exit_search.objective(problem, list(configuration.exits), entry["accuracy_weight"])
            assert entry[split]["relative_macs"] == point.relative_macs
            assert entry[split]["accuracy"] == point.accuracy
            assert entry[split]["objective"] == pytest.approx(value, abs=1e-12)
        assert set(entry) == {"accuracy_weight", "exits", "train", "val"}
    printed = capsys.readouterr().out
    assert "5 weights in " in printed
    assert "accuracy weight 0.5" in printed


def test_the_table_has_a_row_for_each_answer_and_record(files, problems):
    entries = search(**files, accuracy_weights=[0.6, 0.9], relative_macs=[0.7], risk=0.05, risk_confidence=0.9)
    with (files["out"] / "operating_points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + len(entries))
    assert [row["split"] for row in rows] == ["train", "val"] * 5
    assert [row["source"] for row in rows] == ["backbone"] * 2 + ["search"] * 8
    assert {float(row["accuracy"]) for row in rows[:2]} == {p.base_correct / p.num_samples for p in problems.values()}
    for row, entry in zip(rows[2::2], entries, strict=True):
        point = problems["train"].evaluate(Configuration.from_json(json.loads(row["configuration"])))
        assert json.loads(row["configuration"]) == entry["exits"]
        assert float(row["macs"]) == point.macs
        assert tuple(float(row[f"exit_{exit_}"]) for exit_ in range(4)) == point.exit_fractions
    on_front = [row["on_front"] for row in rows]
    assert on_front[::2] == on_front[1::2]
    assert "true" in on_front


def test_budgets_and_risk_add_entries(files, problems):
    entries = search(
        **files, relative_macs=[0.8, 0.6], min_accuracy=[0.6], max_accuracy_drop=[0.02], risk=0.05, risk_confidence=0.9
    )
    assert [next(iter(entry["budget"])) for entry in entries] == [
        "relative_macs",
        "relative_macs",
        "min_accuracy",
        "max_accuracy_drop",
        "risk",
    ]
    assert entries[0]["train"]["relative_macs"] <= 0.8
    assert entries[1]["train"]["relative_macs"] <= 0.6
    assert entries[2]["train"]["accuracy"] >= 0.6
    base = problems["train"].base_correct / 400
    assert base - entries[3]["train"]["accuracy"] <= 0.02 + 1e-12
    assert entries[4]["accuracy_weight"] is None
    assert entries[4]["train"]["objective"] is None
    assert set(entries[4]["budget"]) == {"risk", "confidence", "num_losses", "num_samples", "p_value"}
    assert entries[4]["budget"]["num_samples"] == 300
    assert entries[4]["budget"]["p_value"] <= 0.1


def test_time_is_searched_where_a_latency_table_is_given(files, problems, tmp_path):
    # the first block takes nearly all the time: leaving early saves little
    times = {"stage_seconds": [0.9, 0.05, 0.04, 0.01], "head_seconds": [[0.001, 0.002]] * 3}
    latency = write_json(tmp_path / "times.json", times)
    entries = search(**files, latency=latency, accuracy_weights=[0.3], relative_latency=[0.95])
    for entry in entries:
        assert 0.9 < entry["train"]["relative_latency"] < 1.01
        configuration = Configuration.from_json(entry["exits"])
        assert entry["train"]["relative_macs"] == problems["train"].evaluate(configuration).relative_macs
    assert entries[1]["train"]["relative_latency"] <= 0.95
    with pytest.raises(UserError, match=r"relative_macs is 0\.5, but the cost is time"):
        search(**files, latency=latency, relative_macs=[0.5])
    with pytest.raises(UserError, match=r"relative_latency is 0\.5, but time is known only from a latency table"):
        search(**files, relative_latency=[0.5])


def test_times_of_stage_bench_are_a_latency_table(files, problems, tmp_path):
    stages, heads = [0.9, 0.05, 0.04, 0.01], [[0.001, 0.002]] * 3

    def times(factor: float, stages: list, heads: list) -> BatchTimes:
        rows = tuple(tuple(factor * one for one in row) for row in (stages, *heads))
        return BatchTimes(factor, rows[0], rows[1:], *[(0.0,) * len(heads)] * 2)

    costs = problems["train"].costs
    table = LatencyTable(costs.positions, costs.head_types, {n: times(n, stages, heads) for n in (1, 4)})
    measured = write_json(tmp_path / "latency.json", table.to_json())
    plain = write_json(tmp_path / "times.json", {"stage_seconds": stages, "head_seconds": heads})
    asked = {"accuracy_weights": [0.3], "relative_latency": [0.95]}
    expected = search(**files, latency=plain, **asked)
    for batch_size in (None, 4):  # the same for an image
        assert search(**files, latency=measured, batch_size=batch_size, **asked) == expected
    with pytest.raises(UserError, match=r"--batch-size 3: .*latency.json has times of batches of 1, 4; name one"):
        search(**files, latency=measured, batch_size=3, **asked)
    other = LatencyTable((0,), ("linear",), {1: times(1, [1.0, 1.0], [[1.0]])}).to_json()
    with pytest.raises(UserError, match=r"other.json does not fit the records: it has positions \[0\] with linear"):
        search(**files, latency=write_json(tmp_path / "other.json", other), **asked)


@pytest.mark.parametrize("method", ["onepass", "circular", "samethres"])
def test_named_methods_and_normalize(files, method):
    exact = search(**files, accuracy_weights=[0.6, 0.8], normalize=True)
    named = search(**files, accuracy_weights=[0.6, 0.8], normalize=True, method=method)
    for ours, theirs in zip(exact, named, strict=True):
        assert ours["train"]["objective"] <= theirs["train"]["objective"] + 1e-9


def test_confidence_from_margins_and_gates(problems, files, tmp_path):
    margins = search(**files | {"val": files["train"]}, exit_confidence="margin", accuracy_weights=[0.7])
    plain = search(**files | {"val": files["train"]}, accuracy_weights=[0.7])
    # the margins written are the squares of the confidences: the same order, other thresholds
    assert margins[0]["train"] == plain[0]["train"]
    assert margins[0]["exits"] != plain[0]["exits"]
    one_head = random_problem(np.random.default_rng(1), 200, 3, 1)
    gated = {
        "train": write_shards(tmp_path / "gated", one_head, gates=True),
        "macs": write_json(tmp_path / "gated.json", one_head.costs.to_json()),
    }
    gated["val"] = gated["train"]
    entry = search(**files | gated, exit_confidence="gate", accuracy_weights=[0.7])[0]
    without = one_head.evaluate(Configuration.from_json(entry["exits"]))
    enabled = sum(head >= 0 for head, _ in entry["exits"])
    assert enabled
    assert 0 < (entry["train"]["relative_macs"] - without.relative_macs) * one_head.costs.full_macs <= 4 * enabled
    with pytest.raises(UserError, match="confidence is 'gate', but the record holds no gates"):
        search(**files, exit_confidence="gate", accuracy_weights=[0.7])


def test_the_number_of_workers_changes_no_byte(files):
    search(**files, accuracy_weights="0.4:1:0.01", relative_macs=[0.5])
    alone = [(files["out"] / name).read_bytes() for name in ("configurations.json", "operating_points.csv")]
    search(**files, accuracy_weights="0.4:1:0.01", relative_macs=[0.5], workers=3)
    assert alone == [(files["out"] / name).read_bytes() for name in ("configurations.json", "operating_points.csv")]


def refused(files, **changes) -> str:
    with pytest.raises(UserError) as caught:
        search(**{"accuracy_weights": [0.5, 0.7], **files, **changes})
    assert not files["out"].exists()
    return str(caught.value)


def test_bad_arguments_write_nothing(files):
    assert refused(files, accuracy_weights="0.5:1.05:0.01").startswith("accuracy weights are '0.5:1.05:0.01', but ")
    assert "accuracy weight is 1.2, allowed is 0 to 1" in refused(files, accuracy_weights=[1.2])
    assert "nothing is asked for" in refused(files, accuracy_weights=None)
    assert refused(files, method="best").startswith("method is 'best', allowed are exact, onepass,")
    assert "relative_macs 0.01 is unattainable on the searched record: the cheapest" in refused(
        files, relative_macs=[0.01]
    )
    assert "min_accuracy 0.999 is unattainable" in refused(files, min_accuracy=[0.999])
    assert "risk 0.001 is unattainable at confidence 0.95: 300 samples" in refused(files, risk=0.001)
    assert refused(files, workers=0) == "workers is 0, allowed is 1 or more"
    assert refused(files, seed=-1) == "seed is -1, allowed is 0 or more"


def test_bad_records_write_nothing(files, problems, tmp_path):
    def val(**changes) -> str:
        return refused(files, val=write_npz(tmp_path / "bad.npz", problems["val"], **changes))

    confidence = np.full((7, 300, 1), 0.5, np.float32)
    confidence[3, 17] = np.nan
    assert "bad.npz: probability holds nan, must be between 0 and 1" in val(confs=confidence)
    confidence[3, 17] = 1.5
    assert "bad.npz: probability holds 1.5, must be between 0 and 1" in val(confs=confidence)
    assert "bad.npz holds label (299, 1), confs (7, 300, 1)" in val(label=np.zeros((299, 1), np.int16))
    assert "bad.npz: label must hold whole numbers from 0 up" in val(label=np.full((300, 1), -1, np.int16))
    for rows in (6, 9):
        message = val(confs=np.full((rows, 300, 1), 0.5, np.float32), preds=np.zeros((rows, 300, 1), np.int16))
        assert message == (
            f"{tmp_path / 'bad.npz'} has {rows} rows; 3 positions x 2 head types need 6 and the backbone 1; give the "
            "costs of the exits that were recorded"
        )
    outside = write_shards(tmp_path / "outside", problems["val"], s3=12)
    message = refused(files, val=outside)
    assert "outside: the label of sample 3 in the record is 12, allowed is 0 to 9" in message
    assert "there is no record in" in refused(files, val=tmp_path)
    assert "there is no record" in refused(files, val=tmp_path / "none.npz")
    nothing_right = np.full((7, 300, 1), 11, np.int16)
    never = write_npz(tmp_path / "never.npz", problems["val"], preds=nothing_right)
    assert "the backbone is right on 0 of 300 samples" in refused(files, train=never)


def test_bad_costs_write_nothing(files, problems, tmp_path):
    def costs(content) -> str:
        return refused(files, macs=write_json(tmp_path / "bad.json", content))

    good = problems["train"].costs.to_json()
    falling = {**good, "backbone_macs": good["backbone_macs"][::-1]}
    assert "bad.json: MACs must not decrease with depth" in costs(falling)
    assert "unknown head type 'type1' in the record; the costs know type0, other" in costs(
        {**good, "head_types": ["type0", "other"]}
    )
    assert "the record has positions [0, 2, 4], the costs have [1, 2, 4]" in costs({**good, "positions": [1, 2, 4]})
    assert "bad.json holds neither the costs" in costs({"macs": 3})
    assert "bad.json holds neither the costs" in costs([1])
    assert "bad.json: MACs are whole numbers, got 1.5" in costs(
        {**macs_info(problems["train"]), "backbone": {"macs": [1.5, 2, 3, 4], "ori_macs": 4}}
    )
    for macs in (float("inf"), float("nan")):
        path = {"macs": [1, 2, 3, macs]}
        assert f"bad.json: MACs are whole numbers, got {macs}" in costs(
            macs_info(problems["train"]) | {"backbone": path}
        )
    assert "bad.json: its lists do not fit together or are none" in costs({"head": 3, "backbone": {"macs": [1, 2]}})
    free = {name: [0, 0, 0] for name in ("backbone_macs", "gate_macs")} | {"full_macs": 0}
    assert "samples at 0 MACs; check labels, model and MACs" in costs(good | free)
    assert "bad.json: 'macs' is missing" in costs({**macs_info(problems["train"]), "backbone": {}})
    (tmp_path / "text.json").write_text("macs: 3")
    assert "text.json cannot be read as JSON" in refused(files, macs=tmp_path / "text.json")
    assert "there is no file" in refused(files, macs=tmp_path / "none.json")


def test_dyces_costs_mean_the_same(files, problems, tmp_path):
    ours = search(**files, accuracy_weights=[0.7])
    theirs = write_json(tmp_path / "macs_info.json", macs_info(problems["train"]))
    assert search(**files | {"macs": theirs}, accuracy_weights=[0.7]) == ours
    shared = {**macs_info(problems["train"]), "shared": {"macs": [1, 2, 3, 4]}}
    before = json.dumps(shared)
    costs = parse_costs(shared, "shared")
    assert isinstance(costs, ExitCosts)
    plain = problems["train"].costs
    assert costs.backbone_macs == tuple(macs + 1 + place for place, macs in enumerate(plain.backbone_macs))
    assert costs.full_macs == plain.full_macs + 4
    assert json.dumps(shared) == before


def test_the_command_line_asks_for_the_defaults(files, capsys):
    parser = argparse.ArgumentParser()
    add_tools(parser.add_subparsers())
    named = [word for name in ("train", "val", "macs", "out") for word in (f"--{name}", str(files[name]))]
    line = ["search-records", *named, "--accuracy-weights", "0.5:1:0.25", "--relative-macs", "0.5"]
    options = parser.parse_args(line)
    options.tool(options)
    written = [(files["out"] / name).read_bytes() for name in ("configurations.json", "operating_points.csv")]
    search(**files, accuracy_weights=[0.5, 0.75, 1.0], relative_macs=[0.5])
    assert written == [(files["out"] / name).read_bytes() for name in ("configurations.json", "operating_points.csv")]


def test_the_file_is_a_table_of_operating_points(files, problems):
    entries = search(**files, accuracy_weights=[0.6, 0.9], relative_macs=[0.7], risk=0.05, risk_confidence=0.9)
    rows = read_csv(files["out"] / "operating_points.csv")
    assert [row.budget for row in rows[2::2]] == ["", "", *(json.dumps(entry["budget"]) for entry in entries[2:])]
    for row, entry in zip(rows[3::2], entries, strict=True):
        assert row.accuracy == entry["val"]["accuracy"]


def test_help_imports_nothing_heavy():
    code = "import sys, launch.tools; print({'numpy', 'numba', 'torch', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


TARGETS = {"accuracy_weight": 0.7, "relative_macs": 0.6, "min_accuracy": 0.6, "max_accuracy_drop": 0.02}


@pytest.mark.parametrize("target", TARGETS)
def test_search_record_finds_what_the_command_writes(files, problems, target):
    asked = {target: [TARGETS[target]]} if target != "accuracy_weight" else {"accuracy_weights": [0.7]}
    (entry,) = search(**files, **asked)
    record, costs = Record.open(files["train"]), problems["train"].costs
    best = search_record(record, costs, **{target: TARGETS[target]})
    assert best.configuration.to_json() == entry["exits"]
    assert best.point == problems["train"].evaluate(best.configuration)
    assert best.point.accuracy == entry["train"]["accuracy"]


def test_search_record_reads_times_margins_and_gates(files, problems, tmp_path):
    times = {"stage_seconds": [0.9, 0.05, 0.04, 0.01], "head_seconds": [[0.001, 0.002]] * 3, "gate_seconds": [0.1] * 3}
    latency = write_json(tmp_path / "times.json", times)
    gated = write_shards(tmp_path / "gated", problems["train"], gates=True)
    costs = latency_costs(times, problems["train"].costs)
    for confidence in ("margin", "gate"):
        changed = {"train": gated, "val": gated, "latency": latency, "exit_confidence": confidence}
        (entry,) = search(**files | changed, relative_latency=[1.05])
        best = search_record(Record.open(gated), costs, relative_latency=1.05, confidence=confidence)
        assert best.configuration.to_json() == entry["exits"]
        assert best.point.relative_macs == entry["train"]["relative_latency"]


def test_search_record_takes_one_target_that_is_attainable(files, problems):
    record, costs = Record.open(files["train"]), problems["train"].costs
    with pytest.raises(UserError, match="targets given: none; give exactly one of accuracy_weight, relative_macs,"):
        search_record(record, costs)
    with pytest.raises(UserError, match="targets given: accuracy_weight, min_accuracy; give exactly one"):
        search_record(record, costs, accuracy_weight=0.0, min_accuracy=0.0)
    with pytest.raises(Unattainable, match=r"relative_macs 0\.01 is unattainable on the searched record: the cheapest"):
        search_record(record, costs, relative_macs=0.01)
    with pytest.raises(UserError, match=r"accuracy weight is 1\.5, allowed is 0 to 1"):
        search_record(record, costs, accuracy_weight=1.5)
    with pytest.raises(UserError, match="confidence is 'sure', allowed are max_probability, margin, entropy, gate"):
        search_record(record, costs, accuracy_weight=0.5, confidence="sure")
