"""A loaded model in use: targets, views, outputs, threads, statistics, image files, and bad input."""

import csv
import io
import os
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dynexit
from dynexit.core.calibration import conformal_sets
from dynexit.core.tradeoff import Configuration, configuration_macs_L
from dynexit.deploy.engine import Engine
from dynexit.deploy.model import EarlyExitModel, View
from dynexit.errors import UserError
from tests.deploy.saved import CLASSES, make_images, same, save_random


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_random(path, trainings=("aa", "bb"))
    return path


@pytest.fixture
def model(folder: Path) -> EarlyExitModel:
    return dynexit.load(folder, verify=False)


def test_a_budget_gets_the_most_accurate_point_within_it(model: EarlyExitModel) -> None:
    for budget in (model.points[0].relative_macs, 0.8, 1.0, 2.0):
        view = model.use(relative_macs=budget)
        within = [point for point in model.points if point.relative_macs <= budget]
        assert view.point is not None
        assert view.point.accuracy == max(point.accuracy for point in within)
    backbone = model.points[-1]
    for drop in (0.0, 0.02, 1.0):
        view = model.use(max_accuracy_drop=drop)
        within = [point for point in model.points if point.accuracy >= backbone.accuracy - drop - 1e-9]
        assert view.point is not None
        assert view.point.relative_macs == min(point.relative_macs for point in within)
    assert model.use("backbone").point is backbone
    assert model.use(model.points[1]).name == model.points[1].name


def test_an_unattainable_target_names_the_nearest(model: EarlyExitModel) -> None:
    cheapest = model.points[0]
    with pytest.raises(UserError, match=rf"relative_macs = 0.01 is unattainable: .* {cheapest.name}, takes 0."):
        model.use(relative_macs=0.01)
    with pytest.raises(UserError, match=r"risk = 0\.1 is unattainable: no operating point has a certificate"):
        model.use(risk=0.1)
    with pytest.raises(UserError, match="no operating point is called 'fast'; there are"):
        model.use("fast")
    with pytest.raises(UserError, match=r"use\(\) takes one target and got 2"):
        model.use("backbone", relative_macs=0.5)
    with pytest.raises(UserError, match="relative_macs is nan; give a number of at least 0"):
        model.use(relative_macs=float("nan"))
    with pytest.raises(UserError, match=r"relative_macs is 30, which is more than 2; give a share, as 0\.3"):
        model.use(relative_macs=30)
    with pytest.raises(UserError, match=r"max_accuracy_drop is 5, which is more than 1; give a share, as 0\.05"):
        model.use(max_accuracy_drop=5)


def test_what_a_notebook_shows_is_one_line(model: EarlyExitModel) -> None:
    assert repr(model) == f"<EarlyExitModel: {len(model.points)} operating points, {len(CLASSES)} classes; see use()>"
    point = model.points[0]
    assert repr(model.use(point)) == f"<View {point.name}, {point.relative_macs:.4f} of the MACs>"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("device", ["cuda", "gpu", "cuda:x"])
def test_a_device_that_is_not_there_is_named(folder: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"device = '{device}' cannot be used (.*); give cpu, or cuda with a GPU"):
        dynexit.load(folder, device=device)


def test_certified_points_answer_a_risk(model: EarlyExitModel) -> None:
    points = [point.model_copy(update={"certified_risk": risk}) for point, risk in zip(model.points, (0.3, 0.1, 0.1))]  # noqa: B905
    model.points = (*points, *model.points[3:])
    assert model.use(risk=0.2).name == points[1].name
    with pytest.raises(UserError, match=r"risk = 0.05 is unattainable: the least risk .* certified for is 0.1"):
        model.use(risk=0.05)


def test_using_takes_less_than_a_millisecond(model: EarlyExitModel) -> None:
    seconds = []
    for _ in range(30):
        start = time.process_time()
        model.use(relative_macs=0.9)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1e-3


def test_outputs_hold_macs_and_scaled_probabilities(model: EarlyExitModel) -> None:
    images = make_images(model.input_size, 40)
    for point in model.points:
        view = model.use(point)
        out = view(images)
        answers = view.router.classify(images)
        costs = model.trainings[point.training].exit_costs
        assert point.configuration is not None
        macs_L = configuration_macs_L(point.configuration, costs)
        assert out.macs.tolist() == macs_L[out.exit_index.numpy()].tolist()
        assert len(set(out.exit_index.tolist())) > 1 or point.source == "backbone"
        temperature_B = np.where(answers.exit_index_B == len(costs.positions), 0.5, 2.0)
        scaled = torch.from_numpy(answers.logits_BK / temperature_B[:, None]).softmax(1).float()
        torch.testing.assert_close(out.probabilities, scaled, atol=1e-6, rtol=1e-5)
        assert out.prediction.tolist() == out.probabilities.argmax(1).tolist()
        assert out.near.dtype == torch.bool


