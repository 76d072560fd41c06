"""How a job's script decides on a requeue, with a scontrol that is faked; and what a signal does to a task."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from dynexit.errors import Interrupted
from launch.task import _interruptible, script_after, script_before


def run_script(folder: Path, status: int, why: str | None, **limits: int) -> tuple[int, str]:
    """Exit status of a job whose ranks ended with `status` after noting `why`, and what scontrol was asked."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("scontrol", f'echo "$@" >> {folder}/asked'), ("sleep", "exit 0")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    note = "true" if why is None else f'echo {why} > "$job.why"'
    limits = {"max_timeouts": 2, "max_preemptions": 3, "max_retries": 1, **limits}
    lines = [*script_before(folder), note, f"(exit {status})", *script_after(**limits)]
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1"}
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=False
    )
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
        assert run_script(tmp_path, 75, why) == (75, "requeue 9\n")
    assert run_script(tmp_path, 75, why) == (75, "")
    lines = [line.split() for line in (tmp_path / "7_2.ends").read_text().splitlines()]
    assert [line[0] for line in lines].count(why or "crashed") == most + 1
    assert lines[0][2:] == ["on", "n1", "with", "exit", "status", "75"]


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
        with pytest.raises(Interrupted, match=number.name):
            work_until(number)
        os.kill(os.getpid(), number)  # a second one finds nobody
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def work_until(number: signal.Signals) -> None:
    with _interruptible():
        os.kill(os.getpid(), number)
        raise AssertionError("went on")
