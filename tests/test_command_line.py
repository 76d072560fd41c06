"""One study from backbone to curve through the command line, and what happens when things go wrong."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from dynexit.study.read import load_study
from tests.command_line import TINY, digests, dynexit, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny study has run."""
    folder = tmp_path_factory.mktemp("finished")
    result = dynexit(folder, "run", TINY)
    assert "report: runs/tiny_study/report/report.html" in result.stdout
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to damage."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_leaves_table_picture_page_and_mlflow(finished: Path) -> None:
    report = finished / "runs" / "tiny_study" / "report"
    with (report / "operating_points.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_source = {source: [row for row in rows if row["source"] == source] for source in ("backbone", "gates", "search")}
    assert [len(found) for found in by_source.values()] == [2, 2 * 6, 2 * 6 * 6]
    validation = [
        (float(r["accuracy"]), float(r["relative_macs"]), r["on_front"]) for r in rows if r["split"] == "validation"
    ]
    for accuracy, macs, on_front in validation:
        beaten = any(a >= accuracy and m <= macs and (a > accuracy or m < macs) for a, m, _ in validation)
        assert on_front == ("false" if beaten else "true")
    for row in rows:
        fractions = [float(row[name]) for name in row if name.startswith("exit_")]
        assert sum(fractions) == pytest.approx(1)
    assert (report / "pareto.png").read_bytes().startswith(b"\x89PNG")
    page = (report / "report.html").read_text().replace("http://www.w3.org/2000/svg", "")  # a name, not a link
    assert "data:image/png;base64," in page
    assert "http://" not in page
    assert "https://" not in page
    assert (finished / "runs" / "mlflow.db").is_file()


def test_a_second_run_does_nothing(finished: Path) -> None:
    before = digests(finished / "runs" / "tiny_study")
    litter = finished / "runs" / "tiny_study" / "pack" / ".progress.json.0a1b2c3d.tmp"  # of a killed writer
    litter.touch()
    result = dynexit(finished, "run", TINY)
    assert not litter.exists()
    assert "nothing to do, all 6 points are done" in result.stdout
    assert digests(finished / "runs" / "tiny_study") == before


def test_a_larger_grid_trains_only_the_new_points(copy: Path) -> None:
    before = digests(copy / "runs" / "tiny_study")
    dynexit(copy, "run", TINY, "jei_dnn.ce_ic_tradeoff=[0.1, 0.4, 1, 5]")
    after = digests(copy / "runs" / "tiny_study")
    kept = {name for name in before if not name.startswith("report/")}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert len(list((copy / "runs" / "tiny_study" / "train").iterdir())) == 8


def test_infer_equals_its_operating_point(finished: Path) -> None:
    for source, budget in (("search", 0.85), ("gates", 0.85), ("any", "null")):
        asked = (f"infer.source={source}", f"infer.relative_macs={budget}", "infer.batch_size=37")
        assert "0 other differences" in dynexit(finished, "infer", TINY, *asked).stdout
    with (finished / "runs" / "tiny_study" / "report" / "operating_points.csv").open() as file:
        rows = {(r["point_id"], r["configuration"]): r for r in csv.DictReader(file) if r["split"] == "test"}
    assert rows
    for path in (finished / "runs" / "tiny_study" / "infer").glob("*/summary.json"):
        summary = json.loads(path.read_text())
        assert summary["differences_near_a_threshold"] == summary["unexplained_differences"] == 0
        matching = [
            r
            for r in rows.values()
            if float(r["accuracy"]) == summary["accuracy"] and float(r["macs"]) == summary["macs"]
        ]
        assert matching
    text = dynexit(finished, "infer", TINY, "infer.relative_macs=0.01", status=2).stderr
    assert "infer.relative_macs = 0.01: no operating point is within it; the nearest has 0." in text


def test_status_and_dry_run_start_nothing(finished: Path, tmp_path: Path) -> None:
    table = dynexit(finished, "status", TINY).stdout.splitlines()
    assert len(table) == 9
    assert table[-2:] == ["report: done, runs/tiny_study/report/report.html", "6 done"]
    assert "relative MACs" in table[1]
    assert "runs/tiny_study/pack/" in table[1]
    plan = dynexit(tmp_path, "run", TINY, "--dry-run").stdout
    assert "train: 1 job\n" in plan
    assert "resources: --on here" in plan
    assert list(tmp_path.iterdir()) == []
    assert dynexit(tmp_path, "status", TINY).stdout.splitlines()[-2:] == ["report: to do", "6 waiting"]


def test_aggregate_lists_missing_and_damaged_points(copy: Path) -> None:
    for name in ("damaged", "nothing_yet"):
        shutil.copytree(copy / "runs" / "tiny_study", copy / "runs" / name)
    for stage in ("record", "search"):
        shutil.rmtree(copy / "runs" / "nothing_yet" / stage)
    broken = next((copy / "runs" / "damaged" / "search").glob("*/configurations.json"))
    broken.unlink()
    whole = dynexit(copy, "aggregate", "runs/tiny_study", "runs/nothing_yet")
    assert whole.stderr.splitlines() == [
        "runs/tiny_study: 6 of 6 points are finished",
        "runs/nothing_yet: 0 of 6 points are finished",
    ]
    of_the_study = (copy / "runs" / "tiny_study" / "report" / "operating_points.csv").read_text().splitlines()
    lines = whole.stdout.splitlines()
    assert lines[0] == f"study,{of_the_study[0]},state,point,reason"
    assert lines[1 : len(of_the_study)] == [f"runs/tiny_study,{line},done,," for line in of_the_study[1:]]
    rest = list(csv.DictReader(lines))[len(of_the_study) - 1 :]
    assert [(row["state"], row["reason"]) for row in rest] == [("unfinished", "record is not done")] * 6
    all_of_them = dynexit(copy, "aggregate", "runs", status=1)
    table = list(csv.DictReader(all_of_them.stdout.splitlines()))
    (bad,) = (row for row in table if row["state"] == "damaged")
    assert str(broken.relative_to(copy)) in bad["reason"]
    assert len({row["point_id"] for row in table if row["study"] == "runs/damaged" and row["source"] == "gates"}) == 5
    assert all_of_them.stderr.endswith("dynexit: damaged, as the column reason says: runs/damaged\n")
    dynexit(copy, "aggregate", "runs/tiny_study", "runs/nothing_yet", "--out", "both")
    assert "tiny_study: jei_dnn" in (copy / "both" / "report.html").read_text()
    assert (copy / "both" / "operating_points.csv").read_text() == whole.stdout


def test_local_processes_give_the_same_results(finished: Path, tmp_path: Path) -> None:
    dynexit(tmp_path, "run", TINY, "--on", "local")
    assert digests(tmp_path / "runs" / "tiny_study") == digests(finished / "runs" / "tiny_study")


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_any_moment_loses_nothing(finished: Path, tmp_path: Path, seed: int) -> None:
    expected = digests(finished / "runs" / "tiny_study")
    moments = random.Random(seed)
    for _ in range(4):
        process = start(tmp_path, "run", TINY, "report.mlflow=false")
        time.sleep(moments.uniform(1.5, 9))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    dynexit(tmp_path, "run", TINY, "report.mlflow=false")
    assert digests(tmp_path / "runs" / "tiny_study") == expected


def test_ctrl_c_saves_and_goes_on(finished: Path, tmp_path: Path) -> None:
    slow = "dist.checkpoint_seconds=1000"  # only the signal can have saved
    process = start(tmp_path, "run", TINY, slow)
    log = tmp_path / "runs" / "tiny_study" / "pack"
    deadline = time.monotonic() + 120
    while not list(log.glob("*/progress.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "the state is saved; the same command resumes from there" in err
    assert "resuming after epoch" in dynexit(tmp_path, "run", TINY, slow).stdout
    assert digests(tmp_path / "runs" / "tiny_study") == digests(finished / "runs" / "tiny_study")


def test_local_processes_end_with_their_launcher_and_save(finished: Path, tmp_path: Path) -> None:
    study = ("train", TINY, "dist.checkpoint_seconds=1000", "train.num_epochs=20")
    shutil.copytree(finished / "runs" / "tiny_study" / "prepare", tmp_path / "runs" / "tiny_study" / "prepare")
    pack = tmp_path / "runs" / "tiny_study" / "pack"
    ends = [(signal.SIGKILL, -9, ""), (signal.SIGTERM, 130, "dynexit: stopped by SIGTERM; the same command resumes")]
    for number, status, message in ends:
        step = max(map(last_step, pack.glob("*/progress.json")), default=0)
        process = start(tmp_path, *study, "--on", "local")
        deadline = time.monotonic() + 120
        while max(map(last_step, pack.glob("*/progress.json")), default=0) <= step and time.monotonic() < deadline:
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) == 1
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == status, err
        assert err.startswith(message)
        assert "Traceback" not in err
        # one whose launcher was killed saves and ends on its own; what it saves must not pass for the next one's step
        assert not psutil.wait_procs(workers, timeout=0 if number == signal.SIGTERM else 60)[1]
    dynexit(tmp_path, *study)
    lines = next(pack.glob("*/log.txt")).read_text().splitlines()
    assert sum("resuming after epoch" in line for line in lines) == 2  # nothing but a signal can have saved
    dynexit(tmp_path, *study, "name=undisturbed")
    assert digests(tmp_path / "runs" / "tiny_study") == digests(tmp_path / "runs" / "undisturbed")


def last_step(progress: Path) -> int:
    return int(json.loads(progress.read_text())["step"])


@pytest.mark.parametrize(
    ("pattern", "harm", "expected"),
    [
        ("train/*/heads.safetensors", "alter", "was altered (its SHA-256 is not the one in DONE)"),
        ("train/*/heads.safetensors", "truncate", "bytes instead of"),
        ("prepare/*/backbone.safetensors", "remove", "is missing although its job is finished"),
        ("shards/*/*.safetensors", "alter", ".safetensors"),
        ("shards/*/*.safetensors", "truncate", ".safetensors"),
        ("shards/*/*.safetensors", "remove", ".safetensors"),
        ("record/*/test/manifest.json", "truncate", "manifest.json is damaged"),
        ("search/*/configurations.json", "truncate", "bytes instead of"),
        ("train/*/DONE", "truncate", "DONE is damaged"),
    ],
)
def test_damage_is_refused_by_name_and_mended_by_the_command_it_names(
    copy: Path, finished: Path, pattern: str, harm: str, expected: str
) -> None:
    path = sorted((copy / "runs" / "tiny_study").glob(pattern))[0]
    content = bytearray(path.read_bytes())
    if harm == "alter":
        content[-3] ^= 4
        path.write_bytes(content)
    elif harm == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    relative = path.relative_to(copy)
    error = dynexit(copy, "run", TINY, status=1).stderr
    assert expected in error
    assert str(relative) in error
    assert len(error.strip().splitlines()) == 1
    if harm != "alter":  # of which a submission, which reads no whole records, leaves it to the jobs to tell
        assert dynexit(copy, "run", TINY, "--on", "slurm", "--dry-run", status=1).stderr == error
    command = error.split("`")[1]
    assert command.startswith("mv runs/tiny_study/")
    subprocess.run(command.split(), cwd=copy, check=True)
    dynexit(copy, "run", TINY)
    kept = digests(copy / "runs" / "tiny_study")
    expected_digests = digests(finished / "runs" / "tiny_study")
    assert kept.keys() == expected_digests.keys()
    different = {name for name in kept if kept[name] != expected_digests[name]}
    remade = path.relative_to(copy / "runs" / "tiny_study").parent
    # a point trained again alone equals the member of its pack to float32's last bits; all that was made of it is made
    # again, and nothing else may differ
    point = next((point for point in load_study(TINY, []).points if point.id == remade.name), None)
    own = tuple(f"{job}/{point.ids[job]}/" for job in ("train", "record", "search")) if point else ()
    assert all(name.startswith((*own, "report/")) for name in different)
    if different:
        for split in ("validation", "test"):
            header = json.loads((copy / "runs/tiny_study" / own[1] / split / "manifest.json").read_text())["headers"][0]
            assert header["checkpoint_sha256"] == kept[f"{own[0]}heads.safetensors"]
        assert "0 other differences" in dynexit(copy, "infer", TINY).stdout
        before, after = (load_file(f / "runs" / "tiny_study" / remade / "heads.safetensors") for f in (finished, copy))
        assert all((before[name] - after[name]).abs().max() <= 1e-5 for name in before)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(finished: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "run", TINY)
    pack = tmp_path / "runs" / "tiny_study" / "pack"
    deadline = time.monotonic() + 120
    while len(list(pack.glob("*/checkpoint-*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    newest = sorted(pack.glob("*/checkpoint-*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    out = dynexit(tmp_path, "run", TINY).stdout
    assert "is damaged" in out
    assert "falling back to the one before" in out
    assert digests(tmp_path / "runs" / "tiny_study") == digests(finished / "runs" / "tiny_study")


def test_mistakes_in_the_study_end_with_status_2(finished: Path, tmp_path: Path) -> None:
    together = {
        "train.num_epoch=3": "train.num_epoch is not a key; did you mean train.num_epochs?",
        "record.topk=many": "record.topk = 'many': should be a valid integer",
        "sweep.seed=[]": "sweep.seed = []: the grid is empty",
    }
    alone = {
        "backbone.name=resnet19": "unknown backbone 'resnet19'",
        "data.name=digit": "no data set of this name; did you mean digits? known are digits",
        "exits.positions=[0, 9]": "exit positions [0, 9] do not fit resnet18",
        "record.topk=11": "record.topk = 11: should be at most the classes, 10",
    }
    for overrides, expected in ((list(together), together.values()), *(([name], [alone[name]]) for name in alone)):
        error = dynexit(tmp_path, "run", TINY, *overrides, status=2).stderr
        assert len(error.splitlines()) == len(overrides)
        for line, start_of_it in zip(
            sorted(error.removeprefix("dynexit: ").splitlines()), sorted(expected), strict=True
        ):
            assert start_of_it in line
    assert not (tmp_path / "runs").exists()
    error = dynexit(finished, "run", TINY, "prepare.num_epochs=3", status=2).stderr
    assert "runs/tiny_study was made by another configuration: prepare.num_epochs was 4 there and is 3 now" in error


def test_another_train_key_keeps_the_prepared_backbone(copy: Path) -> None:
    directory = copy / "runs" / "tiny_study"
    before, (backbone,) = digests(directory), directory.glob("prepare/*/backbone.safetensors")
    modified = backbone.stat().st_mtime_ns
    override = "train.num_epochs=4"
    plan = dynexit(copy, "run", TINY, override, "--dry-run").stdout
    assert "prepare: done" in plan
    dynexit(copy, "run", TINY, override)
    assert [path.stat().st_mtime_ns for path in directory.glob("prepare/*/backbone.safetensors")] == [modified]
    new = {identity for point in load_study(TINY, [override]).points for identity in point.ids.values()}
    old = {identity for point in load_study(TINY).points for identity in point.ids.values()}
    with (directory / "report" / "operating_points.csv").open() as file:
        shown = {row["point_id"] for row in csv.DictReader(file)} - {""}
    assert shown
    assert shown <= new
    assert len(list(directory.glob("train/*"))) == 12
    dynexit(copy, "run", TINY)  # and back: all is there, the report alone is made again
    assert digests(directory).items() >= before.items()
    with (directory / "report" / "operating_points.csv").open() as file:
        assert {row["point_id"] for row in csv.DictReader(file)} - {""} <= old


def test_two_launchers_on_one_study(tmp_path: Path) -> None:
    process = start(tmp_path, "run", TINY)
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs" / "tiny_study" / "study.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    error = dynexit(tmp_path, "run", TINY, status=2).stderr
    process.kill()
    process.communicate()
    assert f"runs/tiny_study is held by process {process.pid}" in error