def test_prediction_sets_are_those_of_the_stored_levels(model: EarlyExitModel) -> None:
    images = make_images(model.input_size, 40)
    for point in model.points:
        out, answers = model.use(point)(images), model.use(point).router.classify(images)
        unscaled_BK = torch.from_numpy(answers.logits_BK).softmax(1).numpy()
        for alpha, threshold in point.conformal:
            expected = conformal_sets(unscaled_BK, answers.exit_index_B, np.full(len(model.points) * 9, threshold))
            assert out.prediction_sets(alpha).numpy().tolist() == expected.tolist()
    with pytest.raises(UserError, match=r"alpha is 0.1; the levels stored are 0\.05, 0\.5"):
        out.prediction_sets(0.1)
    own = model.use(model.points[0].configuration, training=model.points[0].training)(images)
    with pytest.raises(UserError, match=r"stored are none \(a configuration of your own has no levels\)"):
        own.prediction_sets()


def test_answers_near_a_threshold_are_counted(model: EarlyExitModel) -> None:
    model.tolerance = 0.003
    view = model.use(model.points[0])
    out = view(make_images(model.input_size, 40))
    assert 0 < view.stats().num_near == int(out.near.sum()) < 40


def test_tolerance_holds_differences_by_batch_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_logits = Engine.all_logits

    def by_size(engine: Engine, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_PHBK, final_BK = all_logits(engine, images)
        return logits_PHBK * (1.001 if len(images) == 1 else 1.0), final_BK

    before = dynexit.load(folder).tolerance
    monkeypatch.setattr(Engine, "all_logits", by_size)
    assert 2 * before < dynexit.load(folder).tolerance < 0.01


def test_a_configuration_is_used_as_given(model: EarlyExitModel) -> None:
    images = make_images(model.input_size, 30)
    point = model.points[0]
    assert point.configuration is not None
    view = model.use(point.configuration, training=point.training, confidence=point.confidence)
    assert view.point is None
    assert same(view(images), model.use(point)(images))
    by_gate = model.use(Configuration(((0, 0.5),) * len(point.configuration.exits)), training="aa", confidence="gate")
    costs = model.trainings["aa"].exit_costs
    assert by_gate.macs_L[0] == costs.backbone_macs[0] + costs.head_macs[0][0] + costs.gate_macs[0]
    with pytest.raises(UserError, match=r"several trainings; give training=, one of aa \(seed=0\), bb \(seed=1\)"):
        model.use(point.configuration)
    with pytest.raises(UserError, match="training is 'cc'; the folder has aa"):
        model.use(point.configuration, training="cc")
    with pytest.raises(UserError, match="the configuration has 2 positions and the model"):
        model.use(Configuration(((0, 0.5),) * 2), training="aa")
    with pytest.raises(UserError, match="is of another model"):
        model.use(point.model_copy(update={"training": "bb" if point.training == "aa" else "aa"}))


def test_views_are_used_by_threads_and_cannot_be_changed(model: EarlyExitModel) -> None:
    images = make_images(model.input_size, 64)
    views = [model.use(point) for point in model.points]
    expected = [view(images) for view in views]
    with pytest.raises(AttributeError):
        views[0].configuration = None  # type: ignore[misc]
    before = {view.name: view.stats().num_images for view in views}
    barrier = threading.Barrier(4)

    def work(number: int) -> bool:
        barrier.wait()
        found = True
        for turn in range(12):
            place = (number + turn) % len(views)
            view = model.use(model.points[place]) if turn % 2 else views[place]
            found &= same(view(images), expected[place])
        return found

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    seen = {one.name: one.num_images - before[one.name] for one in model.stats()}
    assert sum(seen.values()) == 4 * 12 * 64


def test_statistics_show_drift(model: EarlyExitModel) -> None:
    view = model.use(model.points[0])
    assert view.stats().exit_fractions is None
    assert model.stats() == ()
    out = view(make_images(model.input_size, 50, seed=5))
    seen = view.stats()
    shares = np.bincount(out.exit_index.numpy(), minlength=len(view.macs_L)) / 50
    np.testing.assert_allclose(seen.exit_fractions, shares)
    assert seen.mean_confidence == pytest.approx(float(out.probabilities.amax(1).mean()))
    assert seen.validation_exit_fractions == model.points[0].exit_fractions
    assert seen.drift == pytest.approx(np.abs(shares - model.points[0].exit_fractions).sum() / 2)
    view(torch.zeros(500, *model.input_size))  # all of them leave at one exit
    assert view.stats().drift > 0.3  # type: ignore[operator]
    model.use("backbone")
    assert [one.name for one in model.stats()] == [view.name]  # the other has seen nothing


def test_statistics_tell_own_configurations_apart(model: EarlyExitModel) -> None:
    images = make_images(model.input_size, 7)
    num_positions = len(model.trainings["aa"].exit_costs.positions)
    ways: tuple[tuple[float, str, str], ...] = (
        (0.25, "aa", "max_probability"),
        (0.5, "aa", "max_probability"),
        (0.5, "bb", "max_probability"),
        (0.5, "aa", "gate"),
    )
    names = []
    for turn in range(3):
        for threshold, training, confidence in ways:
            configuration = Configuration(((0, threshold),) * num_positions)
            view = model.use(configuration, training=training, confidence=confidence)
            view(images[: turn + 1])
            names.append(view.name)
    assert names == 3 * names[:4]
    assert {seen.name: seen.num_images for seen in model.stats()} == dict.fromkeys(names[:4], 1 + 2 + 3)
    assert len(set(names)) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[:, :, :-1], "images have the shape 4x3x31x32; this model takes Bx3x32x32"),
        (lambda x: x[:, :1], "images have the shape 4x1x32x32"),
        (lambda x: x[0], "images have the shape 3x32x32"),
        (lambda x: x[:0], "the batch is empty; give at least one image"),
        (lambda x: x.double(), r"images are torch.float64; give torch.float32"),
        (lambda x: (255 * x).byte(), r"images are torch.uint8; give torch.float32, normalised as"),
        (lambda x: x.numpy(), r"images are a ndarray; give a tensor \(B, 3, 32, 32\)"),
        (lambda x: x.index_fill(0, torch.tensor([2]), float("nan")), "image 2 of the batch has values that are not"),
        (lambda x: x.index_fill(0, torch.tensor([1]), float("inf")), "image 1 of the batch has values that are not"),
    ],
)
def test_bad_images_are_one_clear_error(model: EarlyExitModel, change, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=says):
        model.use("backbone")(change(make_images(model.input_size, 4)))


