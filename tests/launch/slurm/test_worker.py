"""How a job's script decides on a requeue, with a scontrol that is faked; and what a signal does to a task."""

import contextlib
import dataclasses
import datetime
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from launch.slurm.interruptions import Terminated, interruptible, watched
from launch.slurm.job_script import script_after, script_before
from launch.slurm.notes import Notes

from dynexit.dist import Ranks
from dynexit.errors import Failure, Interrupted
from dynexit.run_dir import mark_done, read_json, write_text
from dynexit.study.grid import Point
from dynexit.study.schema import DistSettings
from launch.plan import Job
from launch.slurm import interruptions, notes
from launch.slurm.submissions import Submitted
from launch.slurm.worker import ClusterTask, _ready, _Work


def run_script(
    folder: Path,
    status: int,
    why: str | None,
    *,
    elsewhere: bool = False,
    time_limit: float = 3600,
    exclude: str = "",
    meanwhile: str = "true",
    naps: str = "exit 0",
    reason: str = "None",
    end: str = "2099-01-01T00:00:00",
    nodes: Sequence[str] = (),
    refusal: str = "",
    asked_for: str = "(null)",
    reservation: str = "",
) -> tuple[int, str]:
    """Exit status of a job whose ranks ended with `status` after noting `why`, and what scontrol was asked."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (
        (
            "scontrol",  # away: for one question
            '[ "$2" = hostnames ] && echo "$3" | tr , "\\n" && exit\n'
            f'[ "$1" = show ] || echo "$@" >> {folder}/asked; rm {folder}/away 2>/dev/null && exit 1\n'
            f'[ "$1" = requeue ] && [ -e {folder}/refuses ] && exit 1\n'
            f'[ "$1" != show ] || echo "JobState=COMPLETING Reason={reason} EndTime={end} ReqNodeList={asked_for}"',
        ),
        ("sbatch", f"echo 'allocation failure: {refusal}' >&2; exit {int(not elsewhere)}"),
        ("sinfo", "\n".join(f"echo '{node}'" for node in nodes)),
        ("sleep", naps),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    begun = folder / "7_2.now"
    note = f'printf "{begun.read_text().strip()}" > "$job.now"' if begun.is_file() else "true"
    note += '; touch "$job.last"' if (folder / "7_2.last").is_file() else ""
    note += "" if why is None else f'; echo {why} > "$job.why"'
    dist = DistSettings(max_timeouts=2, max_preemptions=3, max_retries=1)
    after = script_after(ClusterTask((), time_limit, 120), dist, exclude)
    lines = [*script_before(folder), note, f"({meanwhile}; exit {status})", *after]
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_RESERVATION": reservation}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=False
    )
    if (folder / "7_2.ends").is_file():
        assert done.stderr == ""
    asked = (folder / "asked").read_text() if (folder / "asked").exists() else ""
    (folder / "asked").unlink(missing_ok=True)
    return done.returncode, asked


def test_a_job_that_came_through_is_left_alone(tmp_path: Path) -> None:
    assert run_script(tmp_path, 0, None) == (0, "")
    assert not list(tmp_path.glob("*.ends"))


@pytest.mark.parametrize(("why", "most"), [("timed-out", 2), ("preempted", 3), (None, 1)])
def test_each_kind_of_end_has_a_limit_of_its_own(tmp_path: Path, why: str | None, most: int) -> None:
    for other in {"timed-out", "preempted", None} - {why}:
        run_script(tmp_path, 75, other)
    for _ in range(most):
        assert run_script(tmp_path, 75, why) == (75, "requeue 7_2\n")
    assert run_script(tmp_path, 75, why) == (75, "")
    lines = [line.split() for line in (tmp_path / "7_2.ends").read_text().splitlines()]
    assert [line[0] for line in lines].count(why or "crashed") == most + 1
    assert lines[0][2:] == ["on", "n1", "with", "exit", "status", "75"]


def test_a_job_that_crashed_avoids_its_nodes_where_it_can_run_without_them(tmp_path: Path) -> None:
    away = "requeue 7_2\nupdate JobId=7_2 ExcNodeList="
    assert run_script(tmp_path, 75, "preempted", elsewhere=True) == (75, "requeue 7_2\n")
    assert run_script(tmp_path, 137, None, elsewhere=True) == (137, f"{away}n1\n")
    (tmp_path / "7_2.ends").unlink()
    assert run_script(tmp_path, 137, None, elsewhere=True, exclude="n[3-4]") == (137, f"{away}n[3-4],n1\n")
    (tmp_path / "7_2.ends").unlink()
    assert run_script(tmp_path, 137, None, elsewhere=False, exclude="n[3-4]") == (137, "requeue 7_2\n")


@pytest.mark.parametrize(
    ("nodes", "are_others"),
    [
        (["n1 mix 4 8000 (null) gpu:2", "n2 idle 4 8000 (null) gpu:2"], True),
        (["n1 drain 4 8000 (null) gpu:2", "n2 alloc 4 8000 (null) gpu:2"], True),
        (["n1 mix 4 8000 (null) gpu:2", "n2 idle 4 8000 (null) (null)"], False),
        (["n1 mix 4 8000 (null) gpu:2", "n2 idle* 4 8000 (null) gpu:2", "n3 drng 4 8000 (null) gpu:2"], False),
        (["n1 mix 4 8000 (null) gpu:2", "n9 idle 4 8000 (null) gpu:2"], False),
    ],
)
def test_where_sbatch_refuses_a_trial_for_a_full_queue_nodes_of_the_same_kind_are_looked_for(
    tmp_path: Path, nodes: list[str], are_others: bool
) -> None:
    away = "update JobId=7_2 ExcNodeList=n9,n1\n" * are_others
    full = "Job violates accounting/QOS policy (job submit limit)"
    assert run_script(tmp_path, 137, None, exclude="n9", nodes=nodes, refusal=full) == (137, f"requeue 7_2\n{away}")


@pytest.mark.parametrize(
    ("refusal", "asked_for", "reservation"),
    [
        ("Requested node configuration is not available", "(null)", ""),
        ("Job violates accounting/QOS policy", "n[1-2]", ""),
        ("Job violates accounting/QOS policy", "(null)", "r1"),
    ],
)
def test_a_job_that_may_use_some_nodes_only_is_not_to_avoid_its_own(
    tmp_path: Path, refusal: str, asked_for: str, reservation: str
) -> None:
    nodes = ["n1 mix 4 8000 (null) gpu:2", "n3 idle 4 8000 (null) gpu:2"]
    said = run_script(tmp_path, 137, None, nodes=nodes, refusal=refusal, asked_for=asked_for, reservation=reservation)
    assert said == (137, "requeue 7_2\n")


@pytest.mark.parametrize(("time_limit", "word"), [(3600, "preempted"), (180, "timed-out")])
def test_a_signal_before_the_program_could_take_it_is_no_crash(tmp_path: Path, time_limit: float, word: str) -> None:
    assert run_script(tmp_path, 140, None, time_limit=time_limit) == (140, "requeue 7_2\n")
    assert (tmp_path / "7_2.ends").read_text().startswith(f"{word} ")


@pytest.mark.parametrize(
    ("status", "word"), [(75, "preempted"), (140, "preempted"), (143, "preempted"), (137, "crashed"), (1, "crashed")]
)
def test_a_rank_that_is_ended_beside_a_killed_one_was_not_preempted(tmp_path: Path, status: int, word: str) -> None:
    assert run_script(tmp_path, status, "preempted?") == (status, "requeue 7_2\n")
    assert (tmp_path / "7_2.ends").read_text().startswith(f"{word} ")


@pytest.mark.parametrize("status", [134, 137])  # of another rank that did not come to its end by itself
def test_a_signal_that_only_a_preemption_sends_tells_of_one(tmp_path: Path, status: int) -> None:
    assert run_script(tmp_path, status, "preempted", elsewhere=True) == (status, "requeue 7_2\n")
    assert (tmp_path / "7_2.ends").read_text().startswith("preempted ")


def test_the_first_word_on_an_end_counts(tmp_path: Path) -> None:
    notes = Notes(tmp_path, "7_2")
    for word in ("partly-failed", "preempted"):
        notes.end(word)
    assert (tmp_path / "7_2.why").read_text() == "partly-failed\n"


def test_what_a_preemption_found_running_comes_first_again(tmp_path: Path) -> None:
    notes = Notes(tmp_path, "7_2")
    notes.begin(0)
    run_script(tmp_path, 137, None)
    assert notes.order(3, 1) == [1, 2, 0]
    notes.begin(1)
    run_script(tmp_path, 75, "preempted")
    assert notes.order(3, 1) == [1, 2, 0]


def test_an_end_that_cannot_be_noted_is_not_tried_again_for_ever(tmp_path: Path) -> None:
    (tmp_path / "7_2.ends").symlink_to("/dev/full")
    status, asked = run_script(tmp_path, 137, None)
    assert (status, asked) == (137, "")


def test_a_signal_that_reaches_the_script_too_is_the_ranks_to_take(tmp_path: Path) -> None:
    assert run_script(tmp_path, 75, "preempted", meanwhile="kill -USR2 $$") == (75, "requeue 7_2\n")
    assert run_script(tmp_path, 0, None, meanwhile="kill -USR2 $$") == (0, "")


def test_an_end_of_its_time_that_no_signal_told_of_is_a_time_out(tmp_path: Path) -> None:
    (tmp_path / "away").touch()  # a controller that is asked again
    ended = run_script(tmp_path, 75, "timed-out", meanwhile="kill -TERM $$", reason="TimeLimit")
    assert ended == (75, "requeue 7_2\n")
    assert (tmp_path / "7_2.ends").read_text().startswith("timed-out ")
    assert not (tmp_path / "away").exists()


@pytest.mark.parametrize("why", [None, "timed-out"])
def test_an_end_of_the_work_that_slurm_hears_of_after_its_time_is_a_time_out_to_it_and_is_done_again(
    tmp_path: Path, why: str | None
) -> None:
    over, left = (f"{datetime.datetime.now() + datetime.timedelta(seconds=s):%FT%T}" for s in (2, 60))
    ended = [run_script(tmp_path, 0, why, end=over) for _ in range(3)]
    assert ended == [(0, "requeue 7_2\n"), (0, "requeue 7_2\n"), (0, "")]  # max_timeouts: 2
    assert (tmp_path / "7_2.ends").read_text().count("timed-out ") == 3
    for end in (left, "Unknown", "None"):  # those of no limit
        (tmp_path / "away").touch()
        assert run_script(tmp_path, 0, why, end=end) == (0, "")
        assert not (tmp_path / "away").exists()
    assert (tmp_path / "7_2.ends").read_text().count("\n") == 3


def test_what_a_user_or_slurm_itself_ends_is_not_requeued_by_its_script(tmp_path: Path) -> None:
    assert run_script(tmp_path, 75, "preempted", meanwhile="kill -TERM $$") == (143, "")
    assert not (tmp_path / "7_2.ends").exists()


def test_a_controller_that_refuses_a_requeue_is_not_asked_for_ever(tmp_path: Path) -> None:
    (tmp_path / "refuses").touch()
    assert run_script(tmp_path, 137, None) == (137, "requeue 7_2\n" * 12)


def test_a_script_whose_job_was_begun_elsewhere_leaves_it_alone(tmp_path: Path) -> None:
    assert run_script(tmp_path, 137, None, meanwhile='echo 1 > "$job.run"') == (137, "")
    assert not (tmp_path / "7_2.ends").exists()
    assert run_script(tmp_path, 137, None, meanwhile=': > "$job.run"') == (137, "requeue 7_2\n")  # on a full disk


def test_a_cancelled_job_is_not_brought_back(tmp_path: Path) -> None:
    (tmp_path / "away").touch()
    cancel = 'echo "cancelled 2026-11-22T07:00:00 by the user" >> "$job.ends"'
    assert run_script(tmp_path, 75, "preempted", meanwhile=cancel) == (75, "")


def test_a_process_whose_job_was_begun_elsewhere_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def end(status: int) -> None:
        assert status == 1
        ended.set()

    monkeypatch.setattr(interruptions.os, "_exit", end)
    monkeypatch.setattr(interruptions, "_WATCH_SECONDS", 0.01)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with watched(Notes(tmp_path, "7_2")):
        for text in ("1\n", "", "0\n"):
            (tmp_path / "7_2.run").write_text(text)
            assert not ended.wait(0.1)
        (tmp_path / "7_2.run").write_text("2\n")
        assert ended.wait(10)


def test_a_file_system_that_is_lost_is_waited_for_and_the_job_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, away = tmp_path / "logs", tmp_path / "away"
    folder.mkdir()
    (folder / "7_2_submitted.pkl").touch()
    one = train_job("a", tmp_path)
    tries = []

    def train(points: Sequence[Point]) -> None:
        tries.append(folder.is_dir())
        if len(tries) == 1:
            folder.rename(away)
            raise Failure("the backbone is gone")
        raise Failure("not a number")

    monkeypatch.setattr("dynexit.jobs.train.run_train", train)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            away.rename(folder)

    monkeypatch.setattr(notes.time, "sleep", sleep)
    mark = folder / "7_2_submitted.pkl"
    work = _Work(Notes(folder, "7_2", mark), Ranks(0, 1, torch.device("cpu")), [one], 1)
    work.do(0, *_ready(one))
    work.end()
    assert (len(slept), tries) == (3, [True, True])
    assert [failure["reason"] for failure in work.failures] == ["not a number"]
    assert read_json(folder / "7_2.failures.json") == work.failures
    slept.clear()
    folder.rename(away)  # with the trainings that a job of what is to be recorded looks for
    assert work.ready(0) == (one, {})
    assert len(slept) == 3
    slept.clear()
    tries.clear()

    def seem_to_train(points: Sequence[Point]) -> None:
        tries.append(folder.is_dir())
        if len(tries) == 1:
            folder.rename(away)  # and what is written now lies where nobody looks
        else:
            finish(one)

    monkeypatch.setattr("dynexit.jobs.train.run_train", seem_to_train)
    again = _Work(Notes(folder, "7_2", mark), Ranks(0, 1, torch.device("cpu")), [one], 1)
    again.do(0, *_ready(one))
    assert (len(slept), tries, again.failures) == (3, [True, True], [])
    slept.clear()
    folder.rename(away)
    assert Notes(folder, "7_2", mark).wait_until_there()  # lost while the program starts, too
    assert len(slept) == 3
    assert not Notes(folder, "7_2", mark).wait_until_there()


def test_a_job_whose_working_directory_was_lost_is_done_again_in_the_one_that_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, away = tmp_path / "mount", tmp_path / "away"
    mark = begin_in(mount, monkeypatch)
    one = train_job("a", Path("runs/study"))
    tries = []

    def train(points: Sequence[Point]) -> None:
        tries.append(1)
        if len(tries) == 1:  # for less time than anybody takes to look
            mount.rename(away)
            shutil.copytree(away, mount)
            raise Failure("no such folder")
        finish(one)

    monkeypatch.setattr("dynexit.jobs.train.run_train", train)
    work = _Work(Notes(mark.parent, "7_2", mark), Ranks(0, 1, torch.device("cpu")), [one], 1)
    work.do(0, *_ready(one))
    assert (len(tries), work.failures) == (2, [])
    assert (mount / "runs" / "study" / "train" / "a" / "heads").is_file()
    assert not (away / "runs").exists()


def test_a_working_directory_that_is_gone_as_a_job_begins_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, away = tmp_path / "mount", tmp_path / "away"
    mark = begin_in(mount, monkeypatch)
    monkeypatch.setenv("PWD", str(mount))
    shutil.copytree(mount, away)
    shutil.rmtree(mount)
    monkeypatch.setattr(notes.time, "sleep", lambda seconds: away.rename(mount))
    here = Notes(mark.parent, "7_2", mark)
    assert here.wait_until_there()
    assert os.getcwd() == str(mount)
    assert not here.wait_until_there()


def begin_in(mount: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mark of a job whose working directory is `mount`."""
    mark = mount / "logs" / "7_2_submitted.pkl"
    mark.parent.mkdir(parents=True)
    mark.touch()
    monkeypatch.chdir(mount)
    return mark


