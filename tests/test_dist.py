"""Ranks, as processes over gloo: one device type for all or an error message, and waiting without a short time-out."""

import json
import os
import socket
import sys
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch

from dynexit.dist import _sharing, record_flights
from dynexit.errors import UserError
from dynexit.gpus import Gpus, choose_device, find_gpus
from tests.train.ranks import run_ranks

NONE = Gpus(False, "", "")
USABLE = Gpus(True, "/dev/nvidia0", "580.65.06")
UNUSABLE = Gpus(False, "/dev/nvidia0", "470.57.02")
VERSION = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021
GCC version:  gcc version 9.3.0 (Ubuntu 9.3.0-17ubuntu1~20.04)
"""
OPEN_VERSION = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (a@b)\n"


def write_root(root: Path, version: str = VERSION) -> Path:
    (root / "dev").mkdir()
    (root / "dev" / "nvidia0").write_text("")
    (root / "dev" / "nvidiactl").write_text("")
    (root / "proc/driver/nvidia").mkdir(parents=True)
    (root / "proc/driver/nvidia/version").write_text(version)
    return root


@pytest.mark.parametrize(("version", "driver"), [(VERSION, "470.57.02"), (OPEN_VERSION, "580.65.06"), ("?", "")])
def test_finds_the_gpu_and_its_driver(tmp_path: Path, version: str, driver: str) -> None:
    root = write_root(tmp_path, version)
    usable = torch.cuda.is_available()
    assert find_gpus(root) == Gpus(usable, str(root / "dev" / "nvidia0"), driver)
    assert find_gpus(root, "0,1") == find_gpus(root)
    for hidden in ("", "-1", "NoDevFiles"):
        assert find_gpus(root, hidden) == Gpus(usable, "", driver)


def test_a_gpu_that_may_not_be_opened_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "dev" / "nvidia0").mkdir(parents=True)  # opening fails, for every user
    (tmp_path / "dev" / "nvidiactl").write_text("")
    assert find_gpus(tmp_path) == Gpus(torch.cuda.is_available(), "", "")


def test_chooses_the_device() -> None:
    assert [choose_device("cpu", gpus) for gpus in (NONE, USABLE, UNUSABLE)] == ["cpu"] * 3
    assert [choose_device("auto", gpus) for gpus in (NONE, USABLE)] == ["cpu", "cuda"]
    assert choose_device("cuda", USABLE) == "cuda"


def test_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    wheel = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    for device, gpus, what in (
        ("auto", UNUSABLE, "torch cannot use the GPU /dev/nvidia0; the NVIDIA driver is 470.57.02"),
        ("cuda", UNUSABLE, "torch cannot use the GPU /dev/nvidia0; the NVIDIA driver is 470.57.02"),
        ("cuda", NONE, "torch finds no GPU; no NVIDIA driver is loaded"),
    ):
        with pytest.raises(UserError) as error:
            choose_device(device, gpus)
        assert str(error.value) == (
            f"dist.device = {device!r}: {what}, torch {torch.__version__} is {wheel}; install a driver and a wheel of "
            "torch that fit each other (a container needs the driver's libraries: --nv, --gpus), or set dist.device=cpu"
        )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match=r"torch finds no GPU \(CUDA_VISIBLE_DEVICES is ''\); no NVIDIA driver"):
        choose_device("cuda", NONE)


def test_the_flight_recorder_is_on_unless_the_user_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/"})
    record_flights(Path("/jobs/7_2_nccl_trace_"))
    record_flights()  # where the process group starts, which is later
    assert os.environ == {
        "HOME": "/",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": "/jobs/7_2_nccl_trace_",
    }
    own = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    own |= {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/own/trace_"}
    monkeypatch.setattr(os, "environ", dict(own))
    record_flights(Path("/jobs/7_2_nccl_trace_"))
    assert os.environ == own


def written(folder: Path, device: str, *gpus: Gpus) -> list[str]:
    """What each rank of tests/one_waiting_rank.py wrote."""
    command = [sys.executable, "-m", "tests.one_waiting_rank", str(folder), device]
    have = json.dumps([astuple(one) for one in gpus])
    run_ranks(len(gpus), command, timeout=60, GPUS=have)
    return [(folder / f"rank{rank}.txt").read_text() for rank in range(len(gpus))]


@pytest.mark.slow
def test_all_ranks_refuse_a_gpu_that_one_cannot_use(tmp_path: Path) -> None:
    found = written(tmp_path, "auto", NONE, NONE, UNUSABLE)
    assert found[0] == found[1] == found[2]
    assert found[0].startswith("True rank 2 on ")
    assert ": dist.device = 'auto': torch cannot use the GPU /dev/nvidia0; the NVIDIA driver is 470.57.02" in found[0]


@pytest.mark.slow
def test_all_ranks_refuse_two_device_types(tmp_path: Path) -> None:
    first, second = written(tmp_path, "auto", USABLE, NONE)
    assert first == second
    assert first.startswith("True dist.device = 'auto': rank 0 on ")
    assert " has a GPU and rank 1 on " in first
    assert first.endswith(" has none; ask for nodes of one kind, or set dist.device=cpu")


@pytest.mark.slow
def test_all_ranks_refuse_to_share_a_gpu(tmp_path: Path) -> None:
    pair = replace(USABLE, uuids=("a", "b"))
    found = written(tmp_path, "auto", pair, pair, pair)  # local rank 2 would take the first of two
    assert found[0] == found[1] == found[2]
    host = socket.gethostname()
    assert found[0] == (
        f"True rank 0 on {host} and rank 2 on {host} would share a GPU: the node shows 2 to a rank, fewer than it has "
        "ranks; ask for nodes with as many GPUs as the others, or start at most one rank per GPU "
        "(dist.tasks_per_node, torchrun --nproc-per-node)"
    )


def test_ranks_with_a_gpu_of_their_own_share_none() -> None:
    assert _sharing([("rank 0 on a", "x", 1), ("rank 1 on a", "y", 1), ("rank 2 on b", "z", 4)]) == []
    assert _sharing([("rank 0 on a", "", 0), ("rank 1 on a", "", 0)]) == []  # on CPUs


@pytest.mark.slow
def test_ranks_wait_for_longer_than_the_time_out_of_sums(tmp_path: Path) -> None:
    expected = "cpu:0 [0, 1, 2] {'from': 0} 3 rank 1 alone failed"
    assert written(tmp_path, "auto", NONE, NONE, NONE) == [expected] * 3
