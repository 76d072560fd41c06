"""Jobs called as functions: what a point that fails leaves, and what the others do without it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dynexit.errors import Failure
from dynexit.jobs.finished import failure_reason, finished_jobs
from dynexit.jobs.planning.missing import make_packs, missing_jobs
from dynexit.run_dir import RunDir, is_done, mark_done
from dynexit.study.read import load_study
from dynexit.train.jei_dnn import JeiDnnTask
from launch.status import study_status
from tests.command_line import TINY, digests, run_stage

pytestmark = pytest.mark.slow


def test_nan_in_one_member_fails_that_point_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [f"runs_dir={tmp_path}", "report.mlflow=false", "jei_dnn.ce_ic_tradeoff=[0.1, 1]", "seed=[0, 1]"]
    study = load_study(TINY, overrides)
    directory = study.directory
    directory.mkdir()
    (directory / "study.yaml").write_text("")
    run_stage("prepare", study.points)
    step = JeiDnnTask.train_step

    def poisoned(task: JeiDnnTask, batch, share):  # type: ignore[no-untyped-def]
        if task.step_number == 80:
            task.stack("gates")["bias"][2] = float("nan")
        return step(task, batch, share)

    monkeypatch.setattr(JeiDnnTask, "train_step", poisoned)
    with pytest.raises(Failure) as caught:
        run_stage("train", study.points)
    assert str(caught.value).startswith("seed=1 ce_ic_tradeoff=0.1: the gate loss was not finite at step 8")
    failed = study.points[2]
    assert [point.label for point in study.points if finished_jobs(point) == ["prepare", "train"]] == [
        point.label for point in study.points if point is not failed
    ]
    assert failure_reason(failed) == str(caught.value)
    assert load_file(directory / "train" / failed.id / "last_good.safetensors")
    assert [status.state for status in study_status(study)] == [
        "record to do",
        "record to do",
        "failed",
        "record to do",
    ]
    good = [point for point in study.points if point is not failed]
    run_stage("record", good)
    run_stage("search", good)
    run_stage("report", study.points)
    page = (directory / "report" / "report.html").read_text()
    assert "seed=1 ce_ic_tradeoff=0.1: the gate loss was not finite" in page
    monkeypatch.undo()
    assert [job.points for job in missing_jobs(study, "train")] == [(failed,)]
    run_stage("train", study.points)
    assert is_done(directory / "train" / failed.id, failed.id, check_bytes=True)
    assert failure_reason(failed) is None


def test_a_pack_killed_while_it_writes_its_results_goes_on_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studies = [load_study(TINY, [f"runs_dir={tmp_path}", f"name={name}", "seed=[0]"]) for name in ("killed", "whole")]
    run_stage("prepare", studies[0].points)
    shutil.copytree(studies[0].directory / "prepare", studies[1].directory / "prepare")
    killed, whole = studies
    run_stage("train", whole.points)
    written: list[str] = []

    def dies_after_one(directory: RunDir, files: list[str]) -> None:
        mark_done(directory.path, directory.identity, files)
        written.append(directory.identity)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDir, "mark_done", dies_after_one)
    with pytest.raises(KeyboardInterrupt):
        run_stage("train", killed.points)
    monkeypatch.undo()
    assert written == [killed.points[0].id]
    (job,) = missing_jobs(killed, "train")
    assert [point.id for point in job.points] == [point.id for point in killed.points]
    in_the_way = killed.directory / "train" / killed.points[1].id / "heads.safetensors"
    in_the_way.mkdir(parents=True)
    with pytest.raises(Failure, match=r"heads.safetensors could not be written: Is a directory"):
        run_stage("train", job.points)
    assert [("train" in finished_jobs(point)) for point in killed.points] == [True, False, True]
    in_the_way.rmdir()
    (again,) = missing_jobs(killed, "train")
    run_stage("train", again.points)
    assert missing_jobs(killed, "train") == []
    assert digests(killed.directory) == digests(whole.directory)


def test_packs_hold_what_differs_only_in_seed_and_tradeoff(tmp_path: Path) -> None:
    sweep = ["seed=[0, 1, 2]", "sweep.data.seed=[0, 1]", "sweep.train.keep=[last, best]"]
    points = load_study(TINY, [f"runs_dir={tmp_path}", *sweep]).points
    packs = make_packs(points, 64)
    assert [len(pack) for pack in packs] == [9] * 4
    for pack in packs:
        assert len({(point.config.data.seed, point.config.train.keep) for point in pack}) == 1
    assert sorted(len(pack) for pack in make_packs(points, 4)) == [1, 1, 1, 1, 4, 4, 4, 4, 4, 4, 4, 4]
    begun = [[packs[1][2].id, packs[1][0].id]]
    left = [point for point in points if point.id != begun[0][0]]  # it had one finished
    both = make_packs(left, 64, [*begun, [packs[1][0].id, packs[1][1].id]], points)
    assert sorted(point.id for pack in both for point in pack) == sorted(point.id for point in points)
    kept = make_packs(points, 64, begun)
    assert [point.id for point in kept[0]] == begun[0]
    assert sorted(point.id for pack in kept for point in pack) == sorted(point.id for point in points)


def test_metrics_tell_of_every_epoch(tmp_path: Path) -> None:
    study = load_study(TINY, [f"runs_dir={tmp_path}", "jei_dnn.ce_ic_tradeoff=0.5", "seed=3"])
    run_stage("prepare", study.points)
    run_stage("train", study.points)
    lines = (study.directory / "train" / study.points[0].id / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["stage"] for row in rows] == ["warm-up"] * 2 + ["joint"] * 3
    assert all(0 <= accuracy <= 1 for row in rows for accuracy in row["exit_accuracy"])
    assert sum(rows[-1]["exit_fractions"]) == pytest.approx(1)
    losses = [{name: value for name, value in row.items() if name.startswith("train_")} for row in rows]
    assert [set(one) for one in losses] == [{"train_warm_up_loss"}] * 2 + [{"train_gate_loss", "train_head_loss"}] * 3
    assert 0 < losses[1]["train_warm_up_loss"] < losses[0]["train_warm_up_loss"] < 50  # summed over exits
    assert [row.get("improved") for row in rows][:3] == [None, None, True]
