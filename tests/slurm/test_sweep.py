"""Sweeps on a cluster: the results of one process, whatever the arrays; failures named, retried, cancelled."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command_line import ENVIRONMENT, TINY, digests, dynexit
from tests.slurm.conftest import SITE, Cluster, started, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
QUICK = ("report.mlflow=false", "dist.checkpoint_seconds=60")
ALONE = ("dist.members_per_pack=1", *QUICK)
UNEVEN = ("train.global_batch_size=99", *QUICK)  # the last batch of an epoch has 2 samples for 4 ranks


@pytest.fixture(scope="module")
def reference(work: Path) -> Path:
    """The sweep in one process, every point a pack of its own."""
    dynexit(work, "run", TINY, *ALONE, "name=reference")
    return work / "runs" / "reference"


def test_arrays_split_by_the_limit_give_the_results_of_one_process_while_the_controller_is_restarted(
    cluster: Cluster, running: Path, reference: Path
) -> None:
    study = (*ALONE, "name=sweep")
    assert subprocess.run(["sacct"], capture_output=True, check=False).returncode  # accounting is off
    said = cluster.submit(*study)
    assert [line.split(":")[0] for line in said.splitlines()[:-1]] == ["prepare", *["train", "record"] * 2, "report"]
    assert "train: 5 tasks, 5 packs" in said
    assert "train: 1 task, 1 pack" in said
    assert cluster.status(*study).splitlines()[-1].startswith("6 ")
    error = dynexit(cluster.folder, "run", TINY, *study, status=2).stderr
    assert "jobs of runs/sweep are in the cluster's queue" in error
    assert "nothing to submit, all of it is done or in the queue" not in error
    cluster.wait_for_step("sweep", 1)  # srun waits a minute before it asks again for a step that was refused
    controller = int((running / "pid" / "slurmctld.pid").read_text())
    os.kill(controller, signal.SIGTERM)
    wait_until(lambda: not is_alive(controller), "the end of the controller", 60)
    subprocess.run(["slurmctld"], check=True)
    cluster.wait_for_the_end()
    assert digests(cluster.folder / "runs" / "sweep") == digests(reference)
    assert re.fullmatch(r"report: done, .*report\.html", cluster.status(*study).splitlines()[-2])
    assert cluster.status(*study).splitlines()[-1] == "6 done"
    assert "nothing to submit" in cluster.submit(*study)
    table = dynexit(cluster.folder, "aggregate", "runs/sweep", "runs/reference").stdout.splitlines()
    sweep, again = (
        [line.partition(",")[2] for line in table if line.startswith(f"runs/{name},")]
        for name in ("sweep", "reference")
    )
    assert sweep == again
    assert len(sweep) > 6


def processes_of(study: str) -> list[bytes]:
    """The commands that name a folder of the study."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended
            found.append(path.read_bytes())
    return [command for command in found if f"/runs/{study}/".encode() in command]


def is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]
    except OSError:
        return False


def test_two_nodes_with_two_ranks_agree_with_one_process(cluster: Cluster, reference: Path) -> None:
    runs = cluster.folder / "runs"
    for name in ("one-rank", "ranks"):
        shutil.copytree(reference / "prepare", runs / name / "prepare")
    cluster.submit(*UNEVEN, "name=ranks", "dist.nodes=2", "dist.tasks_per_node=2")
    dynexit(cluster.folder, "train", TINY, *UNEVEN, "name=one-rank")
    cluster.wait_for_the_end()
    for stage in ("prepare", "train"):
        shutil.copytree(runs / "ranks" / stage, runs / "recorded" / stage)
    dynexit(cluster.folder, "run", TINY, *UNEVEN, "name=recorded")
    assert digests(runs / "recorded") == digests(runs / "ranks")  # records of one checkpoint: the same bits
    folders = sorted((runs / "one-rank" / "train").iterdir())
    assert len(folders) == 6
    for folder in folders:
        other = runs / "ranks" / "train" / folder.name
        one, four = load_file(folder / "heads.safetensors"), load_file(other / "heads.safetensors")
        for name in one:  # sums of float32 in another order
            torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-5)
        for left, right in zip(metrics(folder), metrics(other), strict=True):
            assert right == pytest.approx(left, rel=1e-4)


