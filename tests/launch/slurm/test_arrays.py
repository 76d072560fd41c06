"""Arrays and dependencies of a sweep: everything once, within the limits, nothing twice."""

from pathlib import Path

import pytest

from dynexit.errors import UserError
from dynexit.study.grid import Study
from dynexit.study.read import load_study
from launch.slurm.arrays import Array, plan_arrays, resolve
from launch.slurm.cluster import Limits
from launch.slurm.site import Site
from launch.slurm.submit import describe_submission

ALL = ("prepare", "train", "record", "search", "report")
TINY = Path(__file__).parents[2] / "tiny_study.yaml"


def study(folder: Path, *overrides: str) -> Study:
    return load_study(TINY, [f"runs_dir={folder}", "dist.members_per_pack=1", *overrides])


def stages(arrays: list[Array]) -> list[tuple[str, int]]:
    return [(array.stage, len(array.tasks)) for array in arrays]


def test_a_fresh_sweep(tmp_path: Path) -> None:
    one = study(tmp_path)
    arrays = plan_arrays(one, ALL, Limits(1001, None), {})
    assert stages(arrays) == [("prepare", 1), ("train", 6), ("record", 6), ("report", 1)]
    assert [array.after for array in arrays] == [
        (),
        (("afterok", 0),),
        (("aftercorr", 1),),
        (("afterany", 2),),
    ]
    assert [[job.stage for job in jobs] for jobs in arrays[2].tasks] == [["record", "search"]] * 6
    for train, record in zip(arrays[1].tasks, arrays[2].tasks, strict=True):  # aftercorr binds task i to task i
        assert [p.id for p in train[0].points] == [p.id for p in record[0].points] == [p.id for p in record[1].points]
    assert stages(plan_arrays(one, ALL[:2], Limits(1001, None), {})) == [("prepare", 1), ("train", 6)]


@pytest.mark.parametrize("new_jobs", [None, *range(4, 16)])
@pytest.mark.parametrize("array_size", [1, 2, 4, 1001])
def test_every_point_exactly_once_within_any_limits(tmp_path: Path, array_size: int, new_jobs: int | None) -> None:
    one = study(tmp_path)
    arrays = plan_arrays(one, ALL, Limits(array_size, new_jobs), {})
    assert all(1 <= len(array.tasks) <= array_size for array in arrays)
    assert all(jobs for array in arrays for jobs in array.tasks)
    if new_jobs is not None:
        assert sum(len(array.tasks) for array in arrays) <= new_jobs
    for stage in ("train", "record", "search"):
        ids = [p.id for a in arrays for jobs in a.tasks for job in jobs if job.stage == stage for p in job.points]
        assert sorted(ids) == sorted(point.id for point in one.points)
    for i, array in enumerate(arrays):
        assert all(isinstance(which, int) and which < i for _, which in array.after)


def test_no_room_in_the_queue(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the queue has room for 3 more jobs of yours and the study needs 4 at once"):
        plan_arrays(study(tmp_path), ALL, Limits(1001, 3), {})


def test_what_is_in_the_queue_is_not_submitted_again(tmp_path: Path) -> None:
    one = study(tmp_path)
    live = {("prepare", one.points[0].ids["prepare"]): "70"}
    live |= {("train", point.id): f"71_{i}" for i, point in enumerate(one.points[:4])}
    live |= {("record", point.ids["search"]): f"72_{i}" for i, point in enumerate(one.points[:3])}
    arrays = plan_arrays(one, ALL, Limits(1001, None), live)
    assert stages(arrays) == [("train", 2), ("record", 2), ("record", 1), ("report", 1)]
    assert arrays[0].after == (("afterok", "70"),)
    assert arrays[2].after == (("afterany", "71"),)  # trained by a queued job, recorded by none
    assert arrays[3].after == (("afterany", 1), ("afterany", 2), ("afterany", "72"))
    trained = [point.id for jobs in arrays[0].tasks for point in jobs[0].points]
    assert trained == [point.id for point in one.points[4:]]


def test_one_of_several_backbones_may_fail_alone(tmp_path: Path) -> None:
    arrays = plan_arrays(study(tmp_path, "sweep.data.noise=[0.1, 0.2]"), ALL, Limits(1001, None), {})
    assert stages(arrays)[:2] == [("prepare", 2), ("train", 12)]
    assert arrays[1].after == (("afterany", 0),)


def test_searches_of_one_record_stay_in_one_task(tmp_path: Path) -> None:
    one = study(tmp_path, "sweep.search.num_random_starts=[0, 1]")
    arrays = plan_arrays(one, ALL, Limits(1001, None), {})
    assert stages(arrays)[1:3] == [("train", 6), ("record", 6)]
    assert [[len(job.points) for job in jobs] for jobs in arrays[2].tasks] == [[1, 2]] * 6


def test_dependencies_as_sbatch_takes_them() -> None:
    after = (("afterok", 0), ("aftercorr", 1), ("afterany", "9"))
    assert resolve(after, ["5", "6"], lambda i: i == 1) == "afterok:5,aftercorr:6,afterany:9"
    assert resolve(after, ["5", "6"], lambda i: False) == "afterok:5,afterok:6,afterany:9"
    assert resolve((), [], lambda i: False) == ""


def test_the_text_of_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM here
    one = study(tmp_path, "dist.nodes=2", "dist.tasks_per_node=4", "dist.max_retries=3")
    site = Site(partition="gpu", gpus_per_node=4, mem_gb=1.5, time_minutes=60, container="apptainer exec i.sif")
    text = describe_submission(one, ALL, site)
    assert "no cluster answers here" in text
    assert "queue: 4 submissions, 14 jobs" in text
    # 12 packs on 2 x 4 GPUs, and one for the backbone
    assert "expected: 97.0 GPU-hours if every pack takes the whole 60 minutes of the time limit; less" in text
    in_turn = describe_submission(one, ALL, site.model_copy(update={"max_submit_jobs": 8}))
    assert "train: 3 tasks, 6 packs" in in_turn
    assert "expected: 97.0 GPU-hours" in in_turn
    prepare, train, _, report = text.split("\n<")[1:]
    for line in ("--array=0-5%6", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--mem=1536M", "--requeue"):
        assert f"#SBATCH {line}\n" in train
    assert "#SBATCH --dependency='afterok:<0>'\n" in train
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in train
    assert "#SBATCH --signal=USR2@120\n" in train
    assert "--kill-on-bad-exit=1" in train
    assert "apptainer exec i.sif" in train
    assert "\ntries=3; " in train
    assert "#SBATCH --gpus-per-node=1\n" in prepare
    assert "gpus-per-node" not in report
    assert "#SBATCH --nodes=1\n" in report
