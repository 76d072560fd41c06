"""Every step on a pretend CUDA device: tensors of one device only, no waits of the host, few kernels.

Kernels are those of the members: the step's less the backbone's.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dynexit.core.tradeoff import Configuration
from dynexit.data import Split
from dynexit.deploy.engine import Engine
from dynexit.deploy.router import Answers
from dynexit.dist import Ranks
from dynexit.features.kept import KeptExits, keep_features_of
from dynexit.models.backbones import build_backbone
from dynexit.models.heads import StackedGates, StackedHeads
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit
from dynexit.progress import Progress
from dynexit.record.recorder import Recorder
from dynexit.study.methods import (
    BoostedSettings,
    DyceSettings,
    JeiDnnSettings,
    ProbeSettings,
    WeightedSettings,
)
from dynexit.study.schema import PrepareSettings, TrainSettings
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.dyce import DyceTask
from dynexit.train.independent import BoostedTask, IndependentTask
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.pack import Member, Pack, PackTask
from dynexit.train.probe import ProbeTask
from dynexit.train.transfer import TransferTask
from dynexit.train.weighted import WeightedTask
from tests.features.test_kept import point_at, tiny_data
from tests.models.tiny import build_tiny
from tests.pretend_cuda import CUDA, MixedDevicesError, RaceError, World, pretend_cuda
from tests.reference.fake_outputs import outputs, plan
from tests.train.tiny import largest_difference, seed_members, tiny_model, tiny_split, tradeoff_members

ALONE = Ranks(0, 1, CUDA)
TRAIN = TrainSettings(num_epochs=2, global_batch_size=18, learning_rate=0.05)
JOINT = JeiDnnSettings(max_warm_up_epochs=0, bilevel_batch_count=1)
TWO_TYPES = ("linear", "mlp2x7")
COSTS = {types: tiny_model(types)[1] for types in (("linear",), TWO_TYPES)}  # counted where no mode is in between


@pytest.fixture
def world() -> Iterator[World]:
    with pretend_cuda() as world:
        yield world


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    torch.distributed.destroy_process_group()


def pack_of(members: list[Member], ranks: Ranks, head_types: tuple[str, ...] = ("linear",)) -> Pack:
    """A pack on the ranks' device, with the backbone there."""
    model = tiny_model(head_types)[0]
    model.backbone.to(ranks.device)
    costs = COSTS[head_types]
    plain = tiny_split()
    return Pack(model, costs, members, TRAIN, tiny_split(40, seed=4), ranks, len(plain), seed=7, plain_train=plain)


SEEDS, TRADEOFFS = seed_members((3, 0)), tradeoff_members([(0, 0.05), (0, 0.4), (1, 0.3)])
TASKS: dict[str, Callable[[Ranks], PackTask]] = {
    "jei_dnn": lambda ranks: JeiDnnTask(pack_of(TRADEOFFS, ranks), JOINT),
    "jei_dnn warm-up": lambda ranks: JeiDnnTask(pack_of(TRADEOFFS, ranks), JeiDnnSettings(max_warm_up_epochs=1)),
    "independent": lambda ranks: IndependentTask(pack_of(SEEDS, ranks)),
    "boosted": lambda ranks: BoostedTask(pack_of(SEEDS, ranks), BoostedSettings()),
    "weighted": lambda ranks: WeightedTask(pack_of(SEEDS, ranks), WeightedSettings(meta_interval=2)),
    "dyce": lambda ranks: DyceTask(pack_of(SEEDS, ranks, TWO_TYPES), DyceSettings(num_warm_up_epochs=0)),
}


def probe(ranks: Ranks) -> ProbeTask:
    return ProbeTask(pack_of(SEEDS, ranks), ProbeSettings(l2=[1.0], max_iterations=5))


def take_steps(task: PackTask, size: int, share: float, num_steps: int = 2) -> None:
    """Steps on one batch; two are one of each kind of a method that alternates."""
    index, images, labels = tiny_split().__getitems__(range(size))
    batch = index, task.ranks.to_device(images), task.ranks.to_device(labels)
    for _ in range(num_steps):
        task.train_step(batch, share)


def train(task: PackTask, folder: Path) -> PackTask:
    task.train(tiny_split(), Checkpoints(folder, 0.0), Progress("train", folder, 1e9, quiet=True))
    return task


# ---- the pretend device itself


def test_raises_on_tensors_of_two_devices(world: World) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert there.device == CUDA
    assert there.is_cuda
    with pytest.raises(MixedDevicesError, match=r"aten.mul on cuda:0 and a CPU tensor of shape \(3,\)"):
        there * here
    weight = there.clone().requires_grad_()
    with pytest.raises(MixedDevicesError):
        torch.autograd.grad((weight * 2).sum(), weight, grad_outputs=torch.ones(1, device="cuda") + here)
    assert (there * 2 + there.sum()).is_cuda  # numbers and 0-dimensional tensors may mix


