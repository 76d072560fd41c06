"""What is told of a job in the queue, and which of many errors."""

from pathlib import Path

import pytest
from launch.slurm.queue_view import QueueView, last_error, live_state

from dynexit.errors import UserError
from dynexit.run_dir import write_json
from dynexit.study.read import load_study
from launch.slurm import cluster, submissions
from launch.slurm.cluster import QueuedJob
from launch.slurm.submissions import Submission, Submitted, all_submitted, settled_jobs
from launch.status import report_state, study_status
from tests.command_line import TINY

CLOSED = "[rank{}]: RuntimeError: [gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.1.1]:15771."
SILENT = "[rank0]: RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 10000ms for recv"


def logs(folder: Path, *texts: str) -> list[Path]:
    paths = [folder / f"7_{rank}_log.err" for rank in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text("Traceback (most recent call last):\n" + text + "\nsrun: job ended\n")
    return paths


def test_the_rank_that_failed_is_told_rather_than_those_that_lost_it(tmp_path: Path) -> None:
    own = "[rank1]: torch.OutOfMemoryError: CUDA out of memory"
    assert last_error(logs(tmp_path, CLOSED.format(0), own)) == "torch.OutOfMemoryError: CUDA out of memory"
    assert last_error(logs(tmp_path, SILENT, CLOSED.format(1))) == SILENT.removeprefix("[rank0]: ")
    assert last_error(logs(tmp_path, CLOSED.format(0), "fine")) == CLOSED.format(0).removeprefix("[rank0]: ")
    assert last_error(logs(tmp_path, "fine", "fine")) == ""
    assert last_error([]) == ""
    out = tmp_path / "7_0_log.out"
    out.write_text("step 3/7\nsubmitit ERROR (today) - Could not dump error:\n[Errno 28] No space left on device\n")
    assert last_error([out, *logs(tmp_path, "fine")]) == "[Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("state", "last", "told"),
    [
        ("PENDING", "", "waiting (Dependency)"),
        ("PENDING", "preempted", "preempted, waits to go on"),
        ("COMPLETING", "timed-out", "timed-out, waits to go on"),
        ("COMPLETING", "", "train ending"),
        ("RUNNING", "crashed", "train running"),
    ],
)
def test_a_job_that_is_told_to_end_does_not_wait(state: str, last: str, told: str) -> None:
    entry = QueuedJob("7_1", state, "Dependency", "dev2")
    assert entry.is_live
    assert live_state(entry, "train", last) == told


def test_what_no_scheduler_has_looked_at_yet_waits() -> None:
    assert live_state(QueuedJob("7_1", "PENDING", "None", ""), "train", "") == "waiting"


def test_what_became_of_the_report_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(TINY, [f"runs_dir={tmp_path}"])
    queue = {"9": QueuedJob("9", "PENDING", "Dependency", "")}
    monkeypatch.setattr(cluster, "queue", lambda: queue)
    assert report_state(study, QueueView(study.directory)) == ("to do", True)
    submission = Submission(study, {})
    submission.add(["7_0"], "train", [[point.id for point in study.points]])
    submission.add(["9"], "report", [[]])
    assert report_state(study, QueueView(study.directory)) == ("waiting (Dependency)", False)
    queue.clear()
    assert report_state(study, QueueView(study.directory)) == ("failed: report job 9 left no word", True)
    queue["9"] = QueuedJob("9", "COMPLETED", "None", "")
    lost = "failed: report job 9 is through, but what it should have left is not there"
    assert report_state(study, QueueView(study.directory)) == (lost, True)
    queue.clear()
    told = [{"stage": "report", "work": [study.points[0].id], "reason": "no space"}]
    write_json(submission.folder / "9.failures.json", told)
    assert report_state(study, QueueView(study.directory)) == ("failed: no space", True)
    write_json(study.directory / "report" / "DONE", {})
    queue["9"] = QueuedJob("9", "PENDING", "Dependency", "")
    assert report_state(study, QueueView(study.directory)) == ("waiting (Dependency)", False)  # it will make another
    queue.clear()
    damaged, is_over = report_state(study, QueueView(study.directory))
    assert damaged.startswith(f"damaged: {study.directory}/report/DONE is damaged; move it aside with `mv ")
    assert is_over


