"""The requeue decision as a table."""

import dataclasses
import json
from pathlib import Path

import pytest

from launch.tasks.attempts import (
    COMPLETED,
    CRASHED,
    FAILED,
    PREEMPTED,
    STOPPED,
    TERMINATED,
    TIMED_OUT,
    End,
    RankReason,
    append_lines,
    packs_left,
    read_attempts,
)
from launch.tasks.decision import RequeueLimits, attempt_ends, decide

LIMITS = RequeueLimits(max_timeouts=2, max_preemptions=3, max_retries=1, seconds_in_time=1000, num_ranks=2)


def ends(*words: str | tuple[str, int]) -> list[End]:
    """Ends of attempts: "preempted" alone or with the pack that it was at, by default 0; with no pack "preempted-"."""
    found = []
    for word in words:
        reason, pack = (word, 0) if isinstance(word, str) else word
        found.append(End(reason.removesuffix("-"), None if reason.endswith("-") else pack, 137, node="n1"))
    return found


@pytest.mark.parametrize(
    ("num_packs", "words", "requeues"),
    [
        (1, [TIMED_OUT] * 2, True),
        (1, [TIMED_OUT] * 3, False),
        (1, [PREEMPTED] * 3, True),
        (1, [PREEMPTED] * 4, False),
        (1, [TIMED_OUT] * 2 + [CRASHED, PREEMPTED], True),  # each reason has its own limit
        (1, [CRASHED], True),
        (1, [CRASHED, PREEMPTED, CRASHED], False),
        (1, [FAILED], False),
        (1, ["crashed-"], True),  # before a pack began
        (1, ["crashed-", "crashed-"], False),
        (1, ["crashed-", CRASHED], True),
        (1, ["failed-"], False),
        (3, [(FAILED, 0)], True),  # on one rank alone: the other packs are left
        (3, [(FAILED, 0), (FAILED, 1), (FAILED, 2)], False),
        (3, [(COMPLETED, 1), (FAILED, 0), (CRASHED, 2)], True),
        (3, [(COMPLETED, 1), (FAILED, 0), (CRASHED, 2), (CRASHED, 2)], False),
        (3, [(CRASHED, 0), (CRASHED, 1), (CRASHED, 0), (CRASHED, 1)], True),  # 2 is left
        (3, [(CRASHED, i) for i in (0, 1, 2)] * 2, False),
        (3, [(COMPLETED, 0), (COMPLETED, 1), ("preempted-", 0)], True),
    ],
)
def test_requeues_up_to_the_limits(num_packs: int, words: list[str | tuple[str, int]], requeues: bool) -> None:
    assert decide(ends(*words), num_packs, LIMITS).requeue == requeues


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
    assert decide(ends(*words), 3, LIMITS).status == status
    assert decide([End(FAILED, 0, 0)], 1, LIMITS).status == 1


def test_avoids_the_nodes_of_a_crash_only() -> None:
    excluded = RequeueLimits(2, 3, 1, 1000, exclude="n[8-9]")
    assert str(decide(ends(CRASHED), 1, excluded)) == "requeue 137 n[8-9],n1"
    assert str(decide(ends(CRASHED), 1, LIMITS)) == "requeue 137 n1"
    assert str(decide(ends(PREEMPTED), 1, excluded)) == "requeue 137"


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
    assert [end.reason for end in attempt_ends(reasons, status, seconds, LIMITS)] == [reason]


def test_packs_of_an_attempt_end_one_by_one() -> None:
    done = [{"pack": 0, "reason": COMPLETED, "error": ""}, {"pack": 2, "reason": FAILED, "error": "not a number"}]
    main = RankReason(Path(), pack=1, finished=done)
    found = attempt_ends({0: main}, 139, 10, LIMITS)
    assert [(end.pack, end.reason, end.error) for end in found] == [
        (0, COMPLETED, ""),
        (2, FAILED, "not a number"),
        (1, CRASHED, "a rank was ended by SIGSEGV"),
    ]
    main.word, main.pack = COMPLETED, None
    assert [end.pack for end in attempt_ends({0: main}, 1, 10, LIMITS)] == [0, 2]
    alone = {
        0: RankReason(Path(), pack=1, word=CRASHED, error="gloo"),
        1: RankReason(Path(), 0, 1, [], FAILED, "full"),
    }
    assert attempt_ends(alone, 1, 10, LIMITS) == [End(FAILED, 1, 1, "full")]
    assert decide([End(FAILED, None, 1)], 1, LIMITS).requeue is False
    assert attempt_ends({}, 0, 10, LIMITS) == []  # as of a node that failed: SLURM requeues the job


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
    assert attempt_ends(reasons, status, 10, LIMITS)[-1].error == expected


def test_crashed_packs_come_last_and_have_their_own_tries() -> None:
    """Six packs of which some crash so many times; each attempt does the packs that are left in order."""

    def run(crashes: dict[int, int]) -> tuple[list[int], list[int]]:
        noted: list[End] = []
        first, limits = [], RequeueLimits(0, 0, 1, 0)
        while True:
            order = packs_left(noted, 6, 1)
            first.append(order[0])
            for pack in order:
                crashes[pack] = crashes.get(pack, 0) - 1
                noted.append(End(COMPLETED if crashes[pack] < 0 else CRASHED, pack))
                if noted[-1].reason == CRASHED:
                    break
            if not decide(noted, 6, limits).requeue:
                return first, sorted(end.pack for end in noted if end.reason == COMPLETED)

    assert run({0: 9, 1: 9, 3: 9}) == ([0, 1, 2, 4, 1, 3], [2, 4, 5])
    assert run({0: 1, 1: 1, 2: 1, 3: 2}) == ([0, 1, 2, 3, 4], [0, 1, 2, 4, 5])


def test_a_cut_line_is_left_out(tmp_path: Path) -> None:
    job, path = tmp_path / "7", tmp_path / "7.jsonl"
    assert read_attempts(job).starts == ()
    path.write_text('{"start": "x", "restart": 0, "node": "n1"}\n{"start": "y", "rest\n')
    append_lines(job, [dataclasses.asdict(End(CRASHED, 0, 1, "torn"))])
    attempts = read_attempts(job)
    assert (len(attempts.starts), attempts.ends, attempts.has_ended) == (1, (End(CRASHED, 0, 1, "torn"),), True)
    assert json.loads(path.read_text().splitlines()[-1])["error"] == "torn"
