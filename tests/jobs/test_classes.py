"""Names of the classes in every output, and what a wrong order of the classes does to a backbone used as it is."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from dynexit.errors import UserError
from dynexit.jobs import load
from dynexit.jobs.load import check_model
from dynexit.record.shards import Record
from dynexit.run_dir import RunDir, mark_done, read_json
from dynexit.study.grid import Study
from dynexit.study.read import load_study
from launch.run import run_study
from tests.command_line import TINY, run_stage

pytestmark = pytest.mark.slow
NAMES = [str(number) for number in range(11)]  # the eleventh class is blank
NATURAL, AS_STRINGS = NAMES, sorted(NAMES)


def study_in(folder: Path, name: str, *overrides: str) -> Study:
    content = yaml.safe_load(TINY.read_text())
    content["data"] = {"name": "image_folder", "dir": str(folder / "images"), "image_size": 24, "normalisation": "half"}
    content["data"] |= {"num_validation": 110, "num_test": 110, "transform": "none"}
    content["prepare"] |= {"num_epochs": 6}
    content["sweep"] = {"jei_dnn.ce_ic_tradeoff": [1]}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    study = load_study(path, [f"runs_dir={folder}", f"name={name}", "report.mlflow=false", *overrides])
    study.directory.mkdir()
    (study.directory / "study.yaml").write_text("")
    return study


def prepare_dir(study: Study) -> Path:
    return RunDir(study.points[0], "prepare").path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `images` in folders 0 to 10, and the study `made`, prepared with the classes in timm's order."""
    folder = tmp_path_factory.mktemp("classes")
    digits = load_digits()
    for number, name in enumerate(NAMES):
        (folder / "images" / name).mkdir(parents=True)
        chosen = (
            digits.images[digits.target == number][:80] if number < 10 else np.random.default_rng(0).random((80, 8, 8))
        )
        for i, image in enumerate(chosen):
            pixels = Image.fromarray((image * (255 / max(image.max(), 1))).astype(np.uint8)).resize((24, 24))
            pixels.save(folder / "images" / name / f"{i:02}.png")
    study = study_in(folder, "made", "data.class_order=timm")
    run_stage("prepare", study.points)
    return folder