def test_a_working_directory_beside_the_study_in_a_lost_mount_is_entered_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount, away, link = (tmp_path / name for name in ("mount", "away", "link"))
    mark = begin_in(mount, monkeypatch)
    (mount / "code" / "data").mkdir(parents=True)
    monkeypatch.chdir(mount / "code")
    link.symlink_to(mount)
    here = Notes(link / "logs", "7_2", link / "logs" / mark.name)
    shutil.copytree(mount, away)
    shutil.rmtree(mount)
    monkeypatch.setattr(notes.time, "sleep", lambda seconds: away.rename(mount))
    assert here.wait_until_there()
    assert Path("data").is_dir()
    assert not here.wait_until_there()


def test_a_working_directory_that_a_job_does_not_need_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "7_2_submitted.pkl"
    mark.touch()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(notes.time, "sleep", lambda seconds: pytest.fail("waited"))
    here = Notes(tmp_path, "7_2", mark)
    (tmp_path / "elsewhere").rmdir()
    assert not here.wait_until_there()


def test_what_a_job_began_beneath_a_lost_file_system_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came back before the job failed by it, as where an earlier loss left there what the job began with."""
    mark = tmp_path / "7_2_submitted.pkl"
    mark.touch()
    one = train_job("a", tmp_path)
    notes_of_it = Notes(tmp_path, "7_2", mark)
    looked = threading.Event()
    tries = []

    def look() -> None:
        Notes.look(notes_of_it)
        looked.set()

    def train(points: Sequence[Point]) -> None:
        tries.append(1)
        if len(tries) == 1:
            mark.unlink()
            looked.clear()
            assert looked.wait(10)
            mark.touch()
            raise Failure("is no longer the folder that the job began in")
        raise Failure("not a number")

    monkeypatch.setattr("dynexit.jobs.train.run_train", train)
    monkeypatch.setattr(interruptions, "_WATCH_SECONDS", 0.01)
    monkeypatch.setattr(notes_of_it, "look", look)
    work = _Work(notes_of_it, Ranks(0, 1, torch.device("cpu")), [one], 1)
    with watched(notes_of_it):
        work.do(0, *_ready(one))
    assert [failure["reason"] for failure in work.failures] == ["not a number"]
    assert len(tries) == 2  # and it is not lost twice


def test_one_rank_that_lost_its_file_system_is_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "7_2_submitted.pkl"
    mark.touch()
    one = train_job("a", tmp_path)

    def train(points: Sequence[Point]) -> None:
        mark.unlink()
        raise Failure("its file is gone")

    monkeypatch.setattr("dynexit.jobs.train.run_train", train)
    monkeypatch.setattr(notes.time, "sleep", lambda seconds: mark.touch())
    work = _Work(Notes(tmp_path, "7_2", mark), Ranks(1, 2, torch.device("cpu")), [one], 1)
    with pytest.raises(Failure, match="its file is gone"):
        work.do(0, *_ready(one))
    assert not (tmp_path / "7_2.why").exists()


def test_a_script_waits_for_a_lost_file_system_before_it_notes_an_end(tmp_path: Path) -> None:
    (tmp_path / "7_2_submitted.pkl").touch()
    lost = f"mv {tmp_path}/7_2_submitted.pkl {tmp_path}/away.pkl; (/bin/sleep 1; mv {tmp_path}/away.pkl"
    lost += f" {tmp_path}/7_2_submitted.pkl) >/dev/null 2>&1 & true"
    assert run_script(tmp_path, 1, None, meanwhile=lost, naps="/bin/sleep 0.1") == (1, "requeue 7_2\n")
    assert (tmp_path / "7_2_submitted.pkl").is_file()


def test_a_start_that_comes_late_does_not_take_the_job_back(tmp_path: Path) -> None:
    (tmp_path / "7_2.run").write_text("1\n")
    assert run_script(tmp_path, 137, None) == (137, "")
    assert (tmp_path / "7_2.run").read_text() == "1\n"


def test_a_controller_that_is_away_is_asked_again(tmp_path: Path) -> None:
    (tmp_path / "away").touch()
    assert run_script(tmp_path, 75, "preempted") == (75, "requeue 7_2\n" * 2)


def test_what_a_site_or_a_kill_left_does_not_stop_the_script(tmp_path: Path) -> None:
    left = [tmp_path / f"7_2_{rank}_result.pkl.save_tmp" for rank in (0, 11)]
    for path in left:
        path.touch()
    (tmp_path / "7_20_0_result.pkl.save_tmp").touch()
    script = "\n".join(["set -euo pipefail", *script_before(tmp_path), "(exit 3) | cat", "echo came here with $?"])
    environment = {**os.environ, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "came here with 0\n"
    assert [path.name for path in tmp_path.glob("*.save_tmp")] == ["7_20_0_result.pkl.save_tmp"]


def test_a_task_with_something_to_record_lets_what_waits_for_it_run(tmp_path: Path) -> None:
    notes = Notes(tmp_path, "7_2")
    assert notes.order(3, 1) == [0, 1, 2]
    for i, is_trained in ((0, False), (1, True)):
        notes.begin(i)
        notes.through(is_trained=is_trained)
    notes.begin(2)
    assert run_script(tmp_path, 137, None) == (137, "requeue 7_2\n")
    assert notes.order(4, 1) == [0, 1, 3, 2]  # what it crashed in comes last
    notes.begin(2)
    assert run_script(tmp_path, 137, None) == (137, "requeue 7_2\n")
    assert notes.order(4, 1) == [0, 1, 3]  # and has used up its tries
    assert run_script(tmp_path, 137, None) == (137, "requeue 7_2\n")  # before any began
    assert run_script(tmp_path, 137, None) == (0, "")


def run_task(folder: Path, crashes: dict[int, int], preempted: Sequence[int] = ()) -> tuple[list[int], list[int]]:
    """Six jobs of which some crash so many times, in a task whose tries `preempted` end before a job begins.

    Returns the first job of every try, and the jobs that came through.
    """
    notes, first, done, crashes = Notes(folder, "7_2"), [], [], dict(crashes)
    for attempt in range(30):
        if attempt in preempted:
            assert run_script(folder, 75, "preempted")[1]
            continue
        order = [i for i in notes.order(6, 1) if i not in done]
        first += order[:1]
        for i in order:
            notes.begin(i, is_last=order == [i] and i in notes.crashes())
            if crashes.get(i, 0):
                crashes[i] -= 1
                break
            done.append(i)
            notes.through(is_trained=False)
        else:
            return first, sorted(done)
        if not run_script(folder, 137, None)[1]:
            break
    assert not [i for i in notes.order(6, 1) if i not in done]  # the script goes on as long as something is left
    return first, sorted(done)


def test_jobs_that_crash_leave_the_others_their_tries(tmp_path: Path) -> None:
    tasks = [tmp_path / name for name in ("often", "preempted", "recovers", "beside")]
    for folder in tasks:
        folder.mkdir()
    assert run_task(tasks[0], {0: 9, 1: 9, 3: 9}) == ([0, 1, 2, 4, 1, 3], [2, 4, 5])
    # a signal before a job begins takes nothing from what is known of the crashes
    assert run_task(tasks[1], {0: 9, 1: 9}, preempted=(1, 2)) == ([0, 1, 2, 1], [2, 3, 4, 5])
    # each has its one try more, and the one that crashes in that too is given up
    assert run_task(tasks[2], {0: 1, 1: 1, 2: 1, 3: 2}) == ([0, 1, 2, 3, 4], [0, 1, 2, 4, 5])
    # however often others crash
    assert run_task(tasks[3], {0: 9, 1: 9, 2: 1}) == ([0, 1, 2, 3, 1, 2], [2, 3, 4, 5])


def test_what_raises_has_tries_of_its_own_beside_what_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(points: Sequence[Point]) -> None:
        if points[0].id in "ac":
            raise RuntimeError("torn")

    monkeypatch.setattr("dynexit.jobs.train.run_train", train)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n9")
    tasks = [train_job(one, tmp_path) for one in "abc"]
    for left, killed_at in (([0, 1, 2], 2), ([1, 0, 2], None)):
        work = work_of(tmp_path, tasks)
        assert work.notes.order(3, 1) == left
        for i in left:
            if i == killed_at:
                work.notes.begin(i)
                break
            work.do(i, *_ready(tasks[i]))
        status = 137 if killed_at else int(work.crash is not None)
        assert run_script(tmp_path, status, None) == (status, "requeue 7_2\n" if status else "")
    ends = [line.partition(" on ")[2] for line in (tmp_path / "7_2.ends").read_text().splitlines()]
    killed, last = "n1 with exit status 137 in part 2", "n1 with exit status 1 in noted parts"
    assert ends == ["n9 in part 0", killed, "n9 in part 0", "n9 in part 2", last]
    assert [line[0] for line in Submitted("7_2", "train", (), tmp_path).parts] == list("012102")
    assert work_of(tmp_path, tasks).notes.order(3, 1) == [1]


def train_job(letters: str, folder: Path) -> Job:
    stages = ("prepare", "record", "search")
    ids = [{"train": one} | {stage: f"{one}-{stage}" for stage in stages} for one in letters]
    return Job("train", tuple(cast(Point, SimpleNamespace(id=one["train"], ids=one, study_dir=folder)) for one in ids))


def work_of(folder: Path, tasks: Sequence[Job], rank: int = 0, world_size: int = 1) -> _Work:
    """What a task's program begins with, when it was stopped before."""
    work = _Work(Notes(folder, "7_2"), Ranks(rank, world_size, torch.device("cpu")), tasks, 1)
    work.take_up(work.notes.given_up())
    return work


