"""What a study's folder says of the work before: which configuration it belongs to, which packs were begun."""

import json
import subprocess
from pathlib import Path

import pytest

from dynexit.errors import Failure, UserError
from dynexit.jobs.finished import unfinished_packs
from dynexit.jobs.planning.checks import check_identity
from dynexit.study.read import load_study
from launch.lock import hold
from launch.status import study_status, whole_status
from tests.command_line import ROOT, TINY, dynexit


def test_a_folder_belongs_to_a_configuration_once_a_job_began(tmp_path: Path) -> None:
    wrong = load_study(TINY, [f"runs_dir={tmp_path}", "data.num_validation=1400"])
    right = load_study(TINY, [f"runs_dir={tmp_path}"])
    check_identity(wrong)
    check_identity(right)
    (right.directory / "prepare").mkdir()
    with pytest.raises(UserError, match=r"data\.num_validation was 150 there and is 1400 now; choose another folder"):
        check_identity(wrong)
    check_identity(right)
    changes = ("train.num_epochs=9", "exits.positions=[0]", "jei_dnn.head_loss=single", "record.topk=2", "seed=7")
    for override in (*changes, "train.method=boosted", "search.normalize=true"):
        other = load_study(TINY, [f"runs_dir={tmp_path}", override])
        check_identity(other)
        assert {point.ids["prepare"] for point in other.points} == {right.points[0].ids["prepare"]}


def test_a_pack_with_a_damaged_list_is_moved_aside_by_the_remedy_once(tmp_path: Path) -> None:
    study = load_study(TINY, [f"runs_dir={tmp_path}"])
    pack = study.directory / "pack" / "0123abcd"
    pack.mkdir(parents=True)
    (pack / ".begun").touch()
    (pack / "members.json").write_text('["a", "b')
    for look in (lambda one: unfinished_packs(one.directory), study_status):
        with pytest.raises(
            Failure, match=r"members\.json is damaged \(Invalid JSON: .*\); move it aside with `mv "
        ) as caught:
            look(study)
    subprocess.run(str(caught.value).split("`")[1], shell=True, check=True)
    assert unfinished_packs(study.directory) == []
    assert {status.state for status in study_status(study)} == {"waiting"}


def test_help_names_no_list_of_choices() -> None:
    assert "{" not in dynexit(ROOT, "--help").stdout.splitlines()[0]


def test_what_was_interrupted_is_named(tmp_path: Path) -> None:
    study = load_study(TINY, [f"runs_dir={tmp_path}"])
    assert not whole_status(study).is_idle  # nothing was begun
    prepare = study.directory / "prepare" / study.points[0].ids["prepare"]
    prepare.mkdir(parents=True)
    progress = {"step": 7, "num_steps": 12, "figures": {"loss": "0.25"}, "images_per_second": 80.0, "seconds_left": 9.0}
    (prepare / "progress.json").write_text(json.dumps(progress))
    status = whole_status(study)
    assert {(one.state, one.step, one.figures) for one in status.points} == {
        ("prepare interrupted", "7/12", "loss 0.25")
    }
    assert status.is_idle
    with hold(study.directory):
        status = whole_status(study)
    assert {one.state for one in status.points} == {"waiting (prepare running)"}
    assert {one.figures for one in status.points} == {"loss 0.25 80 images/s 9 s left"}
    assert not status.is_idle


def test_status_shows_the_command_that_resumes(tmp_path: Path) -> None:
    study = load_study(TINY, [f"runs_dir={tmp_path}"])
    prepare = study.directory / "prepare" / study.points[0].ids["prepare"]
    prepare.mkdir(parents=True)
    (prepare / "log.txt").write_text("step 1\n")
    first = dynexit(tmp_path, "status", TINY, f"runs_dir={tmp_path}").stdout.splitlines()[0]
    assert first == f"dynexit: nothing of this study runs; it resumes with: dynexit run {TINY} runs_dir={tmp_path}"
