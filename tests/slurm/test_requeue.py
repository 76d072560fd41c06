"""Whatever SLURM does to a training, it ends with the bits of an undisturbed one. All at once on three nodes."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import yaml

from launch.slurm.requeue import script_after, script_before
from launch.tasks.attempts import Attempts, read_attempts
from launch.tasks.decision import RequeueLimits
from tests.command_line import TINY, digests, start
from tests.slurm.conftest import SITE, Cluster, Condition, Scenario, point_of, run_side_by_side
from tests.slurm.processes import is_alive, ranks_of, waits_for

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]
CLUSTER: dict[str, str] = {}
LONG = ("sweep.jei_dnn.ce_ic_tradeoff=[1]", "train.num_epochs=40", "train.global_batch_size=20", "report.mlflow=false")
RARELY, OFTEN = "dist.checkpoint_seconds=1000", "dist.checkpoint_seconds=1"
Begun = Generator[Condition, None, tuple[str, ...]]
TWO_RANKS = ("train.num_epochs=20", "dist.tasks_per_node=2")


def own_site(cluster: Cluster, **keys: object) -> Path:
    """The site profile of the cluster with these keys, too."""
    path = cluster.folder / f"site-{len(list(cluster.folder.glob('site-*')))}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(SITE.read_text()), **keys}), encoding="utf-8")
    return path


def reference(cluster: Cluster) -> Scenario:
    """A study that nothing disturbs."""
    process = start(cluster.folder, "run", TINY, *LONG, RARELY, "name=reference")
    yield lambda: process.poll() is not None
    assert process.returncode == 0, process.communicate()
    process.communicate()


def two_ranks(cluster: Cluster) -> Scenario:
    """The training of two ranks that nothing disturbs."""
    yield is_prepared(cluster)
    with_prepare(cluster, "two-ranks")
    process = start(cluster.folder, "train", TINY, *LONG, RARELY, *TWO_RANKS, "name=two-ranks", "--on", "local")
    yield lambda: process.poll() is not None
    assert process.returncode == 0, process.communicate()
    process.communicate()


def is_prepared(cluster: Cluster) -> Callable[[], bool]:
    return lambda: bool(list(cluster.study("reference").glob("prepare/*/DONE")))


def with_prepare(cluster: Cluster, name: str) -> None:
    """Gives a study the reference's backbone."""
    subprocess.run(["mkdir", "-p", cluster.study(name)], check=True)
    subprocess.run(["cp", "-r", cluster.study("reference") / "prepare", cluster.study(name)], check=True)


def begin(cluster: Cluster, name: str, *more: str, jobs: str = "run", site: Path = SITE) -> Begun:
    """Submits a study that has the reference's backbone; returns its overrides."""
    yield is_prepared(cluster)
    with_prepare(cluster, name)
    study = (*LONG, f"name={name}", *more)
    yield from cluster.submit(*study, jobs=jobs, site=site)
    return study


def make_room(cluster: Cluster, node: str) -> None:
    """Submits a job of a higher partition that needs the whole node."""
    urgent = ["sbatch", "--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null"]
    subprocess.run(urgent, input="#!/bin/bash\nsleep 5\n", text=True, check=True, capture_output=True)


def stopped(cluster: Cluster) -> Scenario:
    """A training gets SIGUSR2, is requeued by scontrol, and makes room for an urgent job."""
    assert subprocess.run(["sacct"], capture_output=True, check=False).returncode  # accounting is off
    study = yield from begin(cluster, "stopped", RARELY, site=own_site(cluster, cpus_per_task=2))  # a node of its own
    yield lambda: cluster.is_at_step("stopped", 100)
    job = cluster.job("stopped-train")
    cluster.run("scancel", "--signal=USR2", job)
    yield lambda: cluster.ends("stopped") == ["preempted"]
    yield lambda: cluster.is_at_step("stopped", 600)
    cluster.run("scontrol", "requeue", job)
    yield lambda: cluster.num_starts("stopped") == 3
    yield lambda: cluster.is_at_step("stopped", 1200)
    make_room(cluster, cluster.node(job))
    yield lambda: cluster.ends("stopped") == ["preempted", "preempted"]
    yield cluster.is_over("stopped")
    assert cluster.num_starts("stopped") == 4
    assert [line.split()[-3:-1] for line in (yield from cluster.status(*study))[1:3]] == [
        ["4", cluster.attempts("stopped")[0].node]
    ] * 2


