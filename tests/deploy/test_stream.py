"""Streams of a view: the answers of batches, in order and in time, with slow loaders and bad ones."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import dynexit
from dynexit.deploy.model import EarlyExitModel
from dynexit.errors import UserError
from tests.deploy.saved import make_images, same, save_random

PATIENCE_S = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> EarlyExitModel:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_random(path)
    return dynexit.load(path, verify=False)


@pytest.mark.parametrize("max_batch", [1, 5, 16, 1000])
def test_a_stream_gives_the_same_answers_in_order(model: EarlyExitModel, max_batch: int) -> None:
    images = make_images(model.input_size, 53)
    for point in model.points:
        view = model.use(point)
        batches = list(images.split(7))
        found = list(view.stream(batches, max_batch))
        assert [len(out.prediction) for out in found] == [len(batch) for batch in batches]
        whole = view(images)
        differs = torch.cat([out.exit_index for out in found]) != whole.exit_index
        assert not (differs & ~whole.near).any()
        differs |= torch.cat([out.prediction for out in found]) != whole.prediction
        assert not (differs & ~whole.near).any()
        close = ~whole.near
        probabilities = torch.cat([out.probabilities for out in found])
        torch.testing.assert_close(probabilities[close], whole.probabilities[close], atol=1e-5, rtol=1e-4)


def test_a_stream_takes_loaders_and_yields_before_the_end(model: EarlyExitModel) -> None:
    view = model.use(model.points[0])
    images = make_images(model.input_size, 24)
    loader = DataLoader(TensorDataset(images, torch.arange(24)), batch_size=8)
    assert torch.equal(torch.cat([out.exit_index for out in view.stream(loader)]), view(images).exit_index)
    entered = 0

    def endless() -> Iterator[torch.Tensor]:
        nonlocal entered
        while True:
            entered += 1
            yield images

    assert same(next(view.stream(endless(), max_batch=24)), view(images))
    entered = 0
    answers = view.stream(endless(), max_batch=24, max_delay_ms=0)
    for number in range(1, 4):
        assert same(next(answers), view(images))
        assert entered == number
    with pytest.raises(UserError, match="max_delay_ms is -1; give a number of at least 0"):
        view.stream([images], max_delay_ms=-1)
    with pytest.raises(UserError, match="max_batch is 0; give a whole number of at least 1"):
        view.stream([images], max_batch=0)
    with pytest.raises(UserError, match="the batch is empty"):
        list(view.stream([images[:0]]))


def test_a_slow_loader_delays_no_answers(model: EarlyExitModel) -> None:
    view, images = model.use(model.points[0]), make_images(model.input_size, 24)
    answered = [threading.Event() for _ in range(3)]

    def slow() -> Iterator[torch.Tensor]:
        for event in answered:
            yield images
            assert event.wait(PATIENCE_S), "the answers came only after the next batch"

    start = time.monotonic()
    answers = view.stream(slow(), max_batch=64, max_delay_ms=200)
    for event in answered:
        assert same(next(answers), view(images))
        event.set()
    assert time.monotonic() - start >= 3 * 0.2
    assert list(answers) == []


def test_a_delay_changes_no_answers(model: EarlyExitModel) -> None:
    view, images = model.use(model.points[0]), make_images(model.input_size, 53)
    whole = view(images)
    for delay in (0, 1e-3, 5, float("inf")):
        found = list(view.stream(images.split(7), 16, delay))
        assert [len(out.prediction) for out in found] == [7] * 7 + [4]
        differs = torch.cat([out.exit_index for out in found]) != whole.exit_index
        assert not (differs & ~whole.near).any()


@pytest.mark.parametrize("max_delay_ms", [None, 5])
def test_a_closed_stream_leaves_its_loader(model: EarlyExitModel, max_delay_ms: float | None) -> None:
    images = make_images(model.input_size, 4)
    goes_on, left = threading.Event(), threading.Event()

    def slow() -> Iterator[torch.Tensor]:
        try:
            for _ in range(50):
                yield images
            assert goes_on.wait(PATIENCE_S)
            while True:
                yield images
        finally:
            left.set()

    before = set(threading.enumerate())
    answers = model.use("backbone").stream(slow(), 4, max_delay_ms)
    next(answers)
    assert len(set(threading.enumerate()) - before) == (max_delay_ms is not None)
    if max_delay_ms is not None:  # the loader is slow when the stream is closed
        assert len([next(answers) for _ in range(49)]) == 49
    answers.close()  # type: ignore[attr-defined]
    goes_on.set()
    assert left.wait(PATIENCE_S)


@pytest.mark.parametrize("max_delay_ms", [None, 5])
@pytest.mark.parametrize("fault", ["NaN pixels", "another size", "an error of the loader"])
def test_answers_before_a_fault_are_given_out(model: EarlyExitModel, fault: str, max_delay_ms: float | None) -> None:
    images = make_images(model.input_size, 12)
    bad = {"NaN pixels": images.index_fill(0, torch.tensor([2]), float("nan")), "another size": images[:, :, 1:]}

    def loader() -> Iterator[torch.Tensor]:
        yield from (images, images)
        if fault not in bad:
            raise OSError("the camera is gone")
        yield bad[fault]
        yield images

    view, found = model.use(model.points[0]), []
    with pytest.raises(UserError if fault in bad else OSError) as error:
        found.extend(view.stream(loader(), 100, max_delay_ms))  # extend keeps what came before the error
    assert len(found) == 2
    assert all(len(out.prediction) == 12 for out in found)
    says = {"NaN pixels": "image 2 of the batch has values", "another size": "images have the shape 12x3x31x32"}
    assert str(error.value).startswith(says.get(fault, "the camera is gone"))
