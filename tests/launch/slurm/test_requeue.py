"""The requeue decision as a table, and the script that carries it out, with a scontrol that is faked."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.slurm.attempts import (
    COMPLETED,
    CRASHED,
    FAILED,
    PREEMPTED,
    STOPPED,
    TERMINATED,
    TIMED_OUT,
    End,
    RankReason,
    append_ends,
    packs_left,
    read_attempts,
    reason_path,
)
from launch.slurm.requeue import Decision, RequeueLimits, attempt_ends, decide, script_after, script_before
from tests.command_line import ROOT

ONE = RequeueLimits(1, max_timeouts=2, max_preemptions=3, max_retries=1, seconds_in_time=1000, num_ranks=2)
THREE = RequeueLimits(3, max_timeouts=2, max_preemptions=3, max_retries=1, seconds_in_time=1000)


def ends(*words: str | tuple[str, int]) -> list[End]:
    """Ends of attempts: "preempted" alone or with the pack that it was at, by default 0; with no pack "preempted-"."""
    found = []
    for word in words:
        reason, pack = (word, 0) if isinstance(word, str) else word
        found.append(End(reason.removesuffix("-"), None if reason.endswith("-") else pack, 137, node="n1"))
    return found


@pytest.mark.parametrize(
    ("limits", "words", "requeues"),
    [
        (ONE, [TIMED_OUT] * 2, True),
        (ONE, [TIMED_OUT] * 3, False),
        (ONE, [PREEMPTED] * 3, True),
        (ONE, [PREEMPTED] * 4, False),
        (ONE, [TIMED_OUT] * 2 + [CRASHED, PREEMPTED], True),  # each reason has its own limit
        (ONE, [CRASHED], True),
        (ONE, [CRASHED, PREEMPTED, CRASHED], False),
        (ONE, [FAILED], False),
        (ONE, ["crashed-"], True),  # before a pack began
        (ONE, ["crashed-", "crashed-"], False),
        (ONE, ["crashed-", CRASHED], True),
        (ONE, ["failed-"], False),
        (THREE, [(FAILED, 0)], True),  # on one rank alone: the other packs are left
        (THREE, [(FAILED, 0), (FAILED, 1), (FAILED, 2)], False),
        (THREE, [(COMPLETED, 1), (FAILED, 0), (CRASHED, 2)], True),
        (THREE, [(COMPLETED, 1), (FAILED, 0), (CRASHED, 2), (CRASHED, 2)], False),
        (THREE, [(CRASHED, 0), (CRASHED, 1), (CRASHED, 0), (CRASHED, 1)], True),  # 2 is left
        (THREE, [(CRASHED, i) for i in (0, 1, 2)] * 2, False),
        (THREE, [(COMPLETED, 0), (COMPLETED, 1), ("preempted-", 0)], True),
    ],
)
def test_requeues_up_to_the_limits(limits: RequeueLimits, words: list[str | tuple[str, int]], requeues: bool) -> None:
    assert decide(ends(*words), limits).requeue == requeues


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ([(COMPLETED, 0), (COMPLETED, 1), (COMPLETED, 2)], 0),
        ([(COMPLETED, 0), (COMPLETED, 1), (FAILED, 2)], 137),
        ([(FAILED, 0), (COMPLETED, 1), (COMPLETED, 2)], 137),  # what failed in an attempt before counts
        ([(CRASHED, 0), (COMPLETED, 1), (COMPLETED, 2), (COMPLETED, 0)], 0),
    ],
)
def test_exits_zero_only_if_all_packs_completed(words: list[str | tuple[str, int]], status: int) -> None:
    assert decide(ends(*words), THREE).status == status
    assert decide([End(FAILED, 0, 0)], ONE).status == 1


def test_avoids_the_nodes_of_a_crash_only() -> None:
    excluded = RequeueLimits(1, 2, 3, 1, 1000, exclude="n[8-9]")
    assert decide(ends(CRASHED), excluded) == Decision(True, 137, "n[8-9],n1")
    assert str(decide(ends(CRASHED), ONE)) == "requeue 137 n1"
    assert str(decide(ends(PREEMPTED), excluded)) == "requeue 137"


@pytest.mark.parametrize(
    ("words", "status", "seconds", "reason"),
    [
        ([STOPPED], 75, 10, PREEMPTED),
        ([STOPPED], 75, 1000, TIMED_OUT),
        ([STOPPED, STOPPED], 137, 10, PREEMPTED),  # SIGUSR2 comes from SLURM alone, however another rank ended
        ([TERMINATED], 75, 10, PREEMPTED),
        ([TERMINATED], 143, 1000, TIMED_OUT),
        ([TERMINATED], 137, 10, CRASHED),  # srun ends the ranks beside one that was killed
        ([TERMINATED], 1, 10, CRASHED),
        ([TERMINATED, CRASHED], 75, 10, CRASHED),
        ([CRASHED, STOPPED], 1, 10, PREEMPTED),
        ([], 140, 10, PREEMPTED),  # SIGUSR2 before the program could handle it
        ([], 140, 1000, TIMED_OUT),
        ([], 137, 10, CRASHED),
        ([], 143, 10, CRASHED),
        ([CRASHED], 1, 10, CRASHED),
    ],
)
def test_reason_of_an_end(words: list[str], status: int, seconds: float, reason: str) -> None:
    reasons = {rank: RankReason(Path(), pack=0, word=word) for rank, word in enumerate(words)}
    assert [end.reason for end in attempt_ends(reasons, status, seconds, ONE)] == [reason]


def test_packs_of_an_attempt_end_one_by_one() -> None:
    done = [{"pack": 0, "reason": COMPLETED, "error": ""}, {"pack": 2, "reason": FAILED, "error": "not a number"}]
    main = RankReason(Path(), pack=1, finished=done)
    found = attempt_ends({0: main}, 139, 10, THREE)
    assert [(end.pack, end.reason, end.error) for end in found] == [
        (0, COMPLETED, ""),
        (2, FAILED, "not a number"),
        (1, CRASHED, "a rank was ended by SIGSEGV"),
    ]
    main.word, main.pack = COMPLETED, None
    assert [end.pack for end in attempt_ends({0: main}, 1, 10, THREE)] == [0, 2]
    alone = {
        0: RankReason(Path(), pack=1, word=CRASHED, error="gloo"),
        1: RankReason(Path(), 0, 3, 1, [], FAILED, "full"),
    }
    assert attempt_ends(alone, 1, 10, THREE) == [End(FAILED, 1, 1, "full")]
    assert decide([End(FAILED, None, 1)], ONE).requeue is False
    assert attempt_ends({}, 0, 10, THREE) == []  # as of a node that failed: SLURM requeues the job


CLOSED = "RuntimeError: [gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.1.1]:15771."
SILENT = "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 10000ms for recv"


@pytest.mark.parametrize(
    ("errors", "status", "expected"),
    [
        ([CLOSED, "torch.OutOfMemoryError: CUDA"], 1, "torch.OutOfMemoryError: CUDA"),
        ([SILENT, CLOSED], 1, SILENT),
        ([CLOSED], 1, CLOSED),
        ([CLOSED], 137, "a rank was ended by SIGKILL (out of memory, perhaps)"),
        ([], 1, ""),
    ],
)
def test_error_is_that_of_the_rank_that_crashed(errors: list[str], status: int, expected: str) -> None:
    reasons = {i: RankReason(Path(), pack=0, word=CRASHED, error=error) for i, error in enumerate(errors)}
    assert attempt_ends(reasons, status, 10, ONE)[-1].error == expected


def test_crashed_packs_come_last_and_have_their_own_tries() -> None:
    """Six packs of which some crash so many times; each attempt does the packs that are left in order."""

    def run(crashes: dict[int, int]) -> tuple[list[int], list[int]]:
        noted: list[End] = []
        first, limits = [], RequeueLimits(6, 0, 0, 1, 0)
        while True:
            order = packs_left(noted, 6, 1)
            first.append(order[0])
            for pack in order:
                crashes[pack] = crashes.get(pack, 0) - 1
                noted.append(End(COMPLETED if crashes[pack] < 0 else CRASHED, pack))
                if noted[-1].reason == CRASHED:
                    break
            if not decide(noted, limits).requeue:
                return first, sorted(end.pack for end in noted if end.reason == COMPLETED)

    assert run({0: 9, 1: 9, 3: 9}) == ([0, 1, 2, 4, 1, 3], [2, 4, 5])
    assert run({0: 1, 1: 1, 2: 1, 3: 2}) == ([0, 1, 2, 3, 4], [0, 1, 2, 4, 5])


def run_script(
    folder: Path,
    status: int,
    *,
    meanwhile: str = "true",
    python: str = sys.executable,
    restart: int = 0,
    can_run_elsewhere: bool = False,
    limits: RequeueLimits = ONE,
) -> tuple[int, str]:
    """Exit status of a job's script whose ranks ended with `status`, and what scontrol was asked for."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (
        ("scontrol", f'echo "$@" >> {folder}/asked\n[ "$1" != requeue ] || [ ! -e {folder}/refuses ]'),
        ("sbatch", f"exit {int(not can_run_elsewhere)}"),
        ("sleep", "exit 0"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    lines = ["set -euo pipefail", *script_before(folder, 0o022), f"({meanwhile}; exit {status})"]
    lines += script_after(python, limits)
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
    RankReason(reason_path(tmp_path / "7_2", 0), 3, 1, None, done, COMPLETED).write()
    assert run_script(tmp_path, 0, restart=3) == (0, "")
    assert noted(tmp_path)[-1] == COMPLETED


def test_a_task_with_fewer_packs_than_others_of_its_array_ends(tmp_path: Path) -> None:
    done = [{"pack": 0, "reason": COMPLETED, "error": ""}]
    RankReason(reason_path(tmp_path / "7_2", 0), 0, 1, None, done, COMPLETED).write()
    assert run_script(tmp_path, 0, limits=THREE) == (0, "")


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


def test_a_cut_line_is_left_out(tmp_path: Path) -> None:
    job, path = tmp_path / "7", tmp_path / "7.jsonl"
    assert read_attempts(job).starts == ()
    path.write_text('{"start": "x", "restart": 0, "node": "n1"}\n{"start": "y", "rest\n')
    append_ends(job, [End(CRASHED, 0, 1, "torn")])
    attempts = read_attempts(job)
    assert (len(attempts.starts), attempts.ends, attempts.has_ended) == (1, (End(CRASHED, 0, 1, "torn"),), True)
    assert json.loads(path.read_text().splitlines()[-1])["error"] == "torn"
