"""Arrays and dependencies of a sweep: everything once, within the limits, nothing twice."""

import itertools
from pathlib import Path

import pytest

from dynexit.errors import UserError
from dynexit.study.grid import Study
from dynexit.study.read import load_study
from launch.slurm.arrays import Array, _num_tasks, plan_arrays, resolve
from launch.slurm.cluster import Limits
from launch.slurm.site import Site, StageSite
from launch.slurm.submit import describe_submission

ALL = ("prepare", "train", "record", "search", "report")
TINY = Path(__file__).parents[2] / "tiny_study.yaml"


def study(folder: Path, *overrides: str) -> Study:
    return load_study(TINY, [f"runs_dir={folder}", "dist.members_per_pack=1", *overrides])


def stages(arrays: list[Array]) -> list[tuple[str, int]]:
    return [(array.stage, len(array.tasks)) for array in arrays]


def ids_of(array: Array, stage: str) -> list[list[str]]:
    """Of each task the points that its packs do `stage` for."""
    return [[p.id for pack in packs for job in pack if job.stage == stage for p in job.points] for packs in array.tasks]


def test_a_fresh_sweep(tmp_path: Path) -> None:
    one = study(tmp_path)
    arrays = plan_arrays(one, ALL, Limits(1001, None), {}, {})
    assert stages(arrays) == [("prepare", 1), ("train", 6), ("search", 6), ("report", 1)]
    assert [array.after for array in arrays] == [(), (0,), (1,), (2,)]
    assert [[[job.stage for job in pack] for pack in packs] for packs in arrays[1].tasks] == [[["train", "record"]]] * 6
    assert ids_of(arrays[1], "train") == ids_of(arrays[1], "record") == ids_of(arrays[2], "search")
    assert stages(plan_arrays(one, ALL[:2], Limits(1001, None), {}, {})) == [("prepare", 1), ("train", 6)]
    work = arrays[1].work()[0][0]
    assert work == {"train": [one.points[0].ids["train"]], "record": [one.points[0].ids["record"]]}


def recorded(array: Array) -> set[str]:
    """The ids of the records that the array makes."""
    return {p.ids["record"] for packs in array.tasks for pack in packs for job in pack for p in job.points}


@pytest.mark.parametrize("new_jobs", [None, *range(4, 16)])
@pytest.mark.parametrize("array_size", [1, 2, 4, 1001])
def test_every_point_exactly_once_within_any_limits(tmp_path: Path, array_size: int, new_jobs: int | None) -> None:
    one = study(tmp_path)
    arrays = plan_arrays(one, ALL, Limits(array_size, new_jobs), {}, {})
    assert all(1 <= len(array.tasks) <= array_size for array in arrays)
    assert all(pack for array in arrays for packs in array.tasks for pack in packs)
    if new_jobs is not None:
        assert sum(len(array.tasks) for array in arrays) <= new_jobs
    for stage in ("train", "record", "search"):
        ids = [point for array in arrays for task in ids_of(array, stage) for point in task]
        assert sorted(ids) == sorted(point.id for point in one.points)
    for i, array in enumerate(arrays):
        assert all(isinstance(which, int) and which < i for which in array.after)


@pytest.mark.parametrize("new_jobs", [None, *range(6, 14)])
def test_cascades_wait_for_the_records_of_all_networks(tmp_path: Path, new_jobs: int | None) -> None:
    one = study(tmp_path, "seed=0", "baselines.static=[{channels: [4, 5, 6, 7]}]", "baselines.cascade=true")
    arrays = plan_arrays(one, ALL, Limits(2, new_jobs), {}, {})
    assert new_jobs is None or sum(len(array.tasks) for array in arrays) <= new_jobs
    for stage in ("train", "record", "search"):
        ids = [point for array in arrays for task in ids_of(array, stage) for point in task]
        assert sorted(ids) == sorted(point.id for point in one.all_points)
    for array in (array for array in arrays if array.stage == "search"):
        searched = [p for packs in array.tasks for pack in packs for job in pack for p in job.points]
        read = {identity for p in searched for identity in (p.ids["record"], *p.networks)}
        trainings = {i for i, before in enumerate(arrays) if before.stage == "train" and recorded(before) & read}
        assert set(array.after) == trainings
    assert set(arrays[-1].after) == {i for i, array in enumerate(arrays) if array.stage == "search"}