def metrics(folder: Path) -> Sequence[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [value for line in lines for value in json.loads(line).values() if isinstance(value, float)]


def test_a_failed_point_is_explained_and_retry_runs_only_it(cluster: Cluster, reference: Path) -> None:
    study = ("sweep.seed=[0]", "sweep.jei_dnn.ce_ic_tradeoff=[0.1, 5]", *ALONE, "name=failing", "dist.max_retries=0")
    shutil.copytree(reference / "prepare", reference.parent / "failing" / "prepare")
    site = cluster.folder / "site.yaml"
    site.write_text(SITE.read_text() + "constraint: nowhere\n")
    error = dynexit(cluster.folder, "run", TINY, *study, "--on", "slurm", "--site", site, status=2).stderr
    assert error == "dynexit: the cluster would not take train: 2 tasks, 2 packs: Invalid feature specification\n"
    assert not cluster.squeue()
    assert not (reference.parent / "failing" / "slurm").exists()
    cluster.submit(*study)
    first = dynexit(cluster.folder, "status", TINY, *study).stdout.splitlines()[1].split()[2]
    in_the_way = reference.parent / "failing" / "train" / first / "heads.safetensors"
    in_the_way.mkdir(parents=True)
    cluster.wait_for_the_end()
    lines = cluster.status(*study).splitlines()
    assert lines[-1] == "1 failed, 1 done"
    assert "heads.safetensors could not be written: Is a directory; make room or mend the permissions" in lines[1]
    assert "could not be written: Is a directory" in dynexit(cluster.folder, "logs", TINY, first, *study).stdout
    in_the_way.rmdir()
    said = dynexit(cluster.folder, "retry", TINY, *study).stdout
    assert "train: 1 task, 1 pack" in said
    cluster.wait_for_the_end()
    assert cluster.status(*study).splitlines()[-1] == "2 done"
    kept = {
        name for name in digests(reference.parent / "failing") if name.split("/")[0] in ("train", "record", "search")
    }
    expected = digests(reference)
    assert {name: digests(reference.parent / "failing")[name] for name in kept} == {
        name: expected[name] for name in kept
    }


def test_cancel_leaves_nothing_behind(cluster: Cluster, reference: Path) -> None:
    study = (*ALONE, "name=cancelled")
    shutil.copytree(reference / "prepare", reference.parent / "cancelled" / "prepare")
    cluster.submit(*study)
    point = cluster.status(*study).splitlines()[1].split()[2]
    wait_until(lambda: processes_of("cancelled"), "its processes", 60)
    said = dynexit(cluster.folder, "cancel", TINY, point, *study).stdout.splitlines()
    assert [line.split()[1] for line in said] == ["train", "record"]
    wait_until(lambda: "1 cancelled" in cluster.status(*study), "the end of that point's jobs", 60)
    dynexit(cluster.folder, "cancel", TINY, *study)
    assert "train: 5 tasks, 5 packs" in dynexit(cluster.folder, "retry", TINY, *study).stdout  # what was ending, too
    dynexit(cluster.folder, "cancel", TINY, *study)
    wait_until(lambda: not cluster.squeue(), "an empty queue", 60)
    wait_until(lambda: not processes_of("cancelled"), "the end of its processes", 60)
    assert not [path for path in (reference.parent / "cancelled").rglob("*") if "tmp" in path.name]
    assert cluster.status(*study).splitlines()[-1] == "6 cancelled"
    assert "no jobs of this study are queued" in dynexit(cluster.folder, "cancel", TINY, *study).stdout


def test_with_accounting_on_a_users_limit_is_asked_for_and_held_also_from_within_a_job(
    cluster: Cluster, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = (*ALONE, "name=accounted")
    shutil.copytree(reference / "prepare", reference.parent / "accounted" / "prepare")
    told = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_MEM_PER_CPU": "100"}
    told |= {"SBATCH_NO_REQUEUE": "1", "SQUEUE_PARTITION": "urgent"}
    with started(8, ACCOUNTING="1"):
        cluster.run("sacctmgr", "--immediate", "modify", "user", "root", "set", "MaxSubmitJobs=6")
        with monkeypatch.context() as within:
            for name, value in told.items():  # in a task of an array; srun refuses that memory beside the site's
                within.setitem(ENVIRONMENT, name, value)
            said = cluster.submit(*study)
            assert "failed" not in cluster.status(*study)
        assert "train: 2 tasks, 6 packs" in said  # and as many that record, and the report
        assert "record: 2 tasks, 6 packs" in said
        cluster.wait_for_the_end()
        assert digests(reference.parent / "accounted") == digests(reference)
        assert cluster.status(*study).splitlines()[-1] == "6 done"
        seen = cluster.run("sacct", "--allocations", "--noheader", "--parsable2", "--format=State").split()
        assert seen == ["COMPLETED"] * 5
        assert not list((reference.parent / "accounted").glob("slurm/*/7_3.*"))
