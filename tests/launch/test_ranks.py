"""Two ranks on one machine, however they are started, agree with one process."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dynexit.errors import UserError
from dynexit.study.dist import DistSettings
from launch.__main__ import main
from launch.local import _places
from tests.command_line import ENVIRONMENT, TINY, digests, dynexit, start
from tests.conftest import require

# the last batch of an epoch has one sample: one of the ranks has none of it
UNEVEN = ("sweep.seed=[0]", "jei_dnn.ce_ic_tradeoff=[0.1, 5]", "train.global_batch_size=101", "report.mlflow=false")
UNEVEN += ("prepare.num_epochs=1", "train.num_epochs=3", "dist.checkpoint_seconds=60")
STARTERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "-m", "launch"],
    "accelerate": [
        "accelerate.commands.launch",
        "--multi_gpu",  # without it, it starts one process where there is no GPU
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "-m",
        "launch",
    ],
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that one process has done."""
    folder = tmp_path_factory.mktemp("one_process")
    dynexit(folder, "run", TINY, *UNEVEN)
    return folder / "runs" / "tiny_study"


def assert_close(study: Path, reference: Path) -> None:
    """Weights within 1e-4 relative or 1e-5 absolute, figures of the epochs within 1e-4 relative."""
    folders = sorted((reference / "train").iterdir())
    assert len(folders) == 2
    for folder in folders:
        one, two = (
            load_file(folder / "heads.safetensors"),
            load_file(study / "train" / folder.name / "heads.safetensors"),
        )
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
        for left, right in zip(figures(folder), figures(study / "train" / folder.name), strict=True):
            assert right == pytest.approx(left, rel=1e-4)


def kill_a_rank(launcher: int) -> None:
    """kill -9 of the second rank as soon as there is one: the first waits for it from then on."""
    while True:
        for rank in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if rank.environ().get("RANK") == "1":
                    rank.kill()
                    return
        time.sleep(0.1)


def figures(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [value for line in lines for value in json.loads(line).values() if isinstance(value, float)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_accelerate_and_local_ranks_agree_with_one_process(one_process: Path, tmp_path: Path) -> None:
    for name, starter in STARTERS.items():
        folder = tmp_path / name
        shutil.copytree(one_process / "prepare", folder / "runs" / "tiny_study" / "prepare")
        stage = "train" if name == "accelerate" else "run"
        command = [sys.executable, "-m", *starter, stage, str(TINY), *UNEVEN]
        done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert_close(folder / "runs" / "tiny_study", one_process)
    of_each = [digests(tmp_path / name / "runs" / "tiny_study") for name in STARTERS]
    trained, expected = ({name: of[name] for name in of if name.startswith("train/")} for of in of_each)
    assert trained == expected != {}
    assert trained != {name: of for name, of in digests(one_process).items() if name in trained}  # ranks sum otherwise
    folder = tmp_path / "local"
    shutil.copytree(one_process / "prepare", folder / "runs" / "tiny_study" / "prepare")
    running = start(folder, "run", TINY, *UNEVEN, "dist.tasks_per_node=2", "--on", "local")
    kill_a_rank(running.pid)
    said, complaints = running.communicate(timeout=300)
    assert running.returncode == 0, complaints
    assert said.count("train 2 points: process") == 2
    assert ", 2 ranks, log" in said
    assert "; tried again" in said
    assert digests(folder / "runs" / "tiny_study") == digests(tmp_path / "torchrun" / "runs" / "tiny_study")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_that_fit_the_backbone_together_leave_what_one_process_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(find_spec("deepspeed") is not None, "DeepSpeed is not installed (the extra `deepspeed`)")
    text = yaml.safe_load(TINY.read_text())
    tokens = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 8}
    text["backbone"] = {"name": "vit_tiny_patch16_224", "arguments": tokens}
    study = tmp_path / "vit.yaml"
    study.write_text(yaml.safe_dump(text))
    few = ["prepare.num_epochs=1", "prepare.global_batch_size=600", "dist.checkpoint_seconds=60"]
    together = ["dist.prepare_on_all_ranks=true", *few]
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", str(study), *together]) == 0
    command = [sys.executable, "-m", *STARTERS["torchrun"], "prepare", str(study), *together, "name=torchrun"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    zero = (*few, "dist.tasks_per_node=2", "dist.deepspeed_stage=3", "name=zero")
    said = dynexit(tmp_path, "prepare", study, *zero, "--on", "local").stdout
    assert ", 2 ranks, log" in said
    one, *others = (
        load_file(next((tmp_path / "runs" / name / "prepare").glob("*/backbone.safetensors")))
        for name in ("vit", "torchrun", "zero")
    )
    for other in others:
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(others[0][name], value) for name, value in one.items())  # ranks add in another order


@pytest.mark.slow
def test_a_second_launcher_is_told_who_holds_the_study(one_process: Path, tmp_path: Path) -> None:
    shutil.copytree(one_process / "prepare", tmp_path / "runs" / "tiny_study" / "prepare")
    first = start(tmp_path, "run", TINY, *UNEVEN, "train.num_epochs=1000")
    lock = tmp_path / "runs" / "tiny_study" / ".lock"
    try:
        while not (lock.is_file() and lock.read_text()):
            assert first.poll() is None
        second = dynexit(tmp_path, "run", TINY, *UNEVEN, "train.num_epochs=1000", status=2).stderr
    finally:
        first.kill()
        first.communicate()
    assert f"runs/tiny_study is held by process {first.pid} on " in second
    assert second.endswith("; wait for it or stop it\n")


def test_one_process_a_node_prints_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(4):  # two on each of two nodes
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        assert main(["run", "nowhere.yaml"]) == 2
        text = "dynexit: there is no study nowhere.yaml; give the path of a YAML file, as configs/digits.yaml\n"
        assert capsys.readouterr().err == (text if rank in (0, 2) else "")
        for command in (["config", str(TINY)], ["run", str(TINY), "--dry-run"]):
            assert main(command) == 0
            assert bool(capsys.readouterr().out) == (rank == 0)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_mistake_that_ranks_share_is_printed_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", *STARTERS["torchrun"], "run", str(TINY), *UNEVEN, "dist.device=cuda"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("dynexit: ")]
    assert len(lines) == 1, done.stderr


def test_each_local_job_gets_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5,7")
    assert _places(DistSettings(), 2) == [[0, 1], [2, 5]]
    assert _places(DistSettings(), 1) == [[0], [1], [2], [5], [7]]
    with pytest.raises(
        UserError, match=r"dist\.tasks_per_node = 6: should be at most 5, the GPUs that are visible here"
    ):
        _places(DistSettings(), 6)
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    assert _places(DistSettings(device="cpu", num_threads=2), 3) == [[], []]
    assert _places(DistSettings(device="cpu"), 1) == [[]]