def finish(job: Job) -> None:
    for point in job.points:
        write_text(job.study_dir / "train" / point.id / "heads", point.id)
        mark_done(job.study_dir / "train" / point.id, point.id, ["heads"])


@pytest.mark.parametrize("killed", [True, False])
def test_a_task_whose_last_job_used_up_its_tries_is_not_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    tasks = [train_job(one, tmp_path) for one in "abc"]

    def train(points: Sequence[Point]) -> None:
        if points[0].id == "a":
            raise Failure("not a number")
        if points[0].id == "c":
            raise KeyboardInterrupt if killed else RuntimeError("torn")  # what ends the program, and what does not
        finish(tasks[1])

    monkeypatch.setattr("dynexit.jobs.train.run_train", train)
    asked, orders = [], []
    for _ in range(2):
        work = work_of(tmp_path, tasks)
        orders.append(work.notes.order(3, 1))
        with contextlib.suppress(KeyboardInterrupt):
            for i in orders[-1]:
                work.do(i, *_ready(tasks[i]))
            work.end()
        asked.append(run_script(tmp_path, 137 if killed else 1, None))
    assert orders == [[0, 1, 2], [1, 2]]
    assert [question for _, question in asked] == ["requeue 7_2\n", ""]
    assert asked[1][0] == 0  # b is there to be recorded
    left = Submitted("7_2", "train", (), tmp_path)
    reasons = {one["work"][0]: one["reason"] for one in left.given_up() or left.failures()}
    assert reasons == {"a": "not a number"} | ({} if killed else {"c": "RuntimeError: torn"})