def test_names_of_classes_are_in_every_output(folder: Path) -> None:
    study = study_in(folder, "outputs", "data.class_order=timm", "infer.source=search")
    run_stage("prepare", study.points)
    assert read_json(prepare_dir(study) / "classes.json")["names"] == NATURAL
    assert "classes.json" in read_json(prepare_dir(study) / "DONE")["files"]
    log = (prepare_dir(study) / "log.txt").read_text()
    assert log.count("11 classes, with images in train/validation/test: 0 60/10/10, 1 ") == 1
    for stage in ("train", "record", "search", "report"):
        run_stage(stage, study.points)
    for split in ("validation", "test"):
        record = Record.open(RunDir(study.points[0], "record") / split)
        assert record.header["class_names"] == NATURAL
    page = (study.directory / "report" / "report.html").read_text()
    assert "11 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10." in page
    run_stage("infer", study.points)
    (path,) = (study.directory / "infer").glob("*/predictions.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 110
    for row in rows:
        assert row["label_name"] == NATURAL[int(row["label"])] == Path(row["file"]).parts[0]
        assert row["prediction_name"] == NATURAL[int(row["prediction"])]
        assert (folder / "images" / row["file"]).is_file()


def test_a_folder_of_a_version_without_names_still_serves(folder: Path) -> None:
    study = study_in(folder, "old", "data.class_order=timm")
    run_stage("prepare", study.points)
    directory = prepare_dir(study)
    files = [name for name in read_json(directory / "DONE")["files"] if name != "classes.json"]
    (directory / "classes.json").unlink()
    mark_done(directory, study.points[0].ids["prepare"], files)
    for stage in ("train", "record", "search", "report", "infer"):
        run_stage(stage, study.points)
    header = Record.open(RunDir(study.points[0], "record") / "test").header
    assert "class_names" not in header
    assert "11 classes: 0" not in (study.directory / "report" / "report.html").read_text()
    (path,) = (study.directory / "infer").glob("*/predictions.csv")
    with path.open(newline="") as file:
        assert all(row["label_name"] == row["label"] for row in csv.DictReader(file))


def test_classes_that_changed_since_prepare_are_refused(folder: Path) -> None:
    study = study_in(folder, "changed", "data.class_order=timm")
    run_stage("prepare", study.points)
    (folder / "images" / "3").rename(folder / "images" / "three")
    try:
        with pytest.raises(UserError, match=r"^class 3 was '3' when the backbone was prepared and is '4' now; restore"):
            run_stage("train", study.points)
    finally:
        (folder / "images" / "three").rename(folder / "images" / "3")


@pytest.mark.parametrize("change", ["added", "moved", "renamed"])
def test_images_that_changed_since_prepare_are_refused(folder: Path, change: str) -> None:
    study = study_in(folder, f"images_{change}", "data.class_order=timm")
    run_stage("prepare", study.points)
    made = folder / "images" / ("4" if change == "moved" else "3") / ("99.png" if change == "moved" else "a.png")
    source = folder / "images" / "3" / "07.png"
    (shutil.copyfile if change == "added" else shutil.move)(source, made)
    try:
        count = len(list((folder / "images").rglob("*.png")))
        text = rf"^the data set's images, .* since the backbone was prepared \(880 and {count} images then and now\)"
        with pytest.raises(UserError, match=text):
            run_stage("train", study.points)
    finally:
        source.exists() or shutil.copyfile(made, source)
        made.unlink()
    run_stage("train", study.points)


def test_a_wrong_order_is_refused_and_warned_of(folder: Path) -> None:
    weights = f"backbone.weights={next((folder / 'made' / 'prepare').glob('*/backbone.safetensors'))}"
    frozen = (weights, "prepare.num_epochs=0", "prepare.num_warm_up_epochs=0")
    study = study_in(folder, "unknown", *frozen)
    for check in (
        lambda: check_model(study.config, weights=True),
        lambda: run_stage("prepare", study.points),
    ):
        with pytest.raises(
            UserError, match=r"^data.class_order is not set, and class 2 of .* is '10' in torchvision's"
        ):
            check()
    logs = {}
    reversed_names = folder / "names.txt"
    reversed_names.write_text("\n".join(reversed(NAMES)))
    for name, order in (("right", "timm"), ("wrong", str(reversed_names))):
        study = study_in(folder, name, *frozen, f"data.class_order={order}")
        run_stage("prepare", study.points)
        logs[name] = (prepare_dir(study) / "log.txt").read_text()
    assert "near chance" not in logs["right"]
    assert "warning: the backbone, used as it is, is right on 0." in logs["wrong"]
    assert "of 110 validation images, near chance (0.0909); check backbone.weights, data.class_order" in logs["wrong"]
    made = load_study(folder / "study.yaml", [f"runs_dir={folder}", "name=made", "data.class_order=timm"])
    rows = [json.loads(line) for line in (prepare_dir(made) / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["validation_accuracy"] > 0.5


def test_a_finished_study_warns_of_images_that_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_in(folder, "finished", "data.class_order=timm")
    run_study(study, "prepare", "here", None)
    listed: list[object] = []
    check = load.check_images
    monkeypatch.setattr(load, "check_images", lambda *given: (listed.append(given), check(*given)))

    def said() -> str:
        capsys.readouterr()
        assert run_study(study, "prepare", "here", None) == []
        found = capsys.readouterr()
        assert "finished: nothing to do, 1 point is done\n" in found.out
        return found.err

    assert said() == ""
    assert not listed  # no folder is newer than the backbone
    (folder / "images" / "3" / "notes.txt").touch()
    assert said() == ""
    assert len(listed) == 1
    shutil.copyfile(folder / "images" / "3" / "07.png", folder / "images" / "3" / "more.png")
    try:
        assert said() == (
            "dynexit: warning: the data set's images, or the classes of some, changed since the backbone was prepared "
            "(880 and 881 images then and now), and with them the splits; restore them, or start a new study with "
            "name=NAME\n"
        )
    finally:
        (folder / "images" / "3" / "more.png").unlink()
        (folder / "images" / "3" / "notes.txt").unlink()
    assert said() == ""