def test_raises_on_numpy_of_a_device_tensor(world: World) -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        torch.ones(3, device="cuda").numpy()
    assert torch.ones(3, device="cuda").cpu().numpy().sum() == 3


@pytest.mark.parametrize(
    ("what", "wait"),
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: bool(x.any()), "__bool__"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: x.new_tensor([1.0]), "new_tensor"),
        (lambda x: torch.tensor([1.0], device="cuda"), "torch.tensor"),
        (lambda x: torch.ones(3).to("cuda", non_blocking=True), "copy to the device from pageable"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: x.nonzero(), "aten.nonzero"),
        (lambda x: x[torch.tensor([0, 1])], "index from the host"),
        (lambda x: torch.where(x > 0, x, torch.tensor(0.0)), "scalar from the host"),
    ],
)
def test_counts_waits_of_the_host(world: World, what: Callable[[Tensor], object], wait: str) -> None:
    x = torch.ones(3, device="cuda")
    what(x)
    assert [place.partition(" at ")[0] for place in world.waits] == [wait]
    assert next(iter(world.waits)).partition(" at ")[2].startswith("tests/test_pretend_cuda.py:")


def test_counts_no_waits_where_there_are_none(world: World) -> None:
    x = torch.ones(3, device="cuda")
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    torch.where(x > 0, x, 0.0) + x[x.argmax()[None]] * 2
    Ranks(0, 1, CUDA).to_device(torch.ones(3)) + torch.full((3,), 2.0, device="cuda")
    assert world.waits == {}


def test_raises_on_what_another_stream_still_copies(world: World) -> None:
    def copied() -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream(CUDA)):
            return ALONE.to_device(torch.ones(3))

    x, y = copied(), copied()
    with pytest.raises(RaceError, match=r"aten\.add reads what another stream copies"):
        x + 1
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream(CUDA))
    with pytest.raises(RaceError):  # its memory may be given away before it is read
        x + 1
    x.record_stream(torch.cuda.current_stream())
    assert (x + 1).is_cuda
    with pytest.raises(RaceError):
        y + 1
    assert (ALONE.images_to_device(torch.ones(3)) + 1).is_cuda
    assert world.waits == {}


def test_counts_kernels_and_bytes(world: World) -> None:
    x = torch.ones(4, 5, device="cuda")
    world.reset()
    y = (x * 2).view(-1)[None]  # views are no kernels
    y.sum()
    assert world.kernels == {"aten.mul": 1, "aten.sum": 1}
    assert world.num_bytes == (20 + 20 + 20 + 1) * 4


# ---- what runs on it


@pytest.mark.parametrize("name", TASKS)
def test_a_steady_step_never_waits(world: World, name: str) -> None:
    task = TASKS[name](ALONE)
    take_steps(task, 18, 1.0)
    world.reset()
    take_steps(task, 18, 1.0)
    assert world.waits == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TASKS)
