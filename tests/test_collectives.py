"""Two ranks over gloo, forked: what they send each other, and what they say when they differ."""

import dataclasses
import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dynexit import run_dir
from dynexit.dist import Ranks
from dynexit.errors import Failure, UserError
from dynexit.gpus import own_gpu
from dynexit.jobs import load
from dynexit.memory import naming_memory
from dynexit.run_dir import BACKBONE, DONE, RunDir, move_aside
from dynexit.study.grid import Point
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.read import load_study
from dynexit.study.schema import TrainSettings
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.optimizers import clone
from tests.command_line import TINY, run_stage
from tests.train.tiny import tiny_pack, tiny_split, tradeoff_members

TENSORS = {
    "weight": torch.randn(3, 5).T,
    "half": torch.randn(4).to(torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "count": torch.tensor(7),
    "none": torch.empty(0, 3),
}


def on_two_ranks(tmp_path: Path, what: Callable[[Ranks], Any]) -> list[Any]:
    """What `what` returns on each of two ranks."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        queue.put((rank, what(Ranks(rank, 2, torch.device("cpu")))))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    processes = [context.Process(target=work, args=(rank,)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [found[0], found[1]]


def test_broadcasts_tensors_of_every_kind(tmp_path: Path) -> None:
    def receive(ranks: Ranks) -> bool:
        received = ranks.broadcast_tensors(TENSORS if ranks.is_main else {})
        same = [
            received[name].dtype == value.dtype and torch.equal(received[name], value)
            for name, value in TENSORS.items()
        ]
        return list(received) == list(TENSORS) and all(same)

    assert on_two_ranks(tmp_path, receive) == [True, True]


def test_ranks_with_other_weights_fail_together(tmp_path: Path) -> None:
    def compare(ranks: Ranks) -> tuple[str, bool]:
        ranks.check_same("weights at the start", TENSORS)
        other = {**TENSORS, "count": torch.tensor(7 + ranks.global_rank)}
        try:
            ranks.check_same("weights at the start", other)
        except Failure as failure:
            return str(failure), failure.on_all_ranks
        return "", False

    (text, together), of_rank_1 = on_two_ranks(tmp_path, compare)
    assert (text, together) == of_rank_1
    assert together
    assert text.startswith("weights at the start of rank 1 (")
    assert "differ from those of rank 0 (" in text
    assert text.endswith("compare the shared folder and the versions of Python's packages on them")


def test_one_rank_checks_the_backbone_and_counts_macs(tmp_path: Path) -> None:
    point = prepared(tmp_path)
    _, alone = load.load_model(point, Ranks(0, 1, torch.device("cpu")))

    def calls(ranks: Ranks) -> tuple[bool, list[str]]:
        made = []
        for module, name in ((run_dir, "sha256_file"), (load, "costs_of")):
            function = getattr(module, name)
            setattr(module, name, lambda *args, f=function, n=name: (made.append(n), f(*args))[1])
        model, costs = load.load_model(point, ranks)
        ranks.check_same("weights", model.state_dict())
        return costs == alone, made

    num_files = len(RunDir(point, "prepare").read_json(DONE)["files"])
    assert on_two_ranks(tmp_path, calls) == [(True, ["sha256_file"] * num_files + ["costs_of"]), (True, [])]


@pytest.mark.parametrize("where", ["backbone", "data"])
def test_what_one_rank_cannot_load_fails_on_all(tmp_path: Path, where: str) -> None:
    point = prepared(tmp_path)
    weights = RunDir(point, "prepare") / BACKBONE
    if where == "backbone":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")

    def begin(ranks: Ranks) -> tuple[str, bool]:
        load.ranks_of = lambda config: ranks
        if where == "data" and not ranks.is_main:
            load.load_data = missing
        try:
            load.begin(point)
        except (Failure, UserError) as error:
            return str(error), error.on_all_ranks
        return "", False

    first, second = on_two_ranks(tmp_path, begin)
    expected = "no images" if where == "data" else f"{weights} was altered (its SHA-256 is not the one in DONE); "
    assert first == second
    assert first == (expected + move_aside(weights.parent) * (where == "backbone"), True)


def missing(*_: object, **__: object) -> None:
    raise UserError("no images")


def prepared(folder: Path) -> Point:
    point = load_study(TINY, [f"runs_dir={folder}", "prepare.num_epochs=0"]).points[0]
    run_stage("prepare", [point])
    return point


def test_updates_taken_late_have_the_same_bits(tmp_path: Path) -> None:
    def step(ranks: Ranks) -> tuple[bool, bool, bool]:
        found = []
        for late in (False, True):
            pack = tiny_pack(tradeoff_members([(0, 0.05), (1, 0.3)]), TrainSettings(global_batch_size=12))
            task = JeiDnnTask(dataclasses.replace(pack, ranks=ranks), JeiDnnSettings(max_warm_up_epochs=0))
            before = clone(task.optimizers["gates"].stack)
            for start in range(0, 48, 12):
                rows = ranks.share(range(start, start + 12))
                task.train_step(tiny_split().__getitems__(rows), len(rows) / 12)
                if not late:
                    task.settle()
                elif not start:
                    is_under_way = same(before, task.optimizers["gates"].stack)
            found.append(task.state()[0])
        moved = not same(before, task.optimizers["gates"].stack)
        return same(*found), is_under_way, moved

    assert on_two_ranks(tmp_path, step) == [(True, True, True)] * 2


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_flags_are_sent_now_and_read_later(tmp_path: Path) -> None:
    def ask(ranks: Ranks) -> list[list[bool]]:
        first = ranks.start_any([ranks.global_rank == 1, False])
        second = ranks.start_any([False, ranks.is_main])  # under way while the first is not read
        return [first(), second(), ranks.any([False, False])]

    expected = [[True, False], [False, True], [False, False]]
    assert on_two_ranks(tmp_path, ask) == [expected, expected]


@pytest.mark.parametrize(("local_rank", "num_gpus", "index"), [(0, 1, 0), (3, 1, 0), (3, 4, 3)])
def test_a_rank_takes_its_gpu(monkeypatch: pytest.MonkeyPatch, local_rank: int, num_gpus: int, index: int) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert own_gpu() == torch.device("cuda", index)


def test_a_lack_of_memory_names_what_to_lower() -> None:
    with pytest.raises(Failure) as caught, naming_memory(28, "train.global_batch_size"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    assert str(caught.value) == (
        "out of memory with 28 points in one pack (CUDA out of memory. Tried to allocate 2.00 GiB.); set "
        "dist.members_per_pack below 28, or train.global_batch_size lower"
    )
    assert not caught.value.is_transient
    alone = naming_memory(1, "record.batch_size")
    with pytest.raises(Failure, match=r"^out of memory \(.*\); set record.batch_size lower"), alone:
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="shape"), naming_memory(1, "record.batch_size"):
        torch.ones(2) @ torch.ones(3, 3)
