"""The script around the ranks, with a scontrol that is faked."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.slurm.requeue import script_after, script_before
from launch.tasks.attempts import COMPLETED, CRASHED, PREEMPTED, STOPPED, RankReason, read_attempts, reason_path
from launch.tasks.decision import RequeueLimits
from tests.command_line import ROOT


def run_script(
    folder: Path,
    status: int,
    *,
    meanwhile: str = "true",
    python: str = sys.executable,
    restart: int = 0,
    can_run_elsewhere: bool = False,
    num_packs: int = 1,
) -> tuple[int, str]:
    """Exit status of a job's script whose ranks ended with `status`, and what scontrol was asked for."""
    arrays = [{"stage": "train", "tasks": {"7_2": [{}] * num_packs}}]
    (folder / "jobs.json").write_text(json.dumps({"site": None, "arrays": arrays}))
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (
        ("scontrol", f'echo "$@" >> {folder}/asked\n[ "$1" != requeue ] || [ ! -e {folder}/refuses ]'),
        ("sbatch", f"exit {int(not can_run_elsewhere)}"),
        ("sleep", "exit 0"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    lines = ["set -euo pipefail", *script_before(folder), f"({meanwhile}; exit {status})"]
    lines += script_after(python, RequeueLimits(2, 3, 1, 1000, num_ranks=2))
    assert len(lines) <= 40
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1"}
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    environment |= {"SLURM_RESTART_COUNT": str(restart), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=False
    )
    asked = (folder / "asked").read_text() if (folder / "asked").exists() else ""
    (folder / "asked").unlink(missing_ok=True)
    return done.returncode, asked


def noted(folder: Path) -> Sequence[str]:
    return [end.reason for end in read_attempts(folder / "7_2").ends]


def leave_reason(folder: Path, rank: int, restart: int, word: str) -> None:
    RankReason(reason_path(folder / "7_2", rank), restart, pack=0, word=word).write()


def test_script_notes_and_requeues(tmp_path: Path) -> None:
    leave_reason(tmp_path, 1, 0, STOPPED)
    assert run_script(tmp_path, 75) == (75, "requeue 7_2\n")
    assert noted(tmp_path) == [PREEMPTED]
    # what the attempt before left does not count
    assert run_script(tmp_path, 137, restart=1, can_run_elsewhere=True) == (
        137,
        "requeue 7_2\nupdate JobId=7_2 ExcNodeList=n1\n",
    )
    assert run_script(tmp_path, 137, restart=2) == (137, "")
    attempts = read_attempts(tmp_path / "7_2")
    assert [end.reason for end in attempts.ends] == [PREEMPTED, CRASHED, CRASHED]
    assert [(count, node) for _, count, node in attempts.starts] == [(0, "n1"), (1, "n1"), (2, "n1")]
    assert str(attempts.ends[-1]).endswith(" on n1 with exit status 137")
    done = [{"pack": 0, "reason": COMPLETED, "error": ""}]
    RankReason(reason_path(tmp_path / "7_2", 0), 3, None, done, COMPLETED).write()
    assert run_script(tmp_path, 0, restart=3) == (0, "")
    assert noted(tmp_path)[-1] == COMPLETED


def test_a_task_ends_when_its_own_packs_are_complete(tmp_path: Path) -> None:
    done = [{"pack": 0, "reason": COMPLETED, "error": ""}]
    RankReason(reason_path(tmp_path / "7_2", 0), 0, None, done, COMPLETED).write()
    assert run_script(tmp_path, 0) == (0, "")
    assert run_script(tmp_path, 1, num_packs=2) == (1, "requeue 7_2\n")


def test_script_stays_on_its_nodes_if_there_are_no_others(tmp_path: Path) -> None:
    assert run_script(tmp_path, 137) == (137, "requeue 7_2\n")


def test_script_without_an_interpreter_requeues_crashes(tmp_path: Path) -> None:
    missing = str(tmp_path / "python")
    assert run_script(tmp_path, 137, python=missing) == (137, "requeue 7_2\n")
    assert run_script(tmp_path, 137, python=missing, restart=1) == (137, "")
    assert noted(tmp_path) == [CRASHED, CRASHED]
    assert run_script(tmp_path, 0, python=missing) == (0, "")


def test_script_asks_a_controller_for_a_minute(tmp_path: Path) -> None:
    (tmp_path / "refuses").touch()
    assert run_script(tmp_path, 137) == (137, "requeue 7_2\n" * 12)


def test_script_leaves_a_cancelled_job_alone(tmp_path: Path) -> None:
    assert run_script(tmp_path, 75, meanwhile='touch "$job.cancelled"') == (75, "")


def test_script_ends_on_sigterm_and_ignores_sigusr2(tmp_path: Path) -> None:
    assert run_script(tmp_path, 75, meanwhile="kill -TERM $$") == (143, "")
    assert noted(tmp_path) == []
    assert run_script(tmp_path, 75, meanwhile="kill -USR2 $$") == (75, "requeue 7_2\n")


def test_script_of_a_superseded_attempt_notes_nothing(tmp_path: Path) -> None:
    elsewhere = """echo '{"start": "x", "restart": 1, "node": "n2"}' >> "$job.jsonl\""""
    assert run_script(tmp_path, 137, meanwhile=elsewhere) == (137, "")
    assert noted(tmp_path) == []


def test_an_end_that_cannot_be_noted_is_not_tried_again(tmp_path: Path) -> None:
    no_room = f"trap '' XFSZ; ulimit -f 0; {sys.executable}"
    assert run_script(tmp_path, 137, python=no_room) == (137, "")
    assert noted(tmp_path) == []
