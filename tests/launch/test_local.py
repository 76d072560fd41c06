"""Local workers: the jobs of this launch alone, in a folder of its own."""

import os
from pathlib import Path

import pytest

from dynexit.errors import Failure
from dynexit.jobs.planning.missing import Job
from dynexit.study.read import load_study
from launch.tasks.attempts import CRASHED, read_attempts, read_work
from launch.tasks.folder import add_array, new_folder, read_jobs, work_of
from tests.command_line import TINY, dynexit, start


def test_jobs_are_read_as_they_were_listed(tmp_path: Path) -> None:
    study = load_study(
        TINY,
        [
            f"runs_dir={tmp_path}",
            "train.method=[jei_dnn, dyce]",
            "backbone.arguments={layers: [1, 1], x: null}",
            "train.num_epochs=6",
        ],
    )
    packs = [(Job("train", study.points[::-1]), Job("record", study.points[1:3])), (Job("report", study.points),)]
    folder = new_folder(study, "slurm")
    assert folder.name == "0001"
    add_array(folder, "train", {"0": [work_of(pack) for pack in packs]})
    work = read_work(folder / "0")
    assert work is not None
    assert new_folder(study, "slurm").name == "0002"
    assert read_jobs(folder, work) == packs
    assert [point.label for point in read_jobs(folder, work)[1][0].points] == [point.label for point in study.points]
    for foreign in ({"train": ["0123456789ab"]}, {"cook": [study.points[0].id]}):
        with pytest.raises(Failure, match=rf"jobs\.json is damaged \(its study has no {next(iter(foreign))} "):
            read_jobs(folder, [foreign])


@pytest.mark.slow
def test_a_killed_worker_is_a_failure(tmp_path: Path) -> None:
    process = start(tmp_path, "prepare", TINY, "--on", "local", "dist.max_retries=0", "prepare.num_epochs=1000")
    assert process.stdout is not None
    line = process.stdout.readline()
    os.kill(int(line.split("process ")[1].split(",")[0]), 9)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert " failed: a rank was ended by SIGKILL (out of memory, perhaps) (log " in err
    attempts = read_attempts(tmp_path / "runs" / "tiny_study" / "submitted" / "0001" / "0")
    assert [(end.reason, end.status) for end in attempts.ends] == [(CRASHED, 137)]


@pytest.mark.slow
def test_a_mistake_and_a_failure_of_a_worker_are_reported(tmp_path: Path) -> None:
    text = dynexit(tmp_path, "prepare", TINY, "--on", "local", "data.num_validation=5000", status=2).stderr
    assert "data.num_validation" in text
    assert len(text.splitlines()) == 1
