"""A finished study becomes a model folder that gives the record's answers without the study."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dynexit
from dynexit.core.calibration import conformal_thresholds
from dynexit.core.exit_policy import exit_index_from_gates
from dynexit.core.statistics import wilson_interval
from dynexit.core.tradeoff import apply_configuration
from dynexit.data import load_data
from dynexit.errors import Failure, UserError
from dynexit.jobs.save import run_save
from dynexit.record.held_back import calibration_samples
from dynexit.record.shards import Record
from dynexit.run_dir import RunDir
from dynexit.search.operating_points import read_csv
from dynexit.search.problem import Problem
from dynexit.study.grid import Study
from dynexit.study.read import load_study
from tests.command_line import TINY, do_all_jobs
from tests.command_line import dynexit as command

pytestmark = pytest.mark.slow

OVERRIDES = (
    "report.mlflow=false",
    "dist.checkpoint_seconds=1000",
    "search.risk=0.3",
    "record.train=true",
    "search.calibration_share=0.2",
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The tiny study, two methods, after all of its jobs."""
    folder = tmp_path_factory.mktemp("study")
    methods = ("train.method=[jei_dnn, boosted]", "jei_dnn.ce_ic_tradeoff=[0.1, 5]", "seed=[0]")
    study = load_study(TINY, [f"runs_dir={folder}/runs", *OVERRIDES, *methods])
    do_all_jobs(study)
    return study