def timed_out(cluster: Cluster) -> Scenario:
    """The time of a training is up; it is stopped until SLURM's signal came, so that it is not complete before."""
    later = 'case "$SLURM_JOB_NAME,$SLURM_RESTART_COUNT" in *-train,) ;; *) '
    later += 'scontrol update JobId="$SLURM_JOB_ID" TimeLimit=30 ;; esac'  # what follows has more time
    site = own_site(cluster, time_minutes=2, signal_delay_seconds=30, setup=[later])
    yield from begin(cluster, "timed-out", RARELY, site=site)
    yield lambda: cluster.is_at_step("timed-out", 1) or cluster.ends("timed-out")
    ranks = [] if cluster.ends("timed-out") else ranks_of(cluster.job("timed-out-train"))
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):  # SLURM may send it half a minute early
            os.kill(rank, signal.SIGSTOP)
        yield lambda rank=rank: waits_for(rank, signal.SIGUSR2)
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)
    yield lambda: cluster.ends("timed-out") == ["timed-out"]
    yield cluster.is_over("timed-out")


def fragile(cluster: Cluster) -> Scenario:
    """On a site that cancels what it preempts, and gives no time to save, `retry` continues."""
    site = own_site(cluster, partition="fragile", cpus_per_task=2)
    study = yield from begin(cluster, "fragile", OFTEN, site=site)
    yield lambda: cluster.is_at_step("fragile", 300)
    make_room(cluster, cluster.node(cluster.job("fragile-train")))
    yield cluster.is_over("fragile")
    lines = yield from cluster.status(*study)
    assert lines[-1] == "2 failed"
    assert "train job" in lines[1]
    said = yield from cluster.call("retry", *study)
    assert "train: 1 task, 1 pack" in said
    yield cluster.is_over("fragile")


def killed(cluster: Cluster) -> Scenario:
    """A rank is killed twice: the other one ends, and the job goes on elsewhere."""
    yield from begin(cluster, "killed", OFTEN, *TWO_RANKS, jobs="train")
    for attempt, step in ((1, 100), (2, 400)):
        yield lambda step=step: cluster.is_at_step("killed", step)
        job = cluster.job("killed-train")
        yield lambda job=job: len(ranks_of(job)) == 2
        ranks = ranks_of(job)
        os.kill(ranks[2 - attempt], signal.SIGKILL)
        yield lambda ranks=ranks: not any(map(is_alive, ranks))
        yield lambda n=attempt: cluster.ends("killed") == ["crashed"] * n
        yield lambda n=attempt: cluster.num_starts("killed") == n + 1
    yield cluster.is_over("killed")
    nodes = [node for _, _, node in cluster.attempts("killed")[0].starts]
    assert nodes[0] != nodes[1]
    assert nodes[1] != nodes[2]


def silent(cluster: Cluster) -> Scenario:
    """A rank on another node stops answering: the job ends, and `status` and `logs` say why."""
    limits = ("dist.timeout_seconds=60", "dist.max_retries=0", "dist.nodes=2")
    study = yield from begin(cluster, "silent", RARELY, *limits, jobs="train")
    yield lambda: cluster.is_at_step("silent", 50)
    job = cluster.job("silent-train")
    ranks = ranks_of(job)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGSTOP)
    yield lambda: cluster.ends("silent") == ["crashed"]
    yield cluster.is_over("silent")
    assert not any(map(is_alive, ranks))
    lines = yield from cluster.status(*study)
    assert lines[-1] == "2 failed"
    assert "; crashed " in lines[1]
    logs = yield from cluster.call("logs", point_of(lines[1]), *study)
    for text in (lines[1], logs):  # gloo says the one or the other, as its threads find the silent rank
        assert "Timed out waiting 60000ms" in text or "timeout caused pair closure" in text


