"""`dynexit bench` on a model folder: its files, and thresholds at which the shares of validation leave."""

import csv
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch._dynamo.utils import counters

from dynexit.bench.figure import accuracy_figure
from dynexit.bench.images import thresholds_for
from dynexit.bench.model_bench import BenchRequest, BenchRow, bench_model
from dynexit.core.latency import BatchTimes, LatencyTable
from dynexit.core.tradeoff import Configuration, apply_configuration
from dynexit.errors import UserError
from dynexit.report.time_figure import time_figure
from dynexit.search.operating_points import RowTime
from launch.__main__ import main
from tests.deploy.saved import save_random
from tests.report.synthetic_rows import synthetic_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_random(path)
    return path


def test_the_shares_of_validation_leave() -> None:
    confidence_PHN = np.random.default_rng(0).random((3, 2, 500), dtype=np.float32)
    for fractions in ((0.25, 0.0, 0.5, 0.25), (0.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.0), (0.1, 0.0, 0.9, 0.0)):
        way = thresholds_for(confidence_PHN, Configuration(((1, 0.5), (-1, 1.0), (0, 0.25))), fractions)
        assert [head for head, _ in way.exits] == [1, -1, 0]
        none = np.zeros((3, 2, 500), bool)
        exit_N, _ = apply_configuration(way, confidence_PHN, none, none[0, 0])
        assert (np.bincount(exit_N, minlength=4) / 500).tolist() == list(fractions)


def test_points_are_timed_beside_the_full_model(folder: Path, tmp_path: Path) -> None:
    text = bench_model(
        folder, BenchRequest([2, 1], ["1e-5", "backbone"], rounds=3, seconds=0.0, num_images=16), tmp_path / "out"
    )
    with (tmp_path / "out" / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch_size"], row["asked"]) for row in rows] == [
        (batch, asked) for batch in "12" for asked in ("", "1e-5", "backbone")
    ]
    content = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert content["machine"]["device"] == "cpu"
    assert set(content["stages"]["aa"]["seconds_by_batch_size"]) == {"1", "2"}
    for full, early, whole in (rows[:3], rows[3:]):
        assert full["point"] == "full model"
        assert float(full["speed_up"]) == 1
        assert full["predicted_by_time"] == ""
        assert float(whole["predicted_by_macs"]) == 1
        assert 0 < float(early["relative_macs"]) < 1
        for row in (early, whole):
            assert float(row["p50_ms"]) <= float(row["p95_ms"]) <= float(row["p99_ms"])
            faster = float(row["images_per_second"]) / float(full["images_per_second"])
            assert 0.5 < faster / float(row["speed_up"]) < 2  # by the same clock, over a few rounds
            ratio = float(row["speed_up"]) / float(row["predicted_by_time"])
            assert float(row["realised_over_time"]) == pytest.approx(ratio)
    assert (tmp_path / "out" / "accuracy_time.png").read_bytes()[:4] == b"\x89PNG"
    assert "microseconds of a batch" in text
    for batch, note in zip((1, 2), content["notes"], strict=True):
        assert note.startswith(
            f"1e-5 of the full model's time is unattainable at batch size {batch}; timed instead is the"
        )
        assert note in text


def test_optimised_and_compiled_models_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(tmp_path / "model", exits={"positions": [2]})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # without C++
    counters.clear()
    request = BenchRequest([2], ["0.9"], ["torch", "optimized", "compiled"], rounds=3, seconds=0.0, num_images=16)
    text = bench_model(tmp_path / "model", request, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [row["runtime"] for row in rows] == [name for name in request.runtimes for _ in ("full model", "0.9")]
    assert len({(row["point"], row["relative_macs"]) for row in rows if row["asked"]}) == 1
    assert "\noptimized " in text
    assert "\ncompiled  " in text
    assert counters["stats"]["unique_graphs"] == 11  # stem, three stages and tail, for one image or more, and the whole


@pytest.mark.slow
def test_onnx_takes_the_exits_that_torch_takes(folder: Path, tmp_path: Path) -> None:
    request = BenchRequest([4], ["0.5"], ["torch", "onnx"], rounds=3, seconds=0.0, num_images=64)
    bench_model(folder, request, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [row["runtime"] for row in rows] == ["torch", "torch", "onnx", "onnx"]
    of_torch, of_onnx = rows[1], rows[3]
    assert of_onnx["relative_macs"] == pytest.approx(of_torch["relative_macs"], abs=0.02)  # near a threshold
    assert of_onnx["point"] == of_torch["point"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "8,0"], "--batch 0: batch sizes are 1 or more, as 1,8,64"),
        (["--batch", "x"], "--batch x: batch sizes are 1 or more"),
        (["--points", "3"], "--points 3: should be a share of the full model's time, as 0.6, or one of aa-0.4, "),
        (["--points", "fast"], "--points fast: should be a share"),
        (["--runtime", "tpu"], "--runtime tpu: should be one of torch, optimized, compiled, onnx"),
        (["--device", "tpu"], "device = 'tpu' cannot be used"),
        (["seed=1"], "seed=1 is for a study; for a model folder: dynexit bench DIR --out FOLDER"),
    ],
)
def test_a_wrong_request_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", str(folder), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_named_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "config.json"
    assert main(["bench", str(folder), "--out", str(file)]) == 2
    assert capsys.readouterr().err == f"dynexit: --out {file} is a file; name a folder\n"
    assert main(["predict", str(folder), str(file), "--out", str(folder)]) == 2
    assert capsys.readouterr().err == f"dynexit: --out {folder} is a folder; name a file\n"


def test_options_of_folders_are_not_for_studies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text("seed: 0")
    assert main(["bench", str(tmp_path / "study.yaml"), "--batch", "1"]) == 2
    assert "--batch is for a model folder, and" in capsys.readouterr().err
    with pytest.raises(UserError, match="batch sizes are 1 or more"):
        BenchRequest([0])
    with pytest.raises(UserError, match=r"--batch 2\.5: batch sizes are 1 or more"):
        BenchRequest([2.5])  # type: ignore[list-item]


@pytest.mark.parametrize("batch_sizes", [[1], [1, 8, 64]])
def test_a_legend_covers_no_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch_sizes: list[int]) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    times = BatchTimes(1.0, (0.5, 0.5), ((0.1,),), (0.0,), (0.0,))
    table = LatencyTable((0,), ("linear",), dict.fromkeys(batch_sizes, times))
    row = BenchRow("torch", 1, "p", "0.6", 0.9, 0.5, 0.5, 1.5, 1.0, 1.0, 1.0, 2.0)
    rows = [
        dataclasses.replace(row, runtime=runtime, batch_size=batch, asked=asked)
        for runtime in ("torch", "onnx")
        for batch in batch_sizes
        for asked in ("0.6", "")
    ]
    curves = {batch: [(0.5, 0.8), (1.0, 0.9)] for batch in batch_sizes}
    accuracy_figure(curves, rows, table, tmp_path / "bench.png")
    timed = [
        dataclasses.replace(one, times=tuple(RowTime(batch, 4.0, one.relative_macs) for batch in batch_sizes))
        for one in synthetic_rows((1.0,), (0,), (0.5, 0.9))
    ]
    time_figure(timed, batch_sizes, tmp_path / "time.png")
    for figure in drawn:
        (legend,) = figure.legends
        box, page = legend.get_window_extent(), figure.bbox
        assert not any(axes.legend_ or box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
        assert page.x0 <= box.x0 <= box.x1 <= page.x1
    assert len(drawn) == 2