def test_each_job_has_its_own_logs_outputs_first(tmp_path: Path) -> None:
    jobs = {"7_2": 11, "7_20": 1, "8": 2}
    for job_id, num_ranks in jobs.items():
        for rank in range(num_ranks):
            for kind in ("err", "out"):
                (tmp_path / f"{job_id}_{rank}_log.{kind}").touch()
    for job_id, num_ranks in jobs.items():
        expected = [f"{job_id}_{rank}_log.{kind}" for kind in ("out", "err") for rank in range(num_ranks)]
        assert [path.name for path in Submitted(job_id, "train", (), tmp_path).logs()] == expected


def test_a_backbone_that_failed_tells_every_point_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(TINY, [f"runs_dir={tmp_path}"])
    monkeypatch.setattr(cluster, "queue", dict)
    backbone = study.points[0].ids["prepare"]
    submission = Submission(study, {})
    submission.add(["7"], "prepare", [[backbone]])
    (submission.folder / "7.starts").write_text("2026-11-21T20:00:00 on dev1\n2026-11-21T20:03:00 on dev2\n")
    write_json(submission.folder / "7.failures.json", [{"stage": "prepare", "work": [backbone], "reason": "no room"}])
    for kind in ("out", "err"):
        (submission.folder / f"7_0_log.{kind}").write_text("Traceback\n")
    states = study_status(study)
    assert len(states) == 6
    assert {Path(one.log).name for one in states} == {"7_0_log.err"}
    assert {(one.state, one.figures, one.attempts, one.node) for one in states} == {("failed", "no room", "2", "dev2")}
    Submission(study, {}).add(["8"], "prepare", [[backbone]])
    again = {(one.state, one.figures, one.attempts, one.node) for one in study_status(study)}
    assert again == {("failed", "prepare job 8 left no word", "2", "dev2")}  # the tries of both submissions


def test_each_pack_of_a_task_that_does_several_has_its_own_state_tries_and_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(TINY, [f"runs_dir={tmp_path}"])
    queue = {"7": QueuedJob("7", "RUNNING", "", "dev3")}
    monkeypatch.setattr(cluster, "queue", lambda: queue)
    ids = [point.id for point in study.points]
    for point in study.points:
        write_json(study.directory / "prepare" / point.ids["prepare"] / "DONE", {"id": point.ids["prepare"]})
    submission = Submission(study, {})
    submission.add(["7"], "train", [ids])
    times = {0: 3, 1: 1, 2: 2, 3: 1}  # 0 crashed too often, 2 once, 1 failed, 3 is being done, the rest waits
    begun = "".join(f"{i} {ids[i]}\n" * count for i, count in times.items())
    (submission.folder / "7.parts").write_text(begun)
    (submission.folder / "7.now").write_text("3\n")
    end = "crashed 2026-11-21T20:0{}:00 on dev1 with exit status 137 in part {}\n"
    ends = "".join(end.format(minute, part) for minute, part in enumerate((0, 2, 0, 0)))
    ends += "crashed 2026-11-21T20:07:00 on dev1 with exit status 1 in noted parts\n"
    (submission.folder / "7.ends").write_text(ends)
    (submission.folder / "7.starts").write_text("2026-11-21T20:00:00 on dev1\n" * 7)
    said = ["part 0 begins", "ValueError: early", "part 0 begins", "part 1 begins", "KeyError: 'other'"]
    (submission.folder / "7_0_log.err").write_text("\n".join([*said, "part 2 begins", "OSError: torn", ""]))
    over = end.format(3, 0).strip()
    told = [(one.state, one.figures, one.attempts) for one in study_status(study)]
    waits = ("train waits for its turn", "", "0")
    assert told == [
        ("failed", over, "3"),  # what it said before its last try is not why it ended
        ("train waits for its turn", "", "1"),
        ("crashed, waits to go on", "", "2"),
        ("train running", "", "1"),
        waits,
        waits,
    ]
    given_up = [{"job": 1, "stage": "train", "work": [ids[1]], "reason": "NaN"}]
    write_json(submission.folder / "7.given-up.json", given_up)
    assert [one.figures for one in study_status(study)] == [over, "NaN", "", "", "", ""]  # told while others go on
    (submission.folder / "7.given-up.json").unlink()
    queue.clear()
    (submission.folder / "7.now").unlink()
    write_json(submission.folder / "7.failures.json", given_up)
    told_of = [one.figures for one in study_status(study)]
    assert told_of[:3] == [over, "NaN", "OSError: torn; " + end.format(1, 2).strip()]


