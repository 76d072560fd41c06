"""Wrong arguments of a loaded model's methods: one error message each, whatever their type."""

from collections.abc import Callable

import numpy as np
import pytest

import dynexit
from dynexit.deploy.model import EarlyExitModel
from dynexit.errors import UserError
from tests.deploy.saved import make_images, same, save_random


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EarlyExitModel:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_random(path)
    return dynexit.load(path, verify=False)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda m: m.use(relative_macs=True), "relative_macs is True; give a number of at least 0"),
        (lambda m: m.use(relative_macs=[0.3]), "relative_macs is [0.3]; give a number of at least 0"),
        (
            lambda m: m.use(relative_macs=np.inf),
            "relative_macs is inf, which is more than 2; give a share, as 1",
        ),
        (
            lambda m: m.use(np.array([[0.3], [0.4]])),
            "no operating point is called array([[0.3], [0.4]]); there are aa-0.4, aa-0.15, backbone",
        ),
        (
            lambda m: m.use(relative_macs=0.9, training="aa"),
            "training and confidence go with a configuration; a point has its own: leave them out",
        ),
        (
            lambda m: m.use(m.points[0].configuration, confidence=["gate"]),
            "confidence is ['gate'], allowed are max_probability, margin, entropy, gate",
        ),
        (
            lambda m: m.use(m.points[0].configuration, training=["aa"]),
            "training is ['aa']; the folder has aa (seed=0)",
        ),
        (lambda m: m.use("backbone").stream([], 2.5), "max_batch is 2.5; give a whole number of at least 1"),
        (lambda m: m.use("backbone").stream([], True), "max_batch is True; give a whole number of at least 1"),
        (lambda m: m.use("backbone").stream([], None), "max_batch is None; give a whole number of at least 1"),
        (lambda m: m.use("backbone").stream([], 8, "5"), "max_delay_ms is '5'; give a number of at least 0"),
        (lambda m: m.use("backbone").stream([], 8, np.nan), "max_delay_ms is nan; give a number of at least 0"),
        (
            lambda m: m.use("backbone").stream(None),
            "a stream takes batches, and got None; give a list or a loader of them",
        ),
        (lambda m: list(m.use("backbone").stream([()])), "images are a tuple; give a tensor (B, 3, 32, 32)"),
        (lambda m: m.use("backbone").predict([], 2.5), "batch_size is 2.5; give a whole number of at least 1"),
        (lambda m: m.use("backbone").predict(None), "an image's file is None; give a path, as text or pathlib.Path"),
        (lambda m: m.use("backbone").predict([b"a"]), "an image's file is b'a'; give a path, as text or pathlib.Path"),
        (lambda m: m.use("backbone").predict([""]), "an image's file is ''; give a path, as text or pathlib.Path"),
        (lambda m: m.use("backbone").read(1), "an image's file is 1; give a path, as text or pathlib.Path"),
        (lambda m: m.optimize(None), "device = 'None' cannot be used (it is no device); give cpu, or cuda with a GPU"),
        (lambda m: m.optimize(precision=["bf16"]), "precision is ['bf16'], allowed are float32, bf16"),
        (lambda m: m.save_pretrained(None), "save_directory is None; give a path, as text or pathlib.Path"),
        (lambda m: dynexit.load(None), "directory is None; give a path, as text or pathlib.Path"),
        (lambda m: dynexit.load("a\0b"), "a\0b/exits.json cannot be read (embedded null byte); copy the folder again"),
        (
            lambda m: m.use("backbone")(make_images(m.input_size, 1)).prediction_sets([0.05]),
            "alpha is [0.05]; the levels stored are 0.05, 0.5",
        ),
    ],
)
def test_a_wrong_argument_is_named(model: EarlyExitModel, wrong: Callable[[EarlyExitModel], object], says: str) -> None:
    with pytest.raises(UserError) as error:
        wrong(model)
    assert str(error.value) == says


def test_integers_of_numpy_are_counts(model: EarlyExitModel) -> None:
    view, images = model.use(relative_macs=np.float32(0.9)), make_images(model.input_size, 4)
    (out,) = view.stream([images], np.int64(3), np.float32(9))
    assert same(out, view(images))
