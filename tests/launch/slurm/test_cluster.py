"""What is read from SLURM's commands, with commands that are faked."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from dynexit.errors import Failure, UserError
from launch.slurm import cluster
from launch.slurm.cluster import Limits
from launch.slurm.site import Site

PARTITIONS = (
    "PartitionName=main Default=YES MaxTime=1-02:30:00 MaxNodes=UNLIMITED TotalNodes=3\n"
    "PartitionName=long Default=NO MaxTime=UNLIMITED MaxNodes=2 TotalNodes=9\n"
)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each command prints, by name; one that is missing fails."""
    printed: dict[str, str] = {}

    def ask(command: Sequence[str]) -> str:
        words = " ".join(command)
        for beginning, text in printed.items():
            if words.startswith(beginning):
                return text
        raise Failure(f"`{words}` failed: not here")

    monkeypatch.setattr(cluster, "ask", ask)
    monkeypatch.setattr(cluster.shutil, "which", lambda name: name)
    return printed


def test_queue(answers: dict[str, str]) -> None:
    answers["squeue"] = "7_0|RUNNING|None|n1|/a|b\n7_1|PENDING|Dependency||(null)\n8|COMPLETED|None|n2|/c\nnoise\n"
    found = cluster.queue()
    assert [(job.job_id, job.is_live) for job in found.values()] == [("7_0", True), ("7_1", True), ("8", False)]
    assert found["7_1"].reason == "Dependency"


def test_limits_of_the_cluster_and_of_the_profile(answers: dict[str, str]) -> None:
    answers["scontrol show config"] = "MaxArraySize            = 11\nMaxJobCount             = 5000\n"
    assert cluster.limits(Site(), 10) == Limits(11, None)  # no accounting
    answers["sacctmgr --noheader --parsable2 show assoc"] = "\n300\n200\n"
    assert cluster.limits(Site(), 10) == Limits(11, 190)
    answers["sacctmgr --noheader --parsable2 show qos"] = "50\n"
    assert cluster.limits(Site(qos="small"), 10) == Limits(11, 40)
    assert cluster.limits(Site(max_array_size=4, max_submit_jobs=20), 5) == Limits(4, 15)
    answers["scontrol show config"] = ""
    assert cluster.limits(Site(max_submit_jobs=20), 0) == Limits(1001, 20)


def test_a_time_limit_above_the_partitions_is_refused(answers: dict[str, str]) -> None:
    answers["scontrol --oneliner show partition"] = PARTITIONS
    with pytest.raises(UserError) as error:
        cluster.check_time(Site(), 1591)
    assert str(error.value) == "time_minutes = 1591: partition main allows at most 1590 minutes"
    for site, minutes in ((Site(), 1590), (Site(partition="main,long"), 10**6), (Site(partition="other"), 10**6)):
        cluster.check_time(site, minutes)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name that says what the script is that it gets, and ends as it."""
    path = tmp_path / "sbatch"
    path.write_text('#!/bin/sh\n[ "$1" = --test-only ] && . "$2"\n')
    sinfo = tmp_path / "sinfo"
    sinfo.write_text('#!/bin/sh\necho idle; echo mix\n[ "$2" = --partition=old ] && echo drain || :\n')
    for program in (path, sinfo):
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return path


def test_a_rehearsal_tells_what_waits_from_what_is_refused(sbatch: Path) -> None:
    assert cluster.rehearse("echo 'Job 7 to start at noon'", Site()) == ""
    too_much, unknown = "Requested node configuration is not available", "Invalid feature specification"
    refusal = "echo 'allocation failure: {}' >&2; exit 1"
    assert (
        cluster.rehearse(refusal.format(too_much), Site(partition="old")) == too_much
    )  # the node that is drained may have it
    for reason, partition in ((too_much, None), (too_much, "new"), (unknown, "old")):
        with pytest.raises(UserError) as error:
            cluster.rehearse(refusal.format(reason), Site(partition=partition))
        assert str(error.value) == reason


def test_commands_do_not_get_options_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"SQUEUE_PARTITION", "SCANCEL_STATE", "SBATCH_NO_REQUEUE", "SLURM_JOB_ID", "SBATCH_QOS", "SLURM_CONF"}
    for name in names:
        monkeypatch.setenv(name, "1")
    seen = {line.partition("=")[0] for line in cluster.ask(["env"]).splitlines()}
    assert seen & {*names, "PATH"} == {"SBATCH_QOS", "SLURM_CONF", "PATH"}


def test_a_missing_command_and_one_that_fails() -> None:
    with pytest.raises(Failure, match="there is no dynexit-has-no-such-program on this machine"):
        cluster.ask(["dynexit-has-no-such-program"])
    with pytest.raises(Failure, match=r"`false` failed: exit status 1"):
        cluster.ask(["false"])
