"""Local workers: results of this launch alone, in JSON; nothing that lies in a run folder is unpickled."""

import os
import pickle
from pathlib import Path

import pytest

from dynexit.study.read import load_study
from launch.local import _from_json, _new_folder, _to_json
from launch.plan import Job
from tests.command_line import TINY, dynexit, start


class Planted:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return Path.write_text, (self.path, "executed")  # type: ignore[return-value]


def test_a_job_goes_through_json_unchanged() -> None:
    study = load_study(
        TINY, ["train.method=[jei_dnn, dyce]", "backbone.arguments={layers: [1, 1], x: null}", "train.num_epochs=6"]
    )
    job = Job("train", study.points)
    again = _from_json(_to_json(job))
    assert again == job
    assert [point.label for point in again.points] == [point.label for point in job.points]


@pytest.mark.slow
def test_a_killed_worker_is_a_failure_whatever_lies_in_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny_study" / "submitted"
    folder.mkdir(parents=True)
    for number in range(1000):  # where submitit kept results of processes
        with (folder / f"{os.getpid() + number}_0_result.pkl").open("wb") as file:
            pickle.dump(("success", Planted(tmp_path / "planted")), file)
    process = start(tmp_path, "prepare", TINY, "--on", "local", "dist.max_retries=0", "prepare.num_epochs=1000")
    assert process.stdout is not None
    line = process.stdout.readline()
    os.kill(int(line.split("process ")[1].split(",")[0]), 9)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("dynexit: prepare the only point failed: rank 0 was killed by SIGKILL (log ") or (
        " failed: rank 0 was killed by SIGKILL (log " in err
    )
    assert not (tmp_path / "planted").exists()


@pytest.mark.slow
def test_a_mistake_and_a_failure_of_a_worker_are_reported(tmp_path: Path) -> None:
    text = dynexit(tmp_path, "prepare", TINY, "--on", "local", "data.num_validation=5000", status=2).stderr
    assert "data.num_validation" in text
    assert len(text.splitlines()) == 1


def test_every_launch_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [_new_folder(tmp_path / "submitted") for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)
