"""Sweeps on a cluster: the results of one process, whatever the arrays; failures named, retried, cancelled."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dynexit.study.read import load_study
from tests.command_line import ENVIRONMENT, TINY, digests, dynexit, start
from tests.slurm.conftest import SITE, Cluster, Scenario, point_of, run_side_by_side
from tests.slurm.processes import is_alive, processes_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]
CLUSTER = {"ACCOUNTING": "1", "EXTRA_CONF": "MaxArraySize=3"}
QUICK = ("sweep.jei_dnn.ce_ic_tradeoff=[0.1, 5]", "report.mlflow=false", "dist.checkpoint_seconds=60")
ALONE = ("dist.members_per_pack=1", *QUICK)
UNEVEN = ("train.global_batch_size=99", *QUICK)  # the last batch of an epoch has 2 samples for 4 ranks
IN_A_JOB = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_MEM_PER_CPU": "100"}
IN_A_JOB |= {"SBATCH_NO_REQUEUE": "1", "SQUEUE_PARTITION": "urgent"}


def reference(cluster: Cluster) -> Scenario:
    """The sweep in one process, every point a pack of its own; and in packs, the last batches uneven."""
    process = start(cluster.folder, "run", TINY, *ALONE, "name=reference")
    yield lambda: process.poll() is not None
    assert process.returncode == 0, process.communicate()
    process.communicate()
    with_prepare(cluster, "one-rank")
    process = start(cluster.folder, "train", TINY, *UNEVEN, "name=one-rank")
    yield lambda: process.poll() is not None
    assert process.returncode == 0, process.communicate()
    process.communicate()


def is_prepared(cluster: Cluster) -> Callable[[], bool]:
    return lambda: bool(list(cluster.study("reference").glob("prepare/*/DONE")))


def with_prepare(cluster: Cluster, name: str) -> None:
    shutil.copytree(cluster.study("reference") / "prepare", cluster.study(name) / "prepare")


def sweep(cluster: Cluster) -> Scenario:
    """Arrays are split by MaxArraySize, and the controller is restarted while they run."""
    study = (*ALONE, "name=sweep")
    said = yield from cluster.submit(*study)
    assert [line.split(":")[0] for line in said.splitlines()[:-1]] == [
        "prepare",
        *["train"] * 2,
        *["search"] * 2,
        "report",
    ]
    assert "train: 3 tasks, 3 packs" in said
    assert "train: 1 task, 1 pack" in said
    assert (yield from cluster.status(*study))[-1].startswith("4 ")
    error = yield from cluster.call("run", *study, status=2)
    assert "the cluster's queue has " in error
    again = yield from cluster.submit(*study)
    assert [line.split(":")[0] for line in again.splitlines()] == ["report", "logs"]  # in place of the one before
    assert cluster.squeue("--name=sweep-report", "--format=%A").split() == [again.split("job ")[1].split()[0]]
    yield lambda: cluster.is_at_step("sweep", 1) and cluster.num_calls == 0
    controller = int((cluster.place / "pid" / "slurmctld.pid").read_text())
    os.kill(controller, signal.SIGTERM)
    while is_alive(controller):  # without giving way: the others' questions would find no controller
        pass
    subprocess.run(["slurmctld"], check=True)
    while "UP" not in subprocess.run(["scontrol", "ping"], capture_output=True, text=True, check=False).stdout:
        pass
    yield cluster.is_over("sweep")
    assert re.fullmatch(r"report: done, .*report\.html", (yield from cluster.status(*study))[-2])
    assert (yield from cluster.status(*study))[-1] == "4 done"
    assert "nothing to submit" in (yield from cluster.submit(*study))


def ranks(cluster: Cluster) -> Scenario:
    """Two nodes with two ranks train and record."""
    yield is_prepared(cluster)
    with_prepare(cluster, "ranks")
    yield from cluster.submit(*UNEVEN, "name=ranks", "dist.nodes=2", "dist.tasks_per_node=2")
    yield cluster.is_over("ranks")
    for stage in ("prepare", "train"):
        shutil.copytree(cluster.study("ranks") / stage, cluster.study("recorded") / stage)
    yield from cluster.call("run", *UNEVEN, "name=recorded")


def failing(cluster: Cluster) -> Scenario:
    """A failed point is explained, and `retry` runs only it, with the profile of the submission if it is unchanged."""
    yield is_prepared(cluster)
    study = ("sweep.seed=[0]", *ALONE, "name=failing", "dist.max_retries=0")
    with_prepare(cluster, "failing")
    directory = cluster.study("failing")
    first = load_study(TINY, study).points[0].id
    in_the_way = directory / "train" / first / "heads.safetensors"
    in_the_way.mkdir(parents=True)
    site = cluster.folder / "site.yaml"
    site.write_text(SITE.read_text() + "constraint: nowhere\n")
    submit = ("run", *study, "--on", "slurm", "--site", site)
    error = yield from cluster.call(*submit, status=1)
    assert error.startswith("dynexit: sbatch refused train: 2 tasks, 2 packs: `sbatch --parsable ")
    assert "Invalid feature specification" in error
    assert not cluster.is_live("failing")
    site.write_text(SITE.read_text())
    yield from cluster.call(*submit)
    yield cluster.is_over("failing")
    lines = yield from cluster.status(*study)
    assert lines[-1] == "1 failed, 1 done"
    assert "heads.safetensors could not be written: Is a directory; free space or" in lines[1]
    assert "could not be written: Is a directory" in (yield from cluster.call("logs", first, *study))
    in_the_way.rmdir()
    site.write_text(SITE.read_text() + "setup: [touch /tmp/dynexit-was-here]\n")
    refused = yield from cluster.call("retry", *study, status=2)
    assert "has changed or belongs to another user; name the profile with --site" in refused
    assert not cluster.is_live("failing")
    site.write_text(SITE.read_text())
    said = yield from cluster.call("retry", *study)
    assert "train: 1 task, 1 pack" in said
    yield cluster.is_over("failing")
    assert (yield from cluster.status(*study))[-1] == "2 done"


def cancelled(cluster: Cluster) -> Scenario:
    """Cancelling leaves nothing behind, and `retry` submits all again."""
    yield is_prepared(cluster)
    study = (*ALONE, "name=cancelled", "train.num_epochs=1000")
    with_prepare(cluster, "cancelled")
    yield from cluster.submit(*study)
    point = point_of((yield from cluster.status(*study))[1])
    yield lambda: processes_of("cancelled")
    said = (yield from cluster.call("cancel", point, *study)).splitlines()
    assert [line.split()[1] for line in said] == ["train", "search"]
    yield lambda: len(cluster.squeue("--name=cancelled-train", "--format=%i").split()) == 3
    assert "1 cancelled" in (yield from cluster.status(*study))[-1]
    yield from cluster.call("cancel", *study)
    yield cluster.is_over("cancelled")
    said = yield from cluster.call("retry", *study)
    assert "train: 3 tasks, 3 packs" in said
    yield from cluster.call("cancel", *study)
    yield cluster.is_over("cancelled")
    yield lambda: not processes_of("cancelled")
    assert not [path for path in cluster.study("cancelled").rglob("*") if "tmp" in path.name]
    assert (yield from cluster.status(*study))[-1] == "4 cancelled"
    assert (yield from cluster.call("cancel", *study)) == "no jobs of this study are queued\n"


def percent(cluster: Cluster) -> Scenario:
    """A folder whose name sbatch would take for a pattern holds the logs."""
    yield is_prepared(cluster)
    with_prepare(cluster, "percent")
    runs = cluster.folder / "50%_%j"
    shutil.move(cluster.folder / "runs" / "percent", runs / "percent")
    study = ("sweep.seed=[0]", *QUICK, "name=percent", f"runs_dir={runs}")
    yield from cluster.submit(*study)
    yield cluster.is_over("percent")
    assert (yield from cluster.status(*study))[-1] == "2 done"
    folder = runs / "percent" / "slurm" / "0001"
    assert len(list(folder.glob("*.jsonl"))) == len(list(folder.glob("*_0_log.out"))) == 3
    assert not list(folder.glob("*.pkl"))


SCENARIOS = (reference, sweep, ranks, failing, cancelled, percent)


@pytest.fixture(scope="module")
def outcomes(cluster: Cluster) -> dict[str, BaseException | None]:
    return run_side_by_side({scenario.__name__: scenario(cluster) for scenario in SCENARIOS})


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_scenario(outcomes: dict[str, BaseException | None], name: str) -> None:
    error = outcomes[name]
    if error is not None:
        raise error


def test_sweep_equals_one_process(cluster: Cluster, outcomes: dict[str, BaseException | None]) -> None:
    expected = digests(cluster.study("reference"))
    assert digests(cluster.study("sweep")) == expected
    table = dynexit(cluster.folder, "aggregate", "runs/sweep", "runs/reference").stdout.splitlines()
    swept, again = (
        [line.partition(",")[2] for line in table if line.startswith(f"runs/{name},")]
        for name in ("sweep", "reference")
    )
    assert swept == again
    assert len(swept) > 4
    retried = digests(cluster.study("failing"))
    kept = {name for name in retried if name.split("/")[0] in ("train", "record", "search")}
    assert {name: retried[name] for name in kept} == {name: expected[name] for name in kept}


def test_ranks_equal_one_process(cluster: Cluster, outcomes: dict[str, BaseException | None]) -> None:
    # records of one checkpoint: the same bits
    assert digests(cluster.study("recorded")) == digests(cluster.study("ranks"))
    folders = sorted((cluster.study("one-rank") / "train").iterdir())
    assert len(folders) == 4
    for folder in folders:
        other = cluster.study("ranks") / "train" / folder.name
        one, four = load_file(folder / "heads.safetensors"), load_file(other / "heads.safetensors")
        for name in one:  # sums of float32 in another order
            torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-5)
        for left, right in zip(metrics(folder), metrics(other), strict=True):
            assert right == pytest.approx(left, rel=1e-4)


def metrics(folder: Path) -> Sequence[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [value for line in lines for value in json.loads(line).values() if isinstance(value, float)]


def test_limits_of_accounting_hold(
    cluster: Cluster, outcomes: dict[str, BaseException | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a study that is submitted from within a job."""
    with_prepare(cluster, "accounted")
    cluster.run("sacctmgr", "--immediate", "modify", "user", "root", "set", "MaxSubmitJobs=8")
    with monkeypatch.context() as within:
        for name, value in IN_A_JOB.items():  # srun refuses that memory together with the site's
            within.setitem(ENVIRONMENT, name, value)
        assert run_side_by_side({"accounted": accounted(cluster)}) == {"accounted": None}
    assert digests(cluster.study("accounted")) == digests(cluster.study("reference"))
    seen = cluster.run("sacct", "--allocations", "--noheader", "--parsable2", "--format=JobName,State").splitlines()
    assert sorted(line for line in seen if line.startswith("accounted-")) == [
        f"accounted-{stage}|COMPLETED" for stage in ("report", *["search"] * 3, *["train"] * 3)
    ]
    assert not list(cluster.study("accounted").glob("slurm/*/7_3.*"))


def accounted(cluster: Cluster) -> Scenario:
    """One of the tasks does two packs in turn, since the user may not have more jobs."""
    study = (*ALONE, "name=accounted")
    said = yield from cluster.submit(*study)
    assert "train: 3 tasks, 4 packs" in said
    assert "search: 3 tasks" in said
    assert "failed" not in "".join((yield from cluster.status(*study)))
    yield cluster.is_over("accounted")
    assert (yield from cluster.status(*study))[-1] == "4 done"
