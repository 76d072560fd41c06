"""What was submitted for a study, and its points' states from attempts, reasons and the queue."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from dynexit.run_dir import write_json
from dynexit.study.grid import Study
from dynexit.study.read import load_study
from launch.slurm import cluster
from launch.slurm.attempts import COMPLETED, CRASHED, FAILED, End, RankReason, append_ends, reason_path
from launch.slurm.cluster import QueuedJob
from launch.slurm.submissions import QueueView, Submission, Submitted, all_submitted, live_state, unlisted
from launch.status import report_state, study_status
from tests.command_line import TINY

Queue = dict[str, QueuedJob]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return load_study(TINY, [f"runs_dir={tmp_path}", "dist.max_retries=2"])


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    """What squeue shows."""
    shown: Queue = {}
    monkeypatch.setattr(cluster, "queue", lambda: shown)
    monkeypatch.setattr(cluster, "is_here", lambda: True)
    return shown


def queued(job_id: str, state: str, node: str = "", reason: str = "None") -> Queue:
    return {job_id: QueuedJob(job_id, state, reason, node)}


def note(path: Path, *starts: str, ends: Sequence[End] = ()) -> None:
    """Notes starts, numbered, and then ends."""
    lines = (
        f'{{"start": "2026-11-21T20:0{i}:00", "restart": {i}, "node": "{node}"}}\n' for i, node in enumerate(starts)
    )
    with path.open("a") as file:
        file.writelines(lines)
    append_ends(path.with_suffix(""), ends)


def prepared(study: Study) -> Study:
    for point in study.points:
        write_json(study.directory / "prepare" / point.ids["prepare"] / "DONE", {"id": point.ids["prepare"]})
    return study


@pytest.mark.parametrize(
    ("state", "last", "expected"),
    [
        ("PENDING", "", "waiting (Dependency)"),
        ("PENDING", "preempted", "preempted, waits to resume"),
        ("COMPLETING", "timed-out", "timed-out, waits to resume"),
        ("COMPLETING", "", "train ending"),
        ("RUNNING", "crashed", "train running"),
    ],
)
def test_state_of_a_live_job(state: str, last: str, expected: str) -> None:
    entry = QueuedJob("7_1", state, "Dependency", "dev2")
    assert entry.is_live
    assert live_state(entry, "train", last) == expected


def test_state_of_the_report(study: Study, queue: Queue) -> None:
    queue |= queued("9", "PENDING", reason="Dependency")
    assert report_state(study, QueueView(study.directory)) == ("to do", True)
    submission = Submission(study, None)
    submission.add(["7_0"], "train", [[{"train": [point.id for point in study.points]}]])
    submission.add(["9"], "report", [[{}]])
    assert report_state(study, QueueView(study.directory)) == ("waiting (Dependency)", False)
    queue.clear()
    silent = "failed: report job 9 ended without an error message"
    assert report_state(study, QueueView(study.directory)) == (silent, True)
    queue |= queued("9", "COMPLETED")
    lost = "failed: report job 9 completed, but its outputs are missing"
    assert report_state(study, QueueView(study.directory)) == (lost, True)
    note(submission.folder / "9.jsonl", "dev1", ends=[End(FAILED, 0, 1, "no space")])
    assert report_state(study, QueueView(study.directory)) == ("failed: no space", True)
    write_json(study.directory / "report" / "DONE", {})
    submission.add(["10"], "report", [[{}]])
    queue |= queued("10", "PENDING", reason="Dependency")
    assert report_state(study, QueueView(study.directory))[1] is False  # it will make another
    queue.clear()
    damaged, is_over = report_state(study, QueueView(study.directory))
    assert damaged.startswith(f"damaged: {study.directory}/report/DONE is damaged; move it aside with `mv ")
    assert is_over


def test_logs_of_a_job_outputs_first(tmp_path: Path) -> None:
    jobs = {"7_2": 11, "7_20": 1, "8": 2}
    for job_id, num_ranks in jobs.items():
        for rank in range(num_ranks):
            for kind in ("err", "out"):
                (tmp_path / f"{job_id}_{rank}_log.{kind}").touch()
    for job_id, num_ranks in jobs.items():
        expected = [f"{job_id}_{rank}_log.{kind}" for kind in ("out", "err") for rank in range(num_ranks)]
        assert [path.name for path in Submitted(job_id, "train", (), tmp_path).logs()] == expected


def test_a_failed_backbone_explains_every_point(study: Study, queue: Queue) -> None:
    backbone = {"prepare": [study.points[0].ids["prepare"]]}
    submission = Submission(study, None)
    submission.add(["7"], "prepare", [[backbone]])
    note(submission.folder / "7.jsonl", "dev1", "dev2", ends=[End(FAILED, 0, 1, "no room")])
    for kind in ("out", "err"):
        (submission.folder / f"7_0_log.{kind}").write_text("Traceback\n")
    states = study_status(study)
    assert len(states) == 6
    assert {Path(one.log).name for one in states} == {"7_0_log.err"}
    assert {(one.state, one.figures, one.attempts, one.node) for one in states} == {("failed", "no room", "2", "dev2")}
    Submission(study, None).add(["8"], "prepare", [[backbone]])
    again = {(one.state, one.figures, one.attempts, one.node) for one in study_status(study)}
    assert again == {("failed", "prepare job 8 ended without an error message", "2", "dev2")}  # of both submissions


def test_each_pack_of_a_task_has_its_own_state(study: Study, queue: Queue) -> None:
    queue |= queued("7", "RUNNING", "dev3")
    ids = [point.id for point in prepared(study).points]
    submission = Submission(study, None)
    submission.add(["7"], "train", [[{"train": [one], "record": [f"{one}-record"]} for one in ids]])
    path = submission.folder / "7.jsonl"
    # 0 crashed too often, 1 failed, 2 crashed once, 3 is at work, the others wait
    ends = [End(FAILED, 1, 0, "not finite"), *(End(CRASHED, i, 137, "torn", "dev1", "then") for i in (0, 2, 0, 0))]
    note(path, "dev1", "dev1", "dev1", "dev1", ends=ends)
    with path.open("a") as file:
        file.write('{"start": "2026-11-21T20:09:00", "restart": 4, "node": "dev3"}\n')
    RankReason(reason_path(submission.folder / "7", 0), 4, pack=3).write()
    over = "torn; crashed then on dev1 with exit status 137"
    shown = [(one.state, one.figures, one.attempts) for one in study_status(study)]
    assert shown == [
        ("failed", over, "3"),
        ("failed", "not finite", "1"),
        ("crashed, waits to resume", "", "1"),
        ("train running", "", "1"),
        ("train waits for its turn", "", "0"),
        ("train waits for its turn", "", "0"),
    ]
    finished = [{"pack": 3, "reason": FAILED, "error": "no space"}]
    RankReason(reason_path(submission.folder / "7", 0), 4, pack=4, finished=finished).write()
    assert [one.figures for one in study_status(study)][3] == "no space"  # reported while others run
    assert [one.attempts for one in study_status(study)][3:5] == ["1", "1"]
    queue.clear()
    append_ends(
        path.with_suffix(""), [End(FAILED, 3, 0, "no space"), End(CRASHED, 4, 1, "KeyError: 'x'", "dev3", "then")]
    )
    figures = [one.figures for one in study_status(study)]
    assert figures[3:5] == ["no space", "KeyError: 'x'; crashed then on dev3 with exit status 1"]
    assert figures[5] == "train job 7 ended without an error message"
    append_ends(path.with_suffix(""), [End(COMPLETED, 5)])
    assert study_status(study)[5].figures.startswith("completed")


def test_an_attempt_that_noted_no_end_is_told_by_its_state(study: Study, queue: Queue) -> None:
    queue |= queued("7", "NODE_FAIL")
    submission = Submission(prepared(study), None)
    submission.add(["7"], "train", [[{"train": [point.id for point in study.points]}]])
    path = submission.folder / "7.jsonl"
    note(path, "dev1", ends=[End(CRASHED, 0, 137, "", "dev1", "then")])
    assert {one.figures for one in study_status(study)} == {"crashed then on dev1 with exit status 137"}
    note(path, "dev2")
    assert {one.figures for one in study_status(study)} == {"train job 7 ended as NODE_FAIL"}
    (submission.folder / "7.cancelled").touch()
    assert {one.state for one in study_status(study)} == {"cancelled"}


def test_a_refused_submission_is_taken_back(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[str] = []
    monkeypatch.setattr(cluster, "cancel_jobs", cancelled.extend)
    assert Submission(study, None).take_back() == ""
    assert not list((study.directory / "slurm").iterdir())
    submission = Submission(study, None)
    assert submission.folder.stat().st_mode & 0o777 == 0o700
    submission.add(["7"], "prepare", [[{"prepare": ["p"]}]])
    submission.add(["8_0", "8_1"], "train", [[{"train": ["a"]}], [{"train": ["b"]}]])
    assert submission.take_back() == "; what was submitted before it is cancelled"
    assert cancelled == ["7", "8_0", "8_1"]
    assert all(job.is_cancelled for job in all_submitted(study.directory))


def test_jobs_that_no_list_knows_are_named(study: Study) -> None:
    place = str(study.directory.absolute())
    jobs = [QueuedJob(one, "RUNNING", "", "n1", place) for one in ("7_0", "8_0", "9")]
    jobs += [QueuedJob("5", "COMPLETED", "", "n1", place), QueuedJob("6", "RUNNING", "", "n1", place + "2")]
    queue = {job.job_id: job for job in jobs}
    Submission(study, None).add(["7_0", "9"], "train", [[{"train": ["a"]}], [{"train": ["b"]}]])
    assert "are queued (8)" in unlisted(study.directory, queue)
    del queue["8_0"]
    assert unlisted(study.directory, queue) == ""


def test_lists_of_earlier_versions_are_read(study: Study, queue: Queue) -> None:
    folder = study.directory / "slurm" / "0001"
    write_json(folder / "jobs.json", {"site": {}, "arrays": [{"stage": "train", "tasks": {"7_0": ["a", "b"]}}]})
    assert [(job.job_id, job.packs) for job in all_submitted(study.directory)] == [("7_0", ())]
    assert {one.state for one in study_status(study)} == {"waiting"}