def dead_node(cluster: Cluster) -> Scenario:
    """SLURM loses a node and starts the job elsewhere; what hung on the node ends when it goes on."""
    yield from begin(
        cluster, "dead-node", OFTEN, site=own_site(cluster, cpus_per_task=2)
    )  # no other's job is on its node
    yield lambda: cluster.is_at_step("dead-node", 300)
    job = cluster.job("dead-node-train")
    node = cluster.node(job)
    os.kill(int((cluster.place / "pid" / f"{node}.pid").read_text()), signal.SIGKILL)
    (left,) = ranks_of(job)
    os.kill(left, signal.SIGSTOP)
    try:
        yield lambda: cluster.num_starts("dead-node") == 2
        os.kill(left, signal.SIGCONT)
        yield lambda: not is_alive(left)
    finally:
        subprocess.run(["unshare", "--uts", "sh", "-c", f"hostname {node} && exec slurmd -N {node}"], check=True)
    yield cluster.is_over("dead-node")
    assert cluster.num_starts("dead-node") == 2
    assert cluster.ends("dead-node") == []


def array(cluster: Cluster) -> Scenario:
    """A task of an array that is requeued leaves the others alone."""
    folder = cluster.folder / "array"
    folder.mkdir()
    after = script_after("/no/python", RequeueLimits(0, 0, 1, 0))
    ranks = ['until [ -e "$job.go" ]; do sleep 0.2; done', 'code=$(cat "$job.go"); rm "$job.go"', "(exit $code)"]
    script = folder / "array.sh"
    script.write_text("\n".join(["#!/bin/bash", *script_before(folder), *ranks, *after]) + "\n")
    options = ("--requeue", "--array=0-2", "--mem=100M", "--output=/dev/null", "--job-name=array-task")
    job = cluster.run("sbatch", "--parsable", *options, str(script)).strip()

    def attempts() -> list[Attempts]:
        return [read_attempts(folder / f"{job}_{task}") for task in range(3)]

    def starts() -> list[int]:
        return [len(one.starts) for one in attempts()]

    yield lambda: starts() == [1, 1, 1]
    # the task that SLURM knows by the array's id, too
    assert cluster.squeue("--job", f"{job}_2", "--format=%A").strip() == job
    cluster.run("scancel", f"{job}_0")
    yield lambda: f"{job}_0" not in cluster.squeue("--format=%i")
    (folder / f"{job}_2.go").write_text("137")
    yield lambda: starts() == [1, 1, 2]
    for task in (1, 2):
        (folder / f"{job}_{task}.go").write_text("0")
    yield cluster.is_over("array")
    assert starts() == [1, 1, 2]


SCENARIOS = (reference, two_ranks, stopped, timed_out, fragile, killed, silent, dead_node, array)


@pytest.fixture(scope="module")
def outcomes(cluster: Cluster) -> dict[str, BaseException | None]:
    return run_side_by_side({scenario.__name__: scenario(cluster) for scenario in SCENARIOS})


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_disturbance(cluster: Cluster, outcomes: dict[str, BaseException | None], name: str) -> None:
    """Every scenario came to its end, and its results have the bits of the reference."""
    error = outcomes[name]
    if error is not None:
        raise error
    study = name.replace("_", "-")
    if name == "killed":
        assert len(list(cluster.study(study).glob("train/*/DONE"))) == 2
        assert digests(cluster.study(study)) == digests(cluster.study("two-ranks"))
    elif name in ("stopped", "timed_out", "fragile", "dead_node"):
        assert digests(cluster.study(study)) == digests(cluster.study("reference"))