def test_a_steady_step_never_waits_on_a_gpu(name: str) -> None:
    task = TASKS[name](ALONE)
    take_steps(task, 18, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_steps(task, 18, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(task.alive_M.all())


@pytest.mark.parametrize("name", TASKS)
def test_a_step_of_eight_ranks_never_waits(world: World, eight_ranks: None, name: str) -> None:
    task = TASKS[name](Ranks(0, 8, CUDA))
    world.reset()
    take_steps(task, 16, 1 / 8)
    answers = task.ranks.start_any([False, False])
    assert world.waits == {}
    assert answers() == [False, False]


@pytest.mark.parametrize("name", [*TASKS, "probe"])
def test_trains_and_resumes_as_on_the_cpu(tmp_path: Path, name: str) -> None:
    make = {**TASKS, "probe": probe}[name]
    expected = train(make(Ranks(0, 1, torch.device("cpu"))), tmp_path / "cpu")
    with pretend_cuda():
        found = train(make(ALONE), tmp_path / "cuda")
        resumed = train(make(ALONE), tmp_path / "cuda")  # from the checkpoint after the last epoch
        assert found.alive_M.is_cuda
        states = [[task.member_state(i) for i in range(len(task.members))] for task in (found, resumed)]
        states = [[{key: value.cpu() for key, value in state.items()} for state in one] for one in states]
    for found_M in states:
        for i, state in enumerate(found_M):
            assert largest_difference(expected.member_state(i), state) <= 1e-5
    assert found.rows == resumed.rows


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_a_step_of_the_backbone_never_waits(world: World, micro_batch_size: int | None) -> None:
    backbone = tiny_model()[0].backbone.to(CUDA)
    backbone.requires_grad_(True)
    settings = PrepareSettings(micro_batch_size=micro_batch_size)
    task = TransferTask(backbone, settings, 5, 7, tiny_split(40, seed=4), ALONE)
    index, images, labels = tiny_split().__getitems__(range(18))
    batch = index, ALONE.to_device(images), ALONE.to_device(labels)
    task.train_step(batch, 1.0)
    world.reset()
    task.train_step(batch, 1.0)
    assert world.waits == {}
    task.end_epoch(0)
    task.restore(*task.state())
    assert 0 <= task.rows[0]["validation_accuracy"] <= 1


def test_records_without_waiting(world: World, tmp_path: Path) -> None:
    made = plan([tmp_path / "a", tmp_path / "b"])
    with Recorder(made) as recorder:
        for batch in recorder.missing_batches():
            index_B, label_B, logits_MRBK, gate_MGB = outputs(*recorder.layout.sample_range(batch))
            there = [ALONE.to_device(value) for value in (label_B, logits_MRBK, gate_MGB)]
            world.reset()
            recorder.add(batch, index_B, *there)
            assert world.waits == {}
    assert len(recorder.shards) > 0


def routed(device: torch.device, *, by_gates: bool) -> Answers:
    """What the engine says of 23 images on that device."""
    model = MultiExit(build_tiny("ViT"), range(build_tiny("ViT").num_blocks - 1)).to(device)
    heads = StackedHeads(model.feature_dims, model.positions, ["linear"], 5, [3]).to(device).requires_grad_(False)
    gates = StackedGates(len(model.positions), [3]).to(device).requires_grad_(False)
    images = torch.randn(23, *model.backbone.input_size, generator=torch.Generator().manual_seed(1)).to(device)
    engine = Engine(model, ["linear"], heads, gates, tile=1000)
    configuration = Configuration(tuple((0, 0.5 + p / 64) for p in range(len(model.positions))))
    return engine.router(None if by_gates else configuration).classify(images)


@pytest.mark.parametrize("by_gates", [False, True])
def test_the_engine_leaves_as_on_the_cpu(by_gates: bool) -> None:
    expected = routed(torch.device("cpu"), by_gates=by_gates)
    with pretend_cuda() as world:
        found = routed(CUDA, by_gates=by_gates)
    assert world.num_kernels > 0
    assert by_gates or len(set(expected.exit_index_B)) > 1
    assert (found.exit_index_B == expected.exit_index_B).all()
    assert (found.prediction_B == expected.prediction_B).all()


def test_keeps_features_and_trains_on_them(world: World, tmp_path: Path) -> None:
    model = tiny_model()[0].to(CUDA)
    data, kept = keep_features_of(point_at(tmp_path), ALONE, tiny_data(augmented=True), model)
    assert isinstance(kept, KeptExits)
    indices = range(9)
    rows = ALONE.to_device(data.plain_train.__getitems__(indices)[1])
    features, final_BK = kept.features(rows)
    expected, expected_BK = model.features(ALONE.to_device(tiny_data().train.__getitems__(indices)[1]))
    for found, wanted in zip([*features, final_BK], [*expected, expected_BK], strict=True):
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), wanted.cpu())


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most kernels of one step that are not the backbone's."""

    method: str
    model: str
    image_size: int
    num_members: int
    most: int
    head_types: tuple[str, ...] = ("linear",)


BUDGETS = (
    Budget("jei_dnn", "t2t_vit_7", 64, 28, 60),
    Budget("jei_dnn", "resnet50", 32, 28, 80),
    Budget("dyce", "resnet50", 32, 4, 224, ("linear", "mlp3x16")),
)


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: f"{budget.method} {budget.model}")
def test_kernels_of_a_head_step_are_few(budget: Budget) -> None:
    found = members_kernels(budget)
    assert found <= budget.most


def members_kernels(budget: Budget) -> int:
    """Counted on a batch of four random images of ten classes."""
    size, head_types = budget.image_size, budget.head_types
    backbone = build_backbone(budget.model, num_classes=10, image_size=size)
    costs = exit_costs(backbone, range(backbone.num_blocks - 1), list(head_types))
    split = Split(torch.randn(4, 3, size, size), torch.randint(10, (4,)), torch.arange(4))
    if budget.method == "jei_dnn":
        members = tradeoff_members([(i // 14, 0.1 * (1 + i % 14)) for i in range(budget.num_members)])
    else:
        members = seed_members(range(budget.num_members))
    with pretend_cuda() as world:
        model = MultiExit(backbone.to(CUDA), costs.positions, head_types)
        pack = Pack(model, costs, members, TRAIN, split, ALONE, 100)
        task = JeiDnnTask(pack, JOINT) if budget.method == "jei_dnn" else DyceTask(pack, DyceSettings())
        index, images, labels = split.__getitems__(range(4))
        batch = index, ALONE.to_device(images), ALONE.to_device(labels)
        task.train_step(batch, 1.0)  # that of the gates
        world.reset()
        model.features(batch[1])
        num_backbones = world.num_kernels
        world.reset()
        task.train_step(batch, 1.0)
        return world.num_kernels - num_backbones