def test_the_end_of_a_try_before_is_not_why_a_job_that_left_no_word_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(TINY, [f"runs_dir={tmp_path}"])
    monkeypatch.setattr(cluster, "queue", lambda: {"7": QueuedJob("7", "FAILED", "", "dev1")})
    for point in study.points:
        write_json(study.directory / "prepare" / point.ids["prepare"] / "DONE", {"id": point.ids["prepare"]})
    submission = Submission(study, {})
    submission.add(["7"], "train", [[point.id for point in study.points]])
    end = "crashed 2026-11-22T07:00:05 on dev1 with exit status 137"
    (submission.folder / "7.ends").write_text(end + "\n")
    for start, told in (("2026-11-22T07:00:00", end), ("2026-11-22T07:00:10", "train job 7 ended as FAILED")):
        (submission.folder / "7.starts").write_text(f"{start} on dev1\n")
        assert {one.figures for one in study_status(study)} == {told}


def test_what_is_ending_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(TINY, [f"runs_dir={tmp_path}"])
    Submission(study, {}).add(["7", "8"], "train", [["a"], ["b"]])
    states = ["COMPLETING", "COMPLETING", "PENDING"]
    waited = []
    monkeypatch.setattr(cluster, "is_here", lambda: True)
    monkeypatch.setattr(cluster, "queue", lambda: {"7": QueuedJob("7", states[min(len(waited), 2)], "", "")})
    monkeypatch.setattr(submissions.time, "sleep", waited.append)
    assert [(job.job_id, entry.state) for job, entry in settled_jobs(study.directory)] == [("7", "PENDING")]
    assert waited == [10, 10]
    monkeypatch.setattr(cluster, "queue", lambda: {str(7 + len(waited) % 2): QueuedJob("", "COMPLETING", "", "")})
    assert settled_jobs(study.directory)  # of a large sweep there is always one that ends
    assert len(waited) == 3
    monkeypatch.setattr(cluster, "queue", lambda: {"7": QueuedJob("7", "COMPLETING", "", "")})
    with pytest.raises(UserError, match=r"are ending \(7\); run it again when squeue shows them no more"):
        settled_jobs(study.directory)


def test_a_submission_that_is_refused_on_its_way_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(TINY, [f"runs_dir={tmp_path}"])
    cancelled: list[str] = []
    monkeypatch.setattr(cluster, "cancel_jobs", cancelled.extend)
    assert Submission(study, {}).take_back() == ""
    assert not (study.directory / "slurm").exists()
    submission = Submission(study, {})
    submission.add(["7"], "prepare", [["p"]])
    submission.add(["8_0", "8_1"], "train", [["a"], ["b"]])
    assert submission.take_back() == "; what was submitted before it is cancelled"
    assert cancelled == ["7", "8_0", "8_1"]
    assert [job.ends[0].split()[0] for job in all_submitted(study.directory)] == ["cancelled"] * 3