def test_large_finite_values_are_taken(model: EarlyExitModel) -> None:
    images = torch.full((2, *model.input_size), 3e38)  # their sum is infinite
    assert len(model.use("backbone")(images).prediction) == 2


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for name, mode in (("a.png", "RGB"), ("b.JPG", "L"), ("deep/c.png", "RGBA")):
        pixels = generator.integers(0, 256, (40, 50, len(mode)), dtype=np.uint8).squeeze()
        Image.fromarray(pixels, mode).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no image")
    (tmp_path / "photos" / "notes.txt").write_text("no image either")
    os.mkfifo(tmp_path / "photos" / "deep" / "pipe.PNG")
    (tmp_path / "photos" / "link.png").symlink_to("nowhere.png")
    return tmp_path / "photos"


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
def test_predict_names_unreadable_files_and_does_the_rest(model: EarlyExitModel, photos: Path) -> None:
    view = model.use(model.points[0])
    os.mkfifo(photos.parent / "pipe.png")
    more = [photos / "gone.jpg", photos.parent / "pipe.png", photos / ("a" * 300)]
    found = view.predict([photos, photos / "deep" / "c.png", *more], batch_size=2)
    assert [Path(row.file).name for row in found.rows] == ["a.png", "b.JPG", "c.png", "c.png"]
    inside = [photos / "broken.png", photos / "deep" / "pipe.PNG", photos / "link.png"]
    assert list(found.unreadable) == [str(path) for path in (*inside, *more)]
    pipe = "cannot be read: is a pipe or a device, not a regular file"
    reasons = (pipe, "does not exist", "does not exist", pipe, ": File name too long")
    for path, reason in zip([*inside[1:], *more], reasons, strict=True):
        assert found.unreadable[str(path)].endswith(reason)
    for row in found.rows:
        image = view.transform(Image.open(row.file).convert("RGB"))
        alone = view(image[None])
        assert row.class_index == alone.prediction.item()
        assert row.class_name == CLASSES[row.class_index]
        assert row.exit_index == alone.exit_index.item()
        assert row.macs == alone.macs.item()
        assert row.confidence == pytest.approx(alone.probabilities.max().item(), abs=1e-5)
    text = io.StringIO()
    found.write_csv(text)
    rows = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert list(rows[0]) == ["file", "class", "confidence", "exit", "macs"]
    assert rows[1]["class"] == found.rows[1].class_name
    (photos.parent / "empty").mkdir()
    with pytest.raises(UserError, match="no image was found in"):
        view.predict(photos.parent / "empty")


def test_predict_names_folders_that_it_cannot_read(model: EarlyExitModel, photos: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # not in pytest's folder, where nobody but its owner may look
        folder, user = Path(name), os.geteuid()
        folder.chmod(0o755)
        shutil.copy(photos / "a.png", folder)
        (folder / "deep").mkdir(mode=0)
        os.seteuid(user or 65534)  # root reads every folder
        try:
            found = model.use("backbone").predict(folder)
        finally:
            os.seteuid(user)
        assert [Path(row.file).name for row in found.rows] == ["a.png"]
        assert found.unreadable == {f"{folder}/deep": f"the folder {folder}/deep cannot be read: Permission denied"}
        (folder / "deep").chmod(0o700)


def test_a_view_is_what_the_api_says(model: EarlyExitModel) -> None:
    view = model.use("backbone")
    assert isinstance(view, View)
    assert view.full_macs == model.trainings["aa"].exit_costs.full_macs
    out = view(make_images(model.input_size, 2))
    assert out.macs.tolist() == [view.full_macs] * 2
