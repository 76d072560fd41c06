"""The commands that follow a study take its YAML file or the folder in which it was run."""

import itertools
import json
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from dynexit.report.tracking import default_tracking_uri, log_study
from dynexit.run_dir import RunDir
from dynexit.study.grid import Study
from dynexit.study.read import load_study, resolved_yaml
from launch.__main__ import main
from launch.tasks.folder import add_array, new_folder
from tests.command_line import TINY, start


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A study that `run` began with overrides; the working directory holds runs/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    study = load_study(TINY, ["seed=[7]", "train.num_epochs=3"])
    study.directory.mkdir(parents=True)
    (study.directory / "study.yaml").write_text(resolved_yaml(study, with_meanings=False), encoding="utf-8")
    return study


@pytest.mark.parametrize("folder", ["runs/tiny_study", "runs/tiny_study/", ".", "elsewhere"])
def test_status_of_a_run_folder_shows_its_points(
    study: Study, folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if folder == ".":
        monkeypatch.chdir(study.directory)
    elif folder == "elsewhere":
        study.directory.rename(folder)
    assert main(["status", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(point.id in line.split() for line, point in zip(lines[1:-2], study.points, strict=True))
    assert lines[-2:] == ["report: to do", "3 waiting"]


def test_status_of_the_yaml_names_the_folder_of_other_points(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    hint = "dynexit: runs/tiny_study was run with other keys; `dynexit status runs/tiny_study` shows its points"
    assert main(["status", str(TINY)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == hint
    assert main(["status", str(TINY), "seed=[7]", "train.num_epochs=3"]) == 0
    assert hint not in capsys.readouterr().out


def test_other_commands_take_the_run_folder(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, point = "runs/tiny_study", study.points[0].id
    assert main(["config", folder]) == 0
    assert capsys.readouterr().out == resolved_yaml(study)
    assert main(["logs", folder, point]) == 2
    assert capsys.readouterr().err.startswith("dynexit: no job of these points has printed anything")
    log = RunDir(study.points[0], "prepare") / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("first\nlast\n", encoding="utf-8")
    assert main(["logs", folder]) == 0
    assert capsys.readouterr().out == f"==> {log}\nfirst\nlast\n\n"
    assert main(["logs", folder, "0000"]) == 2
    assert capsys.readouterr().err.startswith("dynexit: no point's id begins with '0000'")
    assert main(["cancel", folder, point]) == 0
    assert capsys.readouterr().out == "no jobs of this study are queued\n"
    assert main(["retry", folder]) == 2
    assert capsys.readouterr().err.startswith("dynexit: runs/tiny_study was never submitted")


def test_logs_of_local_jobs_and_of_the_launchers_own(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest job of a stage that did the point's work; then the log of its pack, if that is newer."""
    one, other, *_ = study.points
    for ids, text in (([one.id, other.id], "first"), ([one.id], "again"), ([other.id], "of another")):
        folder = new_folder(study, "submitted")
        add_array(folder, "train", {"0": [{"train": ids}]})
        (folder / "0_0_log.out").write_text(f"{text}\n", encoding="utf-8")
        (folder / "0_0_log.err").touch()
    log = study.directory / "submitted" / "0002" / "0_0_log.out"
    assert main(["logs", "runs/tiny_study", one.id]) == 0
    assert capsys.readouterr().out == f"==> {log}\nagain\n\n"
    pack = study.directory / "pack" / "0123abcd"
    pack.mkdir(parents=True)
    (pack / "members.json").write_text(json.dumps([one.id]), encoding="utf-8")
    (pack / "log.txt").write_text("resumed here\n", encoding="utf-8")
    os.utime(log, (1, 1))
    assert main(["logs", "runs/tiny_study", one.id]) == 0
    assert capsys.readouterr().out == f"==> {log}\nagain\n\n==> {pack / 'log.txt'}\nresumed here\n\n"


def test_the_page_is_opened_only_where_it_is_made(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["train", str(TINY)], ["run", str(TINY), "--on", "slurm"]):
        assert main([*words, "--open"]) == 2
        assert "--open is for `run` and `report`" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # mlflow's own
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ui_prints_the_page_of_the_experiment(study: Study, tmp_path: Path, number: signal.Signals) -> None:
    log_study(default_tracking_uri(study.directory.parent), {"id": "a", "name": "tiny_study"}, [], study.directory)
    process = start(tmp_path, "ui", "runs/tiny_study")
    assert process.stdout is not None
    printed = list(itertools.islice(process.stdout, 2))
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (0, 130)
    with socket.socket() as one:  # the server has ended too
        one.bind(("127.0.0.1", int(printed[1].split(":")[2].split("/")[0])))
    assert printed[0] == "MLflow's page has no login: all users of this machine can read and change what it shows\n"
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/#/experiments/1\n", printed[1])


@pytest.mark.parametrize("name", [".lock", ".workers"])
def test_a_pipe_in_place_of_a_lock_is_one_message(study: Study, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(study.directory / name)
    assert main(["report", "runs/tiny_study"]) == 2
    where = f"{study.directory / name} is a pipe or a device, not a regular file; remove it"
    assert capsys.readouterr().err.splitlines()[-1] == f"dynexit: {where}"
    assert main(["status", "runs/tiny_study"]) == 0


def test_a_run_folder_keeps_its_name(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "runs/tiny_study", "name=other"]) == 2
    assert capsys.readouterr().err == (
        "dynexit: name cannot be set for a run folder, whose name and place it is; move runs/tiny_study instead\n"
    )
    assert main(["status", "runs"]) == 2
    assert capsys.readouterr().err.startswith("dynexit: runs is no study's run folder: it has no study.yaml; give ")