def test_no_room_in_the_queue(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the queue has room for 3 more jobs of yours and the study needs 4 at once"):
        plan_arrays(study(tmp_path), ALL, Limits(1001, 3), {}, {})


def test_the_parts_of_a_short_queue_never_exceed_it() -> None:
    for new_jobs, packs, alone, cost in itertools.product(range(5, 60), (0, 1, 5, 20), (0, 1, 7), (1, 2)):
        for_packs, for_alone = _num_tasks(Limits(1001, new_jobs), 2, packs, cost, alone)
        assert (for_packs > 0, for_alone > 0) == (packs > 0, alone > 0)
        assert for_packs <= packs
        assert for_alone <= alone
        assert 2 + cost * for_packs + for_alone <= new_jobs
        if 2 + cost * packs + alone <= new_jobs:
            assert (for_packs, for_alone) == (packs, alone)


def test_queued_work_is_not_submitted_again(tmp_path: Path) -> None:
    one = study(tmp_path)
    live = {("prepare", one.points[0].ids["prepare"]): "70"}
    live |= {("train", point.id): f"71_{i}" for i, point in enumerate(one.points[:4])}
    live |= {("record", point.ids["record"]): f"71_{i}" for i, point in enumerate(one.points[:3])}
    live |= {("search", point.ids["search"]): f"72_{i}" for i, point in enumerate(one.points[:2])}
    arrays = plan_arrays(one, ALL, Limits(1001, None), live, {})
    assert stages(arrays) == [("train", 3), ("search", 3), ("search", 1), ("report", 1)]
    assert [array.after for array in arrays] == [("70", "71"), (0,), ("71",), (1, 2, "72")]
    assert ids_of(arrays[0], "train") == [[point.id] for point in one.points[4:]] + [[]]
    assert ids_of(arrays[0], "record") == [[one.points[i].id] for i in (4, 5, 3)]
    assert ids_of(arrays[1], "search") == ids_of(arrays[0], "record")
    assert ids_of(arrays[2], "search") == [[one.points[2].id]]


def test_new_work_waits_for_queued_work_on_the_same_folder(tmp_path: Path) -> None:
    """As after a training that failed, whose search still waits for the others of its array."""
    one = study(tmp_path)
    live = {("search", one.points[0].ids["search"]): "72_0"}
    arrays = plan_arrays(one, ALL, Limits(1001, None), live, {})
    assert stages(arrays) == [("prepare", 1), ("train", 6), ("search", 6), ("report", 1)]
    assert arrays[2].after == (1, "72")


def test_work_of_cancelled_jobs_starts_when_they_have_ended(tmp_path: Path) -> None:
    one = study(tmp_path)
    ending = {("train", one.points[0].ids["train"]): "71_0"}
    arrays = plan_arrays(one, ALL, Limits(1001, None), {}, ending)
    assert stages(arrays) == [("prepare", 1), ("train", 6), ("search", 6), ("report", 1)]
    assert arrays[1].after == (0, "71")


def test_several_records_of_one_training_share_its_task(tmp_path: Path) -> None:
    one = study(tmp_path, "sweep.search.num_random_starts=[0, 1]")
    arrays = plan_arrays(one, ALL, Limits(1001, None), {}, {})
    assert stages(arrays)[1:3] == [("train", 6), ("search", 6)]
    assert [len(ids) for ids in ids_of(arrays[1], "record")] == [1] * 6
    assert [len(ids) for ids in ids_of(arrays[2], "search")] == [2] * 6


def test_dependencies_in_the_form_of_sbatch() -> None:
    assert resolve((0, 1, "9"), ["5", "6"]) == "afterany:5:6:9"
    assert resolve((), []) == ""


def test_the_text_of_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no SLURM here
    one = study(tmp_path, "dist.nodes=2", "dist.tasks_per_node=4", "dist.max_retries=3")
    own = {"search": StageSite(partition="cpu", cpus=6)}
    site = Site(partition="gpu", gpus_per_node=4, mem_gb=1.5, time_minutes=60, container="apptainer exec i.sif")
    site = site.model_copy(update={"stages": own})
    text = describe_submission(one, ALL, site)
    assert "no cluster answers here" in text
    assert "queue: 4 submissions, 14 jobs" in text
    # 6 packs on 2 x 4 GPUs, and one GPU for the backbone
    assert "expected: 49.0 GPU-hours if every pack takes the whole 60 minutes of the time limit; less" in text
    in_turn = describe_submission(one, ALL, site.model_copy(update={"max_submit_jobs": 8}))
    assert "train: 3 tasks, 6 packs" in in_turn
    assert "expected: 49.0 GPU-hours" in in_turn
    prepare, train, search, report = text.split("\n<")[1:]
    for line in ("--array=0-5%6", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--mem=1536M", "--requeue"):
        assert f"#SBATCH {line}\n" in train
    assert "#SBATCH --dependency='afterany:<0>'\n" in train
    assert "#SBATCH --signal=USR2@120\n" in train
    assert "--kill-on-bad-exit=1" in train
    assert "apptainer exec i.sif" in train
    assert '"max_retries": 3' in train
    assert "#SBATCH --gpus-per-node=1\n" in prepare
    for alone in (search, report):
        assert "gpus-per-node" not in alone
        assert "#SBATCH --nodes=1\n" in alone
        assert "#SBATCH --partition=cpu\n" in alone
    assert "#SBATCH --cpus-per-task=6\n" in search


def test_percent_signs_in_paths_are_escaped(tmp_path: Path) -> None:
    text = describe_submission(study(tmp_path / "50%_%j"), ALL, Site())
    assert f"#SBATCH --output={tmp_path}/50%%_%%j/tiny_study/slurm/NNNN/%A_%a_0_log.out\n" in text
    assert f"srun --unbuffered --output={tmp_path}/50%%_%%j/tiny_study/slurm/NNNN/%A_%a_%t_log.out" in text


def test_control_characters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runs_dir = '.*a\\ntouch b/tiny_study': holds a control character"):
        describe_submission(load_study(TINY, [f'runs_dir="{tmp_path}/a\\ntouch b"']), ALL, Site())
