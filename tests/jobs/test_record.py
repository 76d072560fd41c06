"""The record job: the same bits at any world size, also after a rank is killed; a damaged shard costs one pack."""

import shutil
import signal
import sys
from pathlib import Path

import pytest

from dynexit.errors import Failure
from dynexit.jobs.finished import is_recorded
from dynexit.jobs.planning.missing import missing_jobs
from dynexit.run_dir import folders_in_place
from dynexit.study.grid import Study
from dynexit.study.read import load_study
from tests.command_line import TINY, run_stage
from tests.reference.fake_outputs import contents
from tests.train.ranks import run_ranks

pytestmark = pytest.mark.slow

OVERRIDES = ("seed=[0]", "jei_dnn.ce_ic_tradeoff=[0.1, 1, 5]", "record.batch_size=10", "record.samples_per_shard=20")
FEW = ("prepare.num_epochs=1", "train.num_epochs=3")


def load(runs_dir: Path, *more: str) -> Study:
    return load_study(TINY, [f"runs_dir={runs_dir}", *OVERRIDES, *FEW, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with a study that is trained and not recorded."""
    runs_dir = tmp_path_factory.mktemp("trained")
    study = load(runs_dir)
    run_stage("prepare", study.points)
    run_stage("train", study.points)
    return runs_dir


def record(runs_dir: Path, world_size: int, **settings: object) -> list[int]:
    command = [sys.executable, "-m", "tests.jobs.one_record_rank", str(runs_dir), *OVERRIDES, *FEW]
    return run_ranks(world_size, command, **settings)  # type: ignore[arg-type]


def records(runs_dir: Path) -> dict[str, dict[str, bytes]]:
    """The contents of every record of the study, which must be complete."""
    study = load(runs_dir)
    assert all(is_recorded(point, check_bytes=True) for point in study.points)
    folder = study.directory / "record"
    return {str(path.parent.relative_to(folder)): contents(path.parent) for path in folder.rglob("manifest.json")}


@pytest.mark.timeout(600)
def test_world_sizes_1_2_and_3_record_the_same_bits(trained: Path, tmp_path: Path) -> None:
    found = []
    for world_size in (1, 2, 3):
        runs_dir = shutil.copytree(trained, tmp_path / str(world_size))
        record(runs_dir, world_size)
        found.append(records(runs_dir))
        shards = list(runs_dir.rglob("shard-*"))
        assert len(shards) == {1: 8 + 8, 2: 8 + 8, 3: 9 + 9}[world_size]  # 15 and 16 batches, shards of 2
    assert len(found[0]) == 3 * 2
    assert found[0] == found[1] == found[2]
    # a rank is killed; the others notice, and two go on with what three had complete
    runs_dir = shutil.copytree(trained, tmp_path / "killed")
    assert record(runs_dir, 3, may_fail=True, timeout=120, KILL="1 5") == [1, -signal.SIGKILL, 1]
    left = {path: path.stat().st_mtime_ns for path in runs_dir.rglob("shard-*")}
    assert not list(runs_dir.rglob("record/*/*/manifest.json"))
    record(runs_dir, 2)
    assert records(runs_dir) == found[0]
    kept = [path for path in left if path.exists() and path.stat().st_mtime_ns == left[path]]
    assert len(kept) == 9 + 9 - 2  # of 6 shards of the killed rank the fifth was in no manifest
    assert not [path for path in runs_dir.rglob("*") if path.name.endswith(".tmp") or path.name.startswith("manifest-")]


def test_a_damaged_shard_costs_its_pack_alone(trained: Path, tmp_path: Path) -> None:
    runs_dir = shutil.copytree(trained, tmp_path / "runs")
    study = load(runs_dir, "dist.members_per_pack=2")
    jobs = missing_jobs(study, "record")
    assert [len(job.points) for job in jobs] == [2, 1]
    for job in jobs:
        run_stage("record", job.points)
    before = records(runs_dir)
    (path, *_) = sorted((study.directory / "shards").glob("*/shard-000000-000001.safetensors"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(Failure, match=f"{path} has .* bytes instead of .*; move it aside with `mv {path.parent} "):
        missing_jobs(study, "record", check_bytes=True)
    path.parent.rename(f"{path.parent}.damaged")
    (again,) = missing_jobs(study, "record", check_bytes=True)
    assert again.points in [job.points for job in jobs]
    run_stage("record", again.points)
    assert records(runs_dir) == before
    assert len(folders_in_place(study.directory / "shards")) == 4
