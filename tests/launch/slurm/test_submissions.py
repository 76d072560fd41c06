"""What was submitted for a study, and its points' states from attempts, reasons and the queue."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from dynexit.errors import Failure
from dynexit.run_dir import write_json
from dynexit.study.grid import Study
from dynexit.study.read import load_study
from dynexit.study.stages import stages_until
from launch.__main__ import main
from launch.slurm import cluster
from launch.slurm.cluster import QueuedJob
from launch.slurm.site import Site
from launch.slurm.submissions import QueueView, Submitted, all_submitted
from launch.slurm.submit import submit_study
from launch.status import report_state, study_status
from launch.tasks.attempts import COMPLETED, CRASHED, FAILED, End, Work, append_lines
from launch.tasks.folder import add_array, new_folder
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
    append_ends(path.with_suffix(""), *ends)


def append_ends(job: Path, *ends: End) -> None:
    append_lines(job, [dataclasses.asdict(end) for end in ends])


def submit(study: Study, stage: str, tasks: dict[str, list[Work]]) -> Path:
    """Lists an array in a new submission; its folder."""
    folder = new_folder(study, "slurm")
    add_array(folder, stage, tasks)
    return folder


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
def test_state_of_a_live_job(study: Study, queue: Queue, state: str, last: str, expected: str) -> None:
    queue |= queued("7_1", state, "dev2", "Dependency")
    folder = submit(prepared(study), "train", {"7_1": [{"train": [point.id for point in study.points]}]})
    note(folder / "7_1.jsonl", "dev2", ends=[End(last, 0)] if last else [])
    assert {one.state for one in study_status(study)} == {expected}


def test_state_of_the_report(study: Study, queue: Queue) -> None:
    queue |= queued("9", "PENDING", reason="Dependency")
    assert report_state(study, QueueView(study.directory)) == ("to do", True)
    folder = submit(study, "train", {"7_0": [{"train": [point.id for point in study.points]}]})
    add_array(folder, "report", {"9": [{"report": [point.ids["search"] for point in study.points]}]})
    assert report_state(study, QueueView(study.directory)) == ("waiting (Dependency)", False)
    queue.clear()
    silent = "failed: report job 9 ended without an error message"
    assert report_state(study, QueueView(study.directory)) == (silent, True)
    queue |= queued("9", "COMPLETED")
    lost = "failed: report job 9 completed, but its outputs are missing"
    assert report_state(study, QueueView(study.directory)) == (lost, True)
    note(folder / "9.jsonl", "dev1", ends=[End(FAILED, 0, 1, "no space")])
    assert report_state(study, QueueView(study.directory)) == ("failed: no space", True)
    write_json(study.directory / "report" / "DONE", {})
    add_array(folder, "report", {"10": [{"report": []}]})
    queue |= queued("10", "PENDING", reason="Dependency")
    assert report_state(study, QueueView(study.directory))[1] is False  # it will make another
    queue.clear()
    damaged, is_over = report_state(study, QueueView(study.directory))
    assert damaged.startswith(
        f"damaged: {study.directory}/report/DONE is damaged (id: Field required); move it aside with `mv "
    )
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
    folder = submit(study, "prepare", {"7": [backbone]})
    note(folder / "7.jsonl", "dev1", "dev2", ends=[End(FAILED, 0, 1, "no room")])
    for kind in ("out", "err"):
        (folder / f"7_0_log.{kind}").write_text("Traceback\n")
    states = study_status(study)
    assert len(states) == 6
    assert {Path(one.log).name for one in states} == {"7_0_log.err"}
    assert {(one.state, one.figures, one.attempts, one.node) for one in states} == {("failed", "no room", "2", "dev2")}
    submit(study, "prepare", {"8": [backbone]})
    again = {(one.state, one.figures, one.attempts, one.node) for one in study_status(study)}
    assert again == {("failed", "prepare job 8 ended without an error message", "2", "dev2")}  # of both submissions


def test_each_pack_of_a_task_has_its_own_end(study: Study, queue: Queue) -> None:
    queue |= queued("7", "RUNNING", "dev3")
    ids = [point.id for point in prepared(study).points]
    folder = submit(study, "train", {"7": [{"train": [one], "record": [f"{one}-record"]} for one in ids]})
    path = folder / "7.jsonl"
    # 0 crashed too often, 1 failed, 2 crashed once, the others wait
    ends = [End(FAILED, 1, 0, "not finite"), *(End(CRASHED, i, 137, "torn", "dev1", "then") for i in (0, 2, 0, 0))]
    note(path, "dev1", "dev1", "dev1", "dev1", ends=ends)
    over = "torn; crashed then on dev1 with exit status 137"
    shown = [(one.state, one.figures) for one in study_status(study)]
    assert shown == [("failed", over), ("failed", "not finite"), *[("train running", "")] * 4]
    queue |= queued("7", "PENDING")
    assert [one.state for one in study_status(study)][2:4] == ["crashed, waits to resume", "waiting"]
    queue.clear()
    append_ends(folder / "7", End(FAILED, 3, 0, "no space"), End(CRASHED, 4, 1, "KeyError: 'x'", "dev3", "then"))
    figures = [one.figures for one in study_status(study)]
    assert figures[3:5] == ["no space", "KeyError: 'x'; crashed then on dev3 with exit status 1"]
    assert figures[5] == "train job 7 ended without an error message"
    append_ends(folder / "7", End(COMPLETED, 5))
    assert study_status(study)[5].figures.startswith("completed")


def test_an_attempt_that_noted_no_end_is_told_by_its_state(study: Study, queue: Queue) -> None:
    queue |= queued("7", "NODE_FAIL")
    folder = submit(prepared(study), "train", {"7": [{"train": [point.id for point in study.points]}]})
    path = folder / "7.jsonl"
    note(path, "dev1", ends=[End(CRASHED, 0, 137, "", "dev1", "then")])
    assert {one.figures for one in study_status(study)} == {"crashed then on dev1 with exit status 137"}
    note(path, "dev2")
    assert {one.figures for one in study_status(study)} == {"train job 7 ended as NODE_FAIL"}
    (folder / "7.cancelled").touch()
    assert {one.state for one in study_status(study)} == {"cancelled"}


def test_a_refused_submission_is_taken_back(study: Study, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[str] = []
    ids = iter(["7", "8"])

    def ask(command: Sequence[str]) -> str:
        if command[0] == "sbatch" and "search" in command[-1]:
            raise Failure("`sbatch` failed: no such partition")
        return next(ids) if command[0] == "sbatch" else ""

    monkeypatch.setattr(cluster, "ask", ask)
    monkeypatch.setattr(cluster, "cancel_jobs", cancelled.extend)
    submit(study, "prepare", {"6_0": [{"prepare": ["p"]}]})
    refusal = "sbatch refused search: 1 task: `sbatch` failed: no such partition; what was submitted before it is "
    with pytest.raises(Failure, match=f"{refusal}cancelled"):
        submit_study(study, stages_until("report"), Site())
    assert cancelled == ["7_0", "8_0"]
    assert [job.job_id for job in all_submitted(study.directory) if job.is_cancelled] == cancelled


def test_own_code_is_allowed_again_by_each_command(
    tmp_path: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = iter(range(7, 99))
    monkeypatch.setattr(cluster, "ask", lambda command: str(next(ids)) if command[0] == "sbatch" else "")
    monkeypatch.chdir(tmp_path)
    module = "tests.models.cut.own"
    backbone = f"backbone={{module: '{module}:Residual', arguments: {{in_channels: 1, num_classes: 10}}}}"
    run = ["run", str(TINY), backbone, "name=own", "--on", "slurm"]
    retry = ["retry", "runs/own"]

    def scripts() -> list[str]:
        return [path.read_text() for path in sorted(Path("runs/own/slurm").glob("*/*.sh"))]

    for command in (run, retry):
        before = scripts()
        assert main(command) == 2
        assert f"add --allow-code {module} to the command" in capsys.readouterr().err
        assert scripts() == before
        assert main([*command, "--allow-code", module]) == 0
        new = scripts()[len(before) :]
        assert len(new) == 4
        assert all(f'-m launch.tasks.worker "$job" "$restart" {module}\n' in text for text in new)


@pytest.mark.parametrize(
    ("content", "mistake"),
    [
        ({"site": None}, "arrays: Field required"),
        ({"site": 3, "arrays": []}, "site: Input should be an object"),
        ({"site": None, "arrays": [{"stage": "train", "tasks": {"../x": []}}]}, "String should match pattern"),
        ({"site": None, "arrays": [{"stage": "train", "tasks": {"7": [{"train": "all"}]}}]}, "should be a valid array"),
    ],
)
def test_a_damaged_list_of_jobs_is_named(study: Study, queue: Queue, content: object, mistake: str) -> None:
    folder = new_folder(study, "slurm")
    write_json(folder / "jobs.json", content)
    with pytest.raises(Failure) as caught:
        all_submitted(study.directory)
    assert str(caught.value).startswith(f"{folder}/jobs.json is damaged (")
    assert mistake in str(caught.value)
    assert f"`mv {folder} {folder}.damaged`" in str(caught.value)


def test_damaged_attempts_are_those_of_their_points(study: Study, queue: Queue) -> None:
    first, *others = (point.id for point in study.points)
    folder = submit(prepared(study), "train", {"7_0": [{"train": [first]}], "7_1": [{"train": others}]})
    note(folder / "7_0.jsonl", "dev1", ends=[End(FAILED, 0, 1, "no space")])
    (folder / "7_1.jsonl").write_text('{"start": "now", "restart": 0, "node": "dev1"}\n{"start": "no\n{"pack": 1}\n')
    whole, *damaged = study_status(study)
    assert whole.figures == "no space"
    assert {one.state for one in damaged} == {"damaged"}
    assert damaged[0].figures.startswith(f"{folder}/7_1.jsonl is damaged (line 3: ")