@pytest.fixture(scope="module")
def folder(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    run_save(study.points, path)
    return path


def test_every_point_answers_as_its_record_says(study: Study, folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    model = dynexit.load(moved)
    assert {point.source for point in model.points} >= {"backbone", "search"}
    data = load_data(study.config.data)
    for split in ("validation", "test"):
        samples = data.split(split)
        images = samples.images
        assert isinstance(images, torch.Tensor)
        for saved in model.points:
            point = next(point for point in study.points if point.id == saved.training)
            record = Record.open(RunDir(point, "record") / split)
            costs = model.trainings[saved.training].exit_costs
            if saved.configuration is None:
                assert record.gate is not None
                exit_N = exit_index_from_gates(torch.from_numpy(np.array(record.gate))).numpy()
            else:
                problem = Problem.from_record(record, costs, saved.confidence)
                arrays = (problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N)
                exit_N, _ = apply_configuration(saved.configuration, *arrays)
            view = model.use(saved)
            for outputs in ([view(part) for part in images.split(64)], list(view.stream(images.split(64), 50))):
                near_N = torch.cat([out.near for out in outputs]).numpy()
                found_N = torch.cat([out.exit_index for out in outputs]).numpy()
                prediction_N = torch.cat([out.prediction for out in outputs]).numpy()
                rows_L = [*range(len(costs.positions)), len(record.rows) - 1]
                recorded_N = record.prediction()[np.array(rows_L)[exit_N], np.arange(len(exit_N))]
                assert not (((found_N != exit_N) | (prediction_N != recorded_N)) & ~near_N).any()
                assert near_N.mean() < 0.05


def test_figures_are_those_of_the_table(study: Study, folder: Path) -> None:
    model = dynexit.load(folder)
    rows = read_csv(study.directory / "report" / "operating_points.csv")
    front = {(r.relative_macs, r.accuracy) for r in rows if r.split == "validation" and r.on_front}
    everything = {(r.relative_macs, r.accuracy, r.source) for r in rows if r.split == "validation"}
    saved = {(point.relative_macs, point.accuracy, point.source) for point in model.points}
    assert front <= {(macs, accuracy) for macs, accuracy, _ in saved}
    assert saved <= everything
    assert [point.relative_macs for point in model.points[:-1]] == sorted(
        one.relative_macs for one in model.points[:-1]
    )
    for point in model.points:
        assert point.validation.num_samples == 120  # 150 without the share held back to calibrate on
        assert point.test.num_samples == 160
        low, high = point.accuracy_interval
        assert low < point.accuracy < high
    data, backbone = load_data(study.config.data), model.points[-1]
    view = model.use("backbone")
    images = data.test.images
    out = view(images)  # type: ignore[arg-type]
    assert (out.prediction == data.test.labels).double().mean() == pytest.approx(backbone.test.accuracy)
    assert out.probabilities.amax(1).mean() == pytest.approx(backbone.test.mean_confidence, abs=1e-5)
    temperatures = model.trainings[backbone.training].temperatures
    assert temperatures is not None
    assert temperatures[-1][0] != 1.0


def test_prediction_sets_cover_as_promised(study: Study, folder: Path) -> None:
    model, data = dynexit.load(folder), load_data(study.config.data)
    images = data.validation.images
    assert isinstance(images, torch.Tensor)
    for saved in model.points:
        point = next(point for point in study.points if point.id == saved.training)
        record = Record.open(RunDir(point, "record") / "validation")
        held_back_N = calibration_samples(point.config.data, 0.2, record.num_samples)
        out = model.use(saved)(images)
        scores_LN = 1 - record.confidence("label_probability").astype(np.float64)  # one head type: exits are rows
        exit_N = out.exit_index.numpy()
        alphas = [alpha for alpha, _ in saved.conformal]
        expected_AL = conformal_thresholds(scores_LN[:, held_back_N], exit_N[held_back_N], alphas, "general")
        assert [threshold for _, threshold in saved.conformal] == pytest.approx(expected_AL[:, 0], abs=1e-6)
        held_back, labels = np.flatnonzero(held_back_N), torch.as_tensor(data.validation.labels)
        covered = out.prediction_sets(0.05)[held_back, labels[held_back]]
        assert int((~covered).sum()) <= 0.05 * len(held_back) + 1


def test_certified_points_are_saved(study: Study, folder: Path) -> None:
    model = dynexit.load(folder)
    view = model.use(risk=0.3)
    assert view.point is not None
    assert view.point.certified_risk == 0.3
    found = [
        entry
        for point in study.points
        for entry in RunDir(point, "search").read_json("budgets.json")
        if "risk" in entry["budget"]
    ]
    cheapest = min(entry["validation"]["relative_macs"] for entry in found)
    assert view.point.relative_macs == pytest.approx(cheapest)


def test_one_point_is_chosen_by_budget_or_training(study: Study, tmp_path: Path) -> None:
    rows = [r for r in read_csv(study.directory / "report" / "operating_points.csv") if r.split == "validation"]
    limit = sorted(row.relative_macs for row in rows if row.on_front and row.source != "backbone")[-1]
    saved = run_save(study.points, tmp_path / "budget", relative_macs=limit)
    assert len(saved) == 2
    assert saved[0].accuracy == max(
        row.accuracy for row in rows if row.relative_macs <= limit and row.source != "backbone"
    )
    point = next(point for point in study.points if point.config.train.method == "boosted")
    saved = run_save(study.points, tmp_path / "training", identity=point.id[:6])
    assert {one.training for one in saved} == {point.id}
    assert list(dynexit.load(tmp_path / "training").trainings) == [point.id]
    with pytest.raises(UserError, match=r"--relative-macs 0\.01 is unattainable: the cheapest operating point takes 0"):
        run_save(study.points, tmp_path / "none", relative_macs=0.01)
    with pytest.raises(UserError, match="no point's id begins with 'nobody'"):
        run_save(study.points, tmp_path / "none", identity="nobody")
    assert not (tmp_path / "none").exists()


def test_refuses_weights_that_the_record_is_not_of(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynexit.models.heads import StackedHeads

    load_member = StackedHeads.load_member

    def other(heads: StackedHeads, member: int, state: dict[str, torch.Tensor]) -> None:
        load_member(heads, member, {name: 2 * tensor for name, tensor in state.items()})

    monkeypatch.setattr(StackedHeads, "load_member", other)
    with pytest.raises(Failure, match=r"confidences differ by .* from those recorded"):
        run_save(study.points, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_nothing_names_this_machine(study: Study, folder: Path) -> None:
    for path in folder.iterdir():
        assert str(study.directory.parent).encode() not in path.read_bytes()
    provenance = json.loads((folder / "exits.json").read_text())["provenance"]
    assert provenance["study"] == "tiny_study"
    prepared, *trained = provenance["jobs"]
    assert prepared["digests"]["backbone.safetensors"] == provenance["backbone_sha256"]
    assert [one["digests"]["heads.safetensors"] for one in trained] == list(provenance["heads_sha256"].values())
    assert "host" not in prepared


def test_the_commands_save_and_predict(study: Study, tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(study.directory.parent)
    words = (*OVERRIDES, "train.method=[jei_dnn, boosted]", "jei_dnn.ce_ic_tradeoff=[0.1, 5]", "seed=[0]")
    printed = command(tmp_path, "save", TINY, "model", *words).stdout.splitlines()
    assert printed[0] == f"model: {len(printed) - 1} operating points"
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (30, 30), dtype=np.uint8)).save(
            tmp_path / f"photos/{i}.png"
        )
    done = command(tmp_path, "predict", "model", "photos", "--relative-macs", "0.99", "--out", "predictions.csv")
    assert "3 images by macs-0." in done.stderr
    assert " with a confidence within " in done.stderr
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["photos/0.png", "photos/1.png", "photos/2.png"]
    (tmp_path / "photos" / "broken.jpg").write_text("")
    done = command(tmp_path, "predict", "model", "photos", status=1)
    assert f"3 images by {dynexit.load(tmp_path / 'model').use(max_accuracy_drop=0.0).name}," in done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert "photos/broken.jpg" in done.stderr
    assert "left out: 1 of 4 files\n" in done.stderr
    os.mkfifo(tmp_path / "pipe.png")
    done = command(tmp_path, "predict", "model", "photos/0.png", "pipe.png", status=1)
    assert len(done.stdout.splitlines()) == 2
    pipe = "dynexit: the image pipe.png cannot be read: is a pipe or a device, not a regular file\n"
    assert pipe in done.stderr
    done = command(tmp_path, "predict", "model", "pipe.png", "--out", "none.csv", status=1)
    assert (done.stdout, done.stderr) == ("", pipe + "dynexit: left out: 1 of 1 file\n")
    assert not (tmp_path / "none.csv").exists()
    done = command(tmp_path, "predict", "model", "photos/0.png", "-", status=2)
    dash = "dynexit: `-` is no file: images are not read from standard input; give files or folders\n"
    assert (done.stdout, done.stderr) == ("", dash)
    assert "exists; give the name of a new folder" in command(tmp_path, "save", TINY, "model", *words, status=2).stderr
    assert "has no report; run `dynexit run`" in command(tmp_path, "save", TINY, "m", "name=other", status=2).stderr
    text = command(tmp_path, "predict", "model", "photos", "--relative-macs", "0.01", status=2).stderr
    assert "relative_macs = 0.01 is unattainable: the cheapest operating point, macs-0." in text


def test_wilson_interval_is_the_published_one() -> None:
    # Wilson (1927); Newcombe (1998), table I: 81 of 263 and 0 of 20
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1.0, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
