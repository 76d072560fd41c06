"""Images held as uint8 on a device: a quarter of the bytes to copy, and the same images bit for bit."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dynexit.data import Split, Workers, load_batches
from dynexit.data.fashion_mnist import GreyImages
from dynexit.data.images import ArraySource, TransformedImages
from dynexit.data.transforms import train_transform
from dynexit.dist import Ranks
from dynexit.jobs import load
from dynexit.jobs.planning.missing import missing_jobs
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.read import load_study
from dynexit.study.schema import DataSettings, TrainSettings
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.pack import Member, Pack
from tests.command_line import TINY, run_stage
from tests.data.on_disk import write_fashion_mnist
from tests.pretend_cuda import CUDA, World, pretend_cuda
from tests.train.tiny import tiny_model

ALONE = Ranks(0, 1, CUDA)
NUM_IMAGES, SIDE, BATCHES = 72, 24, ([3, 0, 5], [], [1, 3])


def grey() -> GreyImages:
    """Augmented images of the tiny model's size."""
    pixels = np.random.default_rng(2).integers(0, 256, (NUM_IMAGES, 20, 20), dtype=np.uint8)
    return GreyImages(pixels, SIDE, (0.3, 0.4), seed=1)


def colour(transform: str, cache: str = "auto") -> TransformedImages:
    pixels = np.random.default_rng(1).integers(0, 256, (NUM_IMAGES, SIDE, SIDE, 3), dtype=np.uint8)
    source, data = ArraySource(pixels, np.zeros(NUM_IMAGES)), DataSettings(name="cifar10", transform=transform)
    train, is_random = train_transform(data.model_copy(update={"image_size": SIDE}))
    return TransformedImages(
        source, torch.arange(NUM_IMAGES), train, 5 if is_random else None, cache=cache, image_size=SIDE
    )


def split_of(images: GreyImages | TransformedImages, num_workers: int = 0) -> Split:
    order = torch.arange(NUM_IMAGES)
    return Split(images, order % 5, order, Workers(num_workers))


@pytest.fixture
def world() -> Iterator[World]:
    with pretend_cuda() as world:
        yield world


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("made", "channels"),
    [(grey, 1), (lambda: colour("pad_crop"), 3), (lambda: colour("none"), 3)],
    ids=["grey", "pad_crop", "none"],
)
def test_finishes_the_same_images_on_a_device(
    made: Callable[[], GreyImages | TransformedImages], channels: int, num_workers: int
) -> None:
    expected = [list(load_batches(split_of(made()), BATCHES, epoch)) for epoch in (0, 1)]
    with pretend_cuda() as world:
        split = split_of(made(), num_workers)
        found = [list(load_batches(split, BATCHES, epoch, ALONE)) for epoch in (0, 1)]
        assert world.waits == {}
        assert all(images.is_cuda for epoch in found for _, images, _ in epoch)
    for one, other in zip(itertools.chain(*expected), itertools.chain(*found), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert world.copied[torch.uint8] == 2 * 5 * channels * SIDE**2
    assert world.copied[torch.float32] <= 2 * len(BATCHES) * channels * 256 * 4  # the values of the intensities


@pytest.mark.parametrize("images", [colour("timm"), colour("pad_crop", cache="none")], ids=["timm", "not kept"])
def test_images_made_one_by_one_travel_as_floats(world: World, images: TransformedImages) -> None:
    loaded = list(load_batches(split_of(images), BATCHES, 0, ALONE))
    assert [batch.shape for _, batch, _ in loaded] == [(len(indices), 3, SIDE, SIDE) for indices in BATCHES]
    assert world.copied[torch.uint8] == 0
    assert world.copied[torch.float32] == 5 * 3 * SIDE**2 * 4


def take_steps(steady: Callable[[], object]) -> None:
    """Four steps, each with its batch; calls `steady` after one of each kind."""
    model, costs = tiny_model()
    model.backbone.to(CUDA)
    settings, split = JeiDnnSettings(max_warm_up_epochs=0, bilevel_batch_count=1), split_of(grey())
    pack = Pack(model, costs, [Member(0, "one", JeiDnnSettings())], TrainSettings(), split, ALONE, NUM_IMAGES)
    task = JeiDnnTask(pack, settings)
    batches = [range(i, i + 18) for i in range(0, NUM_IMAGES, 18)]
    for step, (index, images, labels) in enumerate(load_batches(split, batches, 0, ALONE)):
        task.train_step((index, images, ALONE.to_device(labels)), 1.0)
        if step == 1:
            steady()


def test_a_step_and_its_batch_never_wait(world: World) -> None:
    take_steps(world.reset)
    assert world.waits == {}
    assert world.copied[torch.uint8] == 2 * 18 * SIDE**2
    assert world.copied[torch.float32] < 18 * SIDE**2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_and_its_batch_never_wait_on_a_gpu() -> None:
    try:
        take_steps(lambda: torch.cuda.set_sync_debug_mode("error"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("features", ["fresh", "kept"])
def test_every_job_gets_images_as_uint8(features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fashion_mnist(tmp_path, 200, 60)
    data = f"{{name: fashion_mnist, dir: {tmp_path}/FashionMNIST/raw, num_validation: 50}}"
    short = ("prepare.num_epochs=1", "train.num_epochs=1", "jei_dnn.max_warm_up_epochs=1", "report.mlflow=false")
    one = (f"train.features={features}", "jei_dnn.ce_ic_tradeoff=1", "seed=0")
    study = load_study(TINY, [f"runs_dir={tmp_path}/runs", f"data={data}", *short, *one])
    monkeypatch.setattr(load, "start_ranks", lambda *_: ALONE)
    image = 32 * 32
    for stage, num_images in {"prepare": 150 + 2 * 50, "train": 150 + 50, "record": 50 + 60}.items():
        with pretend_cuda() as world:
            for job in missing_jobs(study, stage):
                run_stage(stage, job.points)
        assert world.copied[torch.uint8] == num_images * image, stage
        assert world.copied[torch.float32] < 20 * 4 * image, stage  # of weights and kept rows
