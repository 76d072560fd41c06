"""What a rank of a job does with its packs, with signals and with errors."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from dynexit.dist import Ranks
from dynexit.errors import Failure, UserError, received_signals
from dynexit.jobs.planning.missing import Job, split_by_input
from dynexit.run_dir import mark_done, write_text
from dynexit.study.grid import Point
from launch.tasks import worker
from launch.tasks.attempts import (
    COMPLETED,
    CRASHED,
    FAILED,
    STOPPED,
    TERMINATED,
    End,
    RankReason,
    append_lines,
    read_reason,
)
from launch.tasks.decision import RequeueLimits, attempt_ends, decide
from launch.tasks.worker import listed_work, main
from tests.command_line import ENVIRONMENT, ROOT

STAGES = ("prepare", "train", "record", "search")
Train = Callable[[Sequence[Point]], None]


def job_of(stage: str, letters: str, folder: Path) -> Job:
    ids = [{one: f"{letter}-{one}" for one in STAGES} | {"prepare": "p"} for letter in letters]
    config = SimpleNamespace(dist=SimpleNamespace(max_retries=1))
    common = {"study_dir": folder, "config": config, "is_by_time": False}
    points = [SimpleNamespace(id=one["train"], ids=one, label=f"point {one['train']}", **common) for one in ids]
    return Job(stage, tuple(cast(Point, point) for point in points))


def finish(job: Job) -> None:
    for point in job.points:
        folder = job.study_dir / job.stage / point.ids[job.stage]
        write_text(folder / "results", point.id)
        mark_done(folder, point.ids[job.stage], ["results"])


@pytest.fixture
def rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a submission in which this process is the only rank of job 7_2."""
    folder = tmp_path / "0001"
    folder.mkdir(mode=0o700)
    variables = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_PROCID": "0"}
    for name, value in {**variables, "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    before = {one: signal.getsignal(one) for one in (signal.SIGUSR2, signal.SIGTERM)}
    yield folder
    for number, handler in before.items():
        signal.signal(number, handler)
    received_signals.clear()


def run(folder: Path, *packs: tuple[Job, ...]) -> tuple[int, RankReason]:
    """The exit status of a rank with these packs, and what it leaves."""
    work = [{job.stage: [point.id for point in job.points] for job in pack} for pack in packs]
    arrays = [{"stage": "train", "tasks": {"7_2": work}}]
    (folder / "jobs.json").write_text(json.dumps({"site": None, "arrays": arrays}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.tasks.folder.read_jobs", lambda read, found: list(packs) if found == work else [])
        status = main(folder / "7_2", 0)
    reason = read_reason(folder / "7_2", 0, 0)
    assert reason is not None
    return status, reason


def train_packs(folder: Path, letters: str) -> list[tuple[Job, ...]]:
    """Packs that train and record a point each, the backbone of which is there."""
    finish(job_of("prepare", letters, folder))
    return [(job_of("train", one, folder), job_of("record", one, folder)) for one in letters]


def set_training(monkeypatch: pytest.MonkeyPatch, train: Train) -> list[str]:
    """Puts `train` in place of training, which then finishes, and of recording nothing but that; what was begun."""
    begun: list[str] = []

    def do(stage: str) -> Train:
        def job(points: Sequence[Point]) -> None:
            begun.extend(f"{stage} {point.id}" for point in points)
            if stage == "train":
                train(points)
            finish(Job(stage, tuple(points)))

        return job

    for stage in ("train", "record"):
        monkeypatch.setattr(f"dynexit.jobs.{stage}.run_{stage}", do(stage))
    return begun


def test_a_failed_pack_stops_no_other(rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(points: Sequence[Point]) -> None:
        if points[0].id == "a-train":
            raise Failure("not a number")

    begun = set_training(monkeypatch, train)
    status, reason = run(rank, *train_packs(rank, "ab"))
    assert status == 1
    assert begun == ["train a-train", "train b-train", "record b-train"]
    assert [(one["pack"], one["reason"], one["error"]) for one in reason.finished] == [
        (0, FAILED, "not a number"),
        (1, COMPLETED, ""),
    ]
    assert (reason.word, reason.pack) == (COMPLETED, None)


def test_trained_members_of_a_failed_pack_are_recorded(rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(points: Sequence[Point]) -> None:
        finish(Job("train", tuple(points[:1])))
        raise Failure("member 1 is not finite")

    begun = set_training(monkeypatch, train)
    finish(job_of("prepare", "a", rank))
    status, reason = run(rank, (job_of("train", "ab", rank), job_of("record", "ab", rank)))
    assert status == 1
    assert begun == ["train a-train", "train b-train", "record a-train"]
    assert reason.finished[0]["error"] == "member 1 is not finite"


def test_a_crash_ends_the_program_in_its_pack(rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(points: Sequence[Point]) -> None:
        if points[0].id == "b-train":
            raise RuntimeError("torn")

    begun = set_training(monkeypatch, train)
    packs = train_packs(rank, "abc")
    status, reason = run(rank, *packs)
    assert (status, reason.word, reason.pack, reason.error) == (1, CRASHED, 1, "RuntimeError: torn")
    assert [one["pack"] for one in reason.finished] == [0]
    ends = [End(COMPLETED, 0), End(CRASHED, 1), End(CRASHED, 1)]
    append_lines(rank / "7_2", [dataclasses.asdict(end) for end in ends])
    begun.clear()
    status, reason = run(rank, *packs)
    assert begun == ["train c-train", "record c-train"]
    assert status == 1  # 1 crashed too often


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_lack_of_memory_is_a_failure(rank: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int) -> None:
    def train(points: Sequence[Point]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    set_training(monkeypatch, train)
    monkeypatch.setattr(worker, "_start_ranks", lambda first, job: Ranks(0, num_ranks, torch.device("cpu")))
    monkeypatch.setattr(Ranks, "broadcast", lambda self, value: value)
    finish(job_of("prepare", "a", rank))
    status, reason = run(rank, (job_of("train", "ab", rank),))
    expected = (
        "out of memory with 2 points in one pack (CUDA out of memory.); set dist.members_per_pack below 2, or "
        "train.micro_batch_size lower"
    )
    (end,) = attempt_ends({0: reason}, status, 10, RequeueLimits(1, 1, 1, 1e9, num_ranks))
    assert (status, end.reason, end.pack, end.error) == (1, FAILED, 0, expected)
    assert not decide([end], 1, RequeueLimits(1, 1, 1, 1e9)).requeue


@pytest.mark.parametrize(
    ("number", "retries"),
    [
        (errno.EIO, True),
        (errno.ESTALE, True),
        (errno.ETIMEDOUT, True),
        (errno.ENOTCONN, True),
        (errno.ENOENT, False),
        (errno.EACCES, False),
        (errno.ENOSPC, False),
        (errno.EDQUOT, False),
    ],
)
@pytest.mark.parametrize("is_wrapped", [True, False])
def test_errors_of_a_file_system_by_number(
    rank: Path, monkeypatch: pytest.MonkeyPatch, number: int, retries: bool, is_wrapped: bool
) -> None:
    def train(points: Sequence[Point]) -> None:
        error = OSError(number, os.strerror(number), "weights")
        if is_wrapped:
            raise Failure(f"weights could not be read: {error.strerror}") from error
        raise error

    set_training(monkeypatch, train)
    _, reason = run(rank, *train_packs(rank, "a"))
    assert (reason.word, [one["reason"] for one in reason.finished]) == (
        (CRASHED, []) if retries else (COMPLETED, [FAILED])
    )
    assert os.strerror(number) in (reason.error if retries else reason.finished[0]["error"])


def test_a_failure_of_one_rank_alone_ends_the_job(rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(points: Sequence[Point]) -> None:
        raise Failure("no room here")

    set_training(monkeypatch, train)
    monkeypatch.setattr(worker, "_start_ranks", lambda first, job: Ranks(0, 2, torch.device("cpu")))
    monkeypatch.setattr(Ranks, "broadcast", lambda self, value: value)
    status, reason = run(rank, *train_packs(rank, "ab"))
    assert (status, reason.word, reason.pack, reason.error) == (1, FAILED, 0, "no room here")


@pytest.mark.parametrize(("number", "word"), [(signal.SIGUSR2, STOPPED), (signal.SIGTERM, TERMINATED)])
def test_a_signal_ends_the_work_between_two_packs(
    rank: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, word: str
) -> None:
    begun = set_training(monkeypatch, lambda points: os.kill(os.getpid(), number))
    status, reason = run(rank, *train_packs(rank, "ab"))
    assert begun == ["train a-train", "record a-train"]  # the handler only notes it
    assert (status, reason.word, reason.pack) == (75, word, 0)
    assert [one["pack"] for one in reason.finished] == [0]


def test_an_error_after_a_signal_is_no_crash(rank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(points: Sequence[Point]) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        raise RuntimeError("a process of the pool ended")

    set_training(monkeypatch, train)
    status, reason = run(rank, *train_packs(rank, "a"))
    assert (status, reason.word) == (75, STOPPED)


def test_input_is_checked_in_files(tmp_path: Path) -> None:
    finish(job_of("train", "abc", tmp_path))
    (tmp_path / "train" / "b-train" / "results").write_text("")
    job = job_of("record", "abcd", tmp_path)
    ready, damaged, missing = split_by_input(job)
    assert [point.id for point in ready.points] == ["a-train", "c-train"]
    assert len(damaged) == 1
    assert damaged[0].startswith(f"{tmp_path}/train/b-train/results has 0 bytes instead of 7; move it ")
    assert missing == ["record point d-train: its train is not done"]
    assert split_by_input(job_of("report", "abcd", tmp_path))[1:] == ([], [])
    assert split_by_input(job_of("train", "a", tmp_path))[2] == ["train point a-train: its prepare is not done"]


def test_missing_input_is_a_failure(rank: Path) -> None:
    status, reason = run(rank, (job_of("search", "a", rank),))
    assert (status, reason.finished[0]["error"]) == (1, "search point a-train: its record is not done")


def test_a_job_that_is_not_listed_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_LIST_SECONDS", 0)
    for arrays in ("", '{"site": null, "arrays": [{"stage": "train", "tasks": {"7_1": [{}]}}]}'):
        if arrays:
            (tmp_path / "jobs.json").write_text(arrays)
        with pytest.raises(UserError, match=r"jobs\.json does not list job 7_2; submit the study again"):
            listed_work(tmp_path / "7_2")


def test_a_superseded_process_ends(tmp_path: Path) -> None:
    job, attempts = tmp_path / "7_2", tmp_path / "7_2.jsonl"
    attempts.write_text('{"start": "x", "restart": 1, "node": "n1"}\n')
    code = "import sys, pathlib; from launch.tasks import worker; worker._WATCH_SECONDS = 0.01; print(flush=True)"
    code += "; worker._watch(pathlib.Path(sys.argv[1]), 1)"
    command = [sys.executable, "-c", code, job]
    with subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        with attempts.open("a") as file:
            file.write('{"start": "x", "restart": 2, "node": "n2"}\n')
        assert process.wait(60) == 1


def test_the_program_has_handlers_before_its_imports() -> None:
    code = "import sys, launch.tasks.worker; print([m for m in ('torch', 'pydantic', 'submitit') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert out.stdout == "[]\n"
