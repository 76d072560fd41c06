"""Whatever SLURM does to a training, it ends with the bits of one that nothing disturbed."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from launch.slurm.job_script import script_after, script_before

from dynexit.study.schema import DistSettings
from launch.slurm.worker import ClusterTask
from tests.command_line import TINY, digests, dynexit
from tests.slurm.conftest import Cluster, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
Begin = Callable[..., tuple[str, ...]]


def ranks_of(job_id: str) -> list[int]:
    """The ranks of a job, by rank."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if (
            f"SLURM_JOB_ID={job_id}".encode() in environment
            and b"submitit.core._submit" in command
            and b"srun" not in command
        ):
            rank = next(int(word.partition(b"=")[2]) for word in environment if word.startswith(b"SLURM_PROCID="))
            found.append((rank, int(folder.name)))
    return [number for _, number in sorted(found)]


def test_time_out_beside_signal_requeue_and_preemption(
    cluster: Cluster, long_study: Begin, long_reference: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site.yaml"
    # SLURM signals 10 to 40 s before the minute is up; what is left of it is mostly too short on a fast machine too.
    # Once is enough: the next try, and the jobs that follow, have longer
    late = 'sleep 18 ;; *) scontrol update JobId="$SLURM_JOB_ID" TimeLimit=30 ;; esac'
    setup = [f'case "$SLURM_JOB_NAME,$SLURM_RESTART_COUNT" in *-train,) {late}']
    profile = {"time_minutes": 1, "signal_delay_seconds": 10, "mem_gb": 2, "setup": setup}
    site.write_text(yaml.safe_dump({**profile, "cpus_per_task": 2}), encoding="utf-8")  # a node of its own
    cluster.submit(*long_study("time-out"), site=site)
    stopped = long_study("stopped")
    disturb_three_times(cluster, "stopped", *stopped)
    cluster.wait_for_the_end()
    assert digests(long_reference.parent / "stopped") == digests(long_reference)
    assert re.search(r" 4 +dev\d ", cluster.status(*stopped).splitlines()[1])  # attempts, and the node of the last
    for name in ("time-out", "time-out-2", "time-out-3", "time-out-4"):
        if name != "time-out":
            cluster.submit(*long_study(name), site=site)
            cluster.wait_for_the_end(600)
        assert digests(long_reference.parent / name) == digests(long_reference)
        if cluster.ends(name):
            break
    assert cluster.ends(name) == ["timed-out"]


def disturb_three_times(cluster: Cluster, name: str, *study: str) -> None:
    """Submits the study; its training gets a signal, is requeued, and has to make room for an urgent job."""
    cluster.submit(*study)
    cluster.wait_for_step(name, 100)
    job = cluster.job(f"{name}-train")
    cluster.run("scancel", "--signal=USR2", job)
    wait_until(lambda: cluster.ends(name) == ["preempted"], "the requeue")
    assert "preempted, waits to go on" in cluster.status(*study)
    cluster.wait_for_step(name, 600)
    cluster.run("scontrol", "requeue", job)
    cluster.wait_for_step(name, 1200)
    script = "#!/bin/bash\nsleep 5\n"
    node = cluster.squeue("--job", job, "--format=%N").strip()
    urgent = ["sbatch", "--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null"]
    subprocess.run(urgent, input=script, text=True, check=True, capture_output=True)
    wait_until(lambda: cluster.ends(name) == ["preempted", "preempted"], "the preemption")


def test_a_killed_rank_ends_the_others_and_the_job_is_tried_again(
    cluster: Cluster, long_study: Begin, long_reference: Path
) -> None:
    study = long_study("killed", "dist.checkpoint_seconds=1", "dist.nodes=2", "train.num_epochs=12")
    cluster.submit(*study, jobs="train")
    cluster.wait_for_step("killed", 150)
    ranks = ranks_of(cluster.job("killed-train"))
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    wait_until(lambda: not Path(f"/proc/{ranks[0]}").exists(), "the end of the other rank", 60)
    assert time.monotonic() - killed < 60
    wait_until(lambda: cluster.ends("killed") == ["crashed"], "the requeue")
    local = ("--on", "local", "dist.tasks_per_node=2")
    dynexit(cluster.folder, "train", TINY, *long_study("undisturbed", "train.num_epochs=12"), *local)
    cluster.wait_for_the_end()
    assert len(list((long_reference.parent / "killed" / "train").glob("*/DONE"))) == 2
    assert digests(long_reference.parent / "killed") == digests(long_reference.parent / "undisturbed")


def test_a_task_that_is_requeued_leaves_the_others_of_its_array_alone(cluster: Cluster, tmp_path: Path) -> None:
    work = [
        'until [ -e "$job.go" ]; do sleep 0.2; done',
        'exit_with=$(cat "$job.go"); rm "$job.go"',
        "(exit $exit_with)",
    ]
    script = tmp_path / "array.sh"
    after = script_after(ClusterTask((), 3600, 30), DistSettings())
    script.write_text("\n".join(["#!/bin/bash", *script_before(tmp_path), *work, *after]) + "\n", encoding="utf-8")
    options = ("--requeue", "--array=0-2", "--mem=100M", "--output=/dev/null")
    array = cluster.run("sbatch", "--parsable", *options, str(script)).strip()

    def starts() -> list[int]:
        files = (tmp_path / f"{array}_{task}.starts" for task in range(3))
        return [len(file.read_text().splitlines()) if file.is_file() else 0 for file in files]

    wait_until(lambda: starts() == [1, 1, 1], "the start of the tasks")
    # the one that SLURM knows by the array's id, too
    assert cluster.squeue("--job", f"{array}_2", "--format=%A").strip() == array
    cluster.run("scancel", f"{array}_0")
    wait_until(lambda: f"{array}_0" not in cluster.squeue("--format=%i"), "the end of the cancelled one")
    (tmp_path / f"{array}_2.go").write_text("137")
    wait_until(lambda: starts() == [1, 1, 2], "the requeue")
    for task in (1, 2):
        (tmp_path / f"{array}_{task}.go").write_text("0")
    cluster.wait_for_the_end()
    assert starts() == [1, 1, 2]
    nodes = [line.split()[-1] for line in (tmp_path / f"{array}_2.starts").read_text().splitlines()]
    assert nodes[0] != nodes[1]


def test_a_silent_rank_ends_its_job_and_status_says_why(cluster: Cluster, long_study: Begin) -> None:
    limits = ("dist.timeout_seconds=10", "dist.max_retries=1", "train.num_epochs=20")
    study = long_study("silent", "dist.checkpoint_seconds=1000", "dist.tasks_per_node=2", *limits)
    cluster.submit(*study, jobs="train")
    nodes = []
    for attempt in (1, 2):
        cluster.wait_for_step("silent", 50)
        job = cluster.job("silent-train")
        nodes.append(cluster.squeue("--job", job, "--format=%N").strip())
        wait_until(lambda job=job: len(ranks_of(job)) == 2, "the ranks")
        os.kill(ranks_of(job)[1], signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until(lambda n=attempt: cluster.ends("silent") == ["crashed"] * n, "the end of the job", 100)
        assert time.monotonic() - stopped < 60 + 10
        for log in (cluster.folder / "runs" / "silent" / "pack").glob("*/log.txt"):
            log.write_text("")
    cluster.wait_for_the_end()
    assert nodes[0] != nodes[1]
    lines = cluster.status(*study).splitlines()
    assert lines[-1] == "2 failed"
    assert "Timed out waiting 10000ms" in lines[1]
    assert "; crashed " in lines[1]
    point = lines[1].split()[2]
    assert "Timed out waiting 10000ms" in dynexit(cluster.folder, "logs", TINY, point, *study).stdout


def test_a_dead_node_is_left_and_the_job_runs_elsewhere(
    cluster: Cluster, running: Path, long_study: Begin, long_reference: Path
) -> None:
    cluster.submit(*long_study("dead-node", "dist.checkpoint_seconds=1"))
    cluster.wait_for_step("dead-node", 300)
    job = cluster.job("dead-node-train")
    node = cluster.squeue("--job", job, "--format=%N").strip()
    os.kill(int((running / "pid" / f"{node}.pid").read_text()), signal.SIGKILL)
    (left,) = ranks_of(job)
    os.kill(left, signal.SIGSTOP)  # a node that hangs: it comes to itself when SLURM has given it up
    notes = next((long_reference.parent / "dead-node" / "slurm" / "0001").glob(f"{job}*.starts"))
    try:
        wait_until(lambda: len(notes.read_text().splitlines()) == 2, "the start elsewhere")
        os.kill(left, signal.SIGCONT)
        wait_until(lambda: not Path(f"/proc/{left}").exists(), "the end of what is left", 60)
        cluster.wait_for_the_end()
        assert len(notes.read_text().splitlines()) == 2
        assert cluster.ends("dead-node") == []
    finally:
        subprocess.run(["unshare", "--uts", "sh", "-c", f"hostname {node} && exec slurmd -N {node}"], check=True)
    assert digests(long_reference.parent / "dead-node") == digests(long_reference)
    wait_until(
        lambda: len(cluster.run("sinfo", "-hN", "-p", "main", "-t", "idle").split("\n")) == 4, "the node's return"
    )