def test_a_signal_of_which_a_compiled_module_made_an_error_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(points: Sequence[Point]) -> None:
        raise ImportError("initialization failed") from Interrupted("stopped by SIGUSR2")

    monkeypatch.setattr("dynexit.jobs.train.run_train", train)
    job = train_job("a", tmp_path)
    work = work_of(tmp_path, [job])
    with pytest.raises(Interrupted, match="stopped by SIGUSR2"):
        work.do(0, *_ready(job))
    assert not work.failures


def test_what_is_damaged_is_left_out_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(train_job("abc", tmp_path))
    (tmp_path / "train" / "b" / "heads").write_text("")
    done: list[str] = []
    monkeypatch.setattr("dynexit.jobs.record.run_record", lambda points: done.extend(point.id for point in points))
    job = dataclasses.replace(train_job("abcd", tmp_path), stage="record")
    work = work_of(tmp_path, [job])
    work.do(0, *_ready(job))
    assert done == ["a", "c"]  # d is not trained, and its own job says why
    assert [failure["work"] for failure in work.failures] == [["b-record"]]
    assert str(work.failures[0]["reason"]).startswith(f"{tmp_path}/train/b/heads has 0 bytes instead of 1; move it ")
    assert work.notes.order(1, 1) == [0]  # a requeue would do the others


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_on_one_rank_alone_stops_no_other_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    done: list[str] = []

    def train(points: Sequence[Point]) -> None:
        if points[0].id == "a":
            raise Failure("no room here")
        done.append(points[0].id)

    monkeypatch.setattr("dynexit.jobs.train.run_train", train)
    monkeypatch.setattr(Ranks, "any", lambda self, flags: flags)  # as the other rank would say
    both = [train_job(one, tmp_path) for one in "ab"]
    first = work_of(tmp_path, both, rank, world_size=2)
    with pytest.raises(SystemExit):
        first.do(0, *_ready(both[0]))
    assert (tmp_path / "7_2.why").read_text() == "partly-failed\n"
    for _ in range(3):  # however many failed like that before, for those that are left
        assert run_script(tmp_path, 1, "partly-failed") == (1, "requeue 7_2\n")
    told = [{"job": 0, "stage": "train", "work": ["a"], "reason": "no room here"}]
    assert Submitted("7_2", "train", ("a", "b"), tmp_path).given_up() == told
    then = work_of(tmp_path, both, rank, world_size=2)
    assert then.notes.order(2, 1) == [1]
    then.do(1, *_ready(both[1]))
    assert done == ["b"]
    finish(both[1])
    then.end()
    assert read_json(tmp_path / "7_2.failures.json") == told
    assert then.notes.order(2, 1) == [0, 1]  # told of once; whoever asks for the job again has it whole
    with pytest.raises(SystemExit):
        work_of(tmp_path, both, rank, world_size=2).do(0, *_ready(both[0]))
    assert (tmp_path / "7_2.why").read_text() == "failed\n"  # nothing is left


def test_what_another_try_would_not_mend_is_not_tried(tmp_path: Path) -> None:
    assert run_script(tmp_path, 1, "failed") == (1, "")


def test_a_note_of_the_run_before_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "7_2.why").write_text("timed-out\n")
    run_script(tmp_path, 137, None)
    assert (tmp_path / "7_2.ends").read_text().startswith("crashed ")


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_outside_training_ends_the_work_once(number: signal.Signals) -> None:
    before = {one: signal.getsignal(one) for one in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        with pytest.raises(Interrupted, match=number.name) as stop:
            work_until(number)
        assert isinstance(stop.value, Terminated) == (number == signal.SIGTERM)
        os.kill(os.getpid(), number)  # a second one finds nobody
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def work_until(number: signal.Signals) -> None:
    with interruptible():
        os.kill(os.getpid(), number)
        raise AssertionError("went on")
