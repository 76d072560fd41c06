"""What is read from SLURM's commands, with commands that are faked."""

from collections.abc import Sequence

import pytest

from dynexit.errors import Failure
from launch.slurm import cluster
from launch.slurm.cluster import Limits
from launch.slurm.site import Site


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
    answers["squeue"] = "7_0|RUNNING|None|n1\n7_1|PENDING|Dependency|\n8|COMPLETED|None|n2\nnoise\n"
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
