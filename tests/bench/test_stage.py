"""A study that is searched by time: its files, a new measurement, damage, and the folder that is saved of it."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

import dynexit
from dynexit.core.latency import LatencyTable
from dynexit.errors import UserError
from dynexit.jobs.infer import run_infer
from dynexit.jobs.save import run_save
from dynexit.run_dir import mark_done, write_json
from dynexit.study.read import load_study
from tests.command_line import TINY
from tests.command_line import dynexit as command

pytestmark = pytest.mark.slow

BY_TIME = ("search.latency=measured", "bench.batch_sizes=[8, 1]", "bench.num_repeats=5", "search.latency_ms=[1000]")
PLAIN = ("report.mlflow=false", "train.num_epochs=3", "seed=[0]", "jei_dnn.ce_ic_tradeoff=[1, 5]")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny study was run by MACs and then by time."""
    folder = tmp_path_factory.mktemp("timed")
    command(folder, "run", TINY, *PLAIN)
    assert "bench" not in {path.name for path in (folder / "runs" / "tiny_study").iterdir()}
    out = command(folder, "run", TINY, *PLAIN, *BY_TIME).stdout
    assert "bench: batch size 8: backbone " in out
    assert "time at batch 1/8" in out
    assert "train " not in out
    (path,) = (folder / "runs" / "tiny_study").glob("bench/*/latency.json")
    table = json.loads(path.read_text())
    for batch, times in table["seconds_by_batch_size"].items():  # of a quiet machine, where exits gain time
        stage = 1e-4 * int(batch) ** 0.9
        times |= {"backbone": 4 * stage, "stages": [stage] * 4, "heads": [[0.1 * stage]] * 3}
        times |= {"shrunk": 1.1, "streamed": 1.2 if batch == "8" else 1.0}
    write_json(path, LatencyTable.from_json(table).to_json())
    mark_done(path.parent, path.parent.name, [path.name])
    command(folder, "run", TINY, *PLAIN, *BY_TIME)
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "runs" / "tiny_study" / "report" / "operating_points.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_points_share_the_measurement_and_rows_have_its_times(finished: Path) -> None:
    (path,) = (finished / "runs" / "tiny_study").glob("bench/*/latency.json")
    table = LatencyTable.from_json(json.loads(path.read_text()))
    assert table.batch_sizes == (1, 8)
    assert list(table.times) == [1, 2, 4, 8]
    assert table.machine["threads"] == 1
    rows = rows_of(finished)
    assert {row["time_batch_size"] for row in rows if row["budget"]} == {"1"}
    for row in rows:
        heads = [head for head, _ in json.loads(row["configuration"])] if row["configuration"] else [0] * 3
        fractions = [float(row[f"exit_{exit_}"]) for exit_ in range(4)]
        for batch in (1, 8):
            seconds = table.seconds(heads, fractions, batch, gates=row["source"] == "gates")
            if row["source"] == "backbone":
                seconds = table.times[batch].backbone
            assert float(row[f"latency_ms_{batch}"]) == pytest.approx(1000 * seconds)
            assert float(row[f"relative_time_{batch}"]) == pytest.approx(seconds / table.times[batch].backbone)
        if row["time_batch_size"] and not row["budget"] and row["split"] == "validation":
            assert float(row[f"relative_time_{row['time_batch_size']}"]) <= 1
    page = (finished / "runs" / "tiny_study" / "report" / "report.html").read_text(encoding="utf-8")
    assert "Accuracy against relative time" in page
    assert "at most 1000 ms at batch size 1" in page
    assert command(finished, "run", TINY, *PLAIN, *BY_TIME).stdout.count("nothing to do") == 1


def test_infer_predicts_its_speed_up_where_it_was_measured(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (finished / "runs" / "tiny_study").glob("bench/*/latency.json")
    table = LatencyTable.from_json(json.loads(path.read_text()))
    asked = (f"runs_dir={finished}/runs", *PLAIN, *BY_TIME, "infer.source=search")
    folders = {}
    for batch in (256, 1, 8):
        folders[batch] = folder = run_infer(load_study(TINY, [*asked, f"infer.batch_size={batch}"]).points)
        out, summary = capsys.readouterr().out, json.loads((folder / "summary.json").read_text())
        if batch == 256:
            assert summary["predicted_speed_up"] is None
            assert "stage bench" not in out
            continue
        shares = [count / summary["num_samples"] for count in summary["exit_counts"]]
        heads = [head for head, _ in summary["configuration"]]
        if batch == 1:
            relative = table.relative(heads, shares, 1)
        else:
            relative = table.relative_as_stream(heads, shares, batch, summary["num_samples"])
        assert summary["predicted_speed_up"] == pytest.approx(1 / relative)
        assert f" images/s on the same batches of {batch} ({1 / relative:.2f} by the times of stage bench)" in out
    assert run_infer(load_study(TINY, asked).points) == folders[8]  # by default the largest size measured
    pattern = r" images/s on the same batches of 8 \([\d.]+ by the times of stage bench\)$"
    assert re.search(pattern, capsys.readouterr().out, re.MULTILINE)


def test_infer_takes_256_images_if_no_time_was_measured(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "study")
    command(tmp_path / "study", "report", TINY, *PLAIN)
    asked = (f"runs_dir={tmp_path}/study/runs", *PLAIN, "infer.source=search")
    plain = run_infer(load_study(TINY, asked).points)
    assert run_infer(load_study(TINY, [*asked, "infer.batch_size=256"]).points) == plain
    assert json.loads((plain / "summary.json").read_text())["predicted_speed_up"] is None


def test_a_new_measurement_repeats_the_search(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "study")
    folder = tmp_path / "study"
    (path,) = (folder / "runs" / "tiny_study").glob("bench/*/latency.json")
    table = json.loads(path.read_text())
    for times in table["seconds_by_batch_size"].values():
        times["heads"] = [[100.0]] * 3
    path.write_text(json.dumps(table))
    mark_done(path.parent, path.parent.name, [path.name])
    out = command(folder, "run", TINY, *PLAIN, *BY_TIME[:3], "search.latency_ms=[1000]").stdout
    assert "search: " in out or "report: " in out
    for row in rows_of(folder):
        enabled = row["configuration"] and any(head >= 0 for head, _ in json.loads(row["configuration"]))
        assert not (enabled and row["time_batch_size"] and not row["budget"])


def test_a_damaged_or_foreign_measurement_is_named(finished: Path, tmp_path: Path) -> None:
    for name, change, message in (
        ("format", 7, "latency.json is damaged: it has no format version 1; move it aside with `mv "),
        (
            "backbone",
            "resnet50",
            "latency.json was measured for the backbone 'resnet50', the study has 'resnet18'; move",
        ),
        (
            "positions",
            [0, 1, 5],
            "latency.json is of another model: it has positions [0, 1, 5] with linear, the record",
        ),
    ):
        folder = tmp_path / name
        shutil.copytree(finished, folder)
        (path,) = (folder / "runs" / "tiny_study").glob("bench/*/latency.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), name: change}))
        mark_done(path.parent, path.parent.name, [path.name])
        assert message in command(folder, "run", TINY, *PLAIN, *BY_TIME, status=1).stderr


def test_a_saved_folder_has_the_times(finished: Path, tmp_path: Path) -> None:
    study = load_study(TINY, [f"runs_dir={finished}/runs", *PLAIN, *BY_TIME])
    run_save(study.points, tmp_path / "model")
    model = dynexit.load(tmp_path / "model")
    for point in model.points:
        assert [(one.device, one.batch_size) for one in point.latency] == [("cpu", 1), ("cpu", 8)]
    assert [one.relative for one in model.points[-1].latency] == [1.0, 1.0]
    for batch, target in ((1, 1e6), (8, (1e6, 8))):
        point = model.use(latency_ms=target).point
        assert point is not None
        assert point.accuracy == max(one.accuracy for one in model.points)
        fastest = min(one.times_of(batch, "cpu")[0].milliseconds for one in model.points)
        with pytest.raises(UserError, match=f"is unattainable at batch size {batch}: the fastest operating point, "):
            model.use(latency_ms=(fastest * 0.99, batch))
        found = model.use(latency_ms=(fastest, batch)).point
        assert found is not None
        assert found.times_of(batch, "cpu")[0].milliseconds == fastest
    with pytest.raises(UserError, match="the batch size of latency_ms is 3; times were measured for 1, 8"):
        model.use(latency_ms=(1, 3))
    with pytest.raises(UserError, match="latency_ms is -1; give milliseconds above 0"):
        model.use(latency_ms=-1)
    with pytest.raises(
        UserError, match=r"latency_ms is \(1, 8, 8\); give milliseconds, or \(milliseconds, batch size\)"
    ):
        model.use(latency_ms=(1, 8, 8))  # type: ignore[arg-type]
    assert "ms at batch 8" in (tmp_path / "model" / "README.md").read_text()
    run_save(study.points, tmp_path / "one", latency_ms=(1e6, 8))
    assert len(dynexit.load(tmp_path / "one").points) == 2
    with pytest.raises(UserError, match=r"--latency-ms 1e-06 is unattainable at batch size 1: the fastest operating"):
        run_save(study.points, tmp_path / "none", latency_ms=1e-6)
    with pytest.raises(UserError, match=r"--batch-size 3: times were measured for 1, 8"):
        run_save(study.points, tmp_path / "none", latency_ms=(1, 3))


def test_the_backbone_has_the_times_of_the_points_next_to_it(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "study")
    table = tmp_path / "study" / "runs" / "tiny_study" / "report" / "operating_points.csv"
    rows = rows_of(tmp_path / "study")
    for row in rows:
        if row["source"] == "backbone":  # as of the measurement of other exits
            row["latency_ms_1"] = str(2 * float(row["latency_ms_1"]))
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    study = load_study(TINY, [f"runs_dir={tmp_path}/study/runs", *PLAIN, *BY_TIME])
    *early, backbone = run_save(study.points, tmp_path / "model")
    for point in early:
        for one, whole in zip(point.latency, backbone.latency, strict=True):
            assert one.milliseconds / one.relative == pytest.approx(whole.milliseconds)


def test_times_that_were_not_measured_are_named(finished: Path, tmp_path: Path) -> None:
    for override, message in (
        ("bench.batch_sizes=[0]", "bench.batch_sizes.0 = 0: should be greater than or equal to 1"),
        ("bench.device=tpu", "bench.device = 'tpu': should be 'auto', 'cpu' or 'cuda'"),
        ("search.latency_batch_size=3", "search.latency_batch_size = 3: should be one of bench.batch_sizes, [8, 1]"),
        (
            "search.latency=none",
            "search.latency_ms = [1000.0]: needs search.latency=measured, the times of stage bench",
        ),
    ):
        assert message in command(tmp_path, "run", TINY, *PLAIN, *BY_TIME, override, status=2).stderr
    study = load_study(TINY, [f"runs_dir={finished}/runs", *PLAIN])
    command(finished, "report", TINY, *PLAIN)
    with pytest.raises(UserError, match="--latency-ms needs measured times; run the study with"):
        run_save(study.points, tmp_path / "none", latency_ms=4)
