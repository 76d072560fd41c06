"""What is asked of SLURM's commands: its limits, the queue. Works without accounting; one squeue call for all jobs."""

import contextlib
import dataclasses
import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence

from dynexit.errors import Failure
from launch.slurm.site import Site

DEFAULT_ARRAY_SIZE = 1001  # SLURM's MaxArraySize where nobody set another
QUERY_SECONDS = 30  # between two questions for the queue
# options that users may give the commands by the environment; others, as SQUEUE_PARTITION or the variables of a job
# that this process runs in, would change their answers
_OF_USERS = (
    *("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"),
    *(f"SBATCH_{name}" for name in ("ACCOUNT", "CLUSTERS", "CONSTRAINT", "PARTITION", "QOS", "RESERVATION")),
)
_OPTIONS = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SQUEUE_", "SCANCEL_")
_SECONDS = 60  # a controller that is restarted answers within that, or not at all
_LIVE = re.compile("PENDING|RUNNING|COMPLETING|CONFIGURING|SUSPENDED|REQUEUED|REQUEUE_HOLD|STOPPED|SIGNALING")


@dataclasses.dataclass(frozen=True)
class QueuedJob:
    """A job (or array task) as squeue shows it."""

    job_id: str
    state: str
    reason: str
    node: str

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs."""
        return _LIVE.fullmatch(self.state) is not None


@dataclasses.dataclass(frozen=True)
class Limits:
    """Most tasks of one array, and most jobs and tasks that may be added to the queue (None: no limit known)."""

    array_size: int
    new_jobs: int | None


def ask(command: Sequence[str]) -> str:
    """What a command printed. Raises Failure if it is missing, fails or does not answer."""
    kept = {name: value for name, value in os.environ.items() if name in _OF_USERS or not name.startswith(_OPTIONS)}
    try:
        done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        raise Failure(f"there is no {command[0]} on this machine; submit from a node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise Failure(f"{command[0]} did not answer within {_SECONDS} seconds; try again") from None
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split()) or f"exit status {done.returncode}"
        raise Failure(f"`{' '.join(command)}` failed: {reason}")
    return done.stdout


def is_here() -> bool:
    """Whether this machine can submit to a cluster."""
    return shutil.which("sbatch") is not None


def queue() -> dict[str, QueuedJob]:
    """Every job and array task of this user that SLURM still knows, the ended ones of the last minutes included."""
    lines = ask(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%N"]).splitlines()
    jobs = (QueuedJob(*line.strip().split("|", 3)) for line in lines if line.count("|") >= 3)
    return {job.job_id: job for job in jobs}


def cancel_jobs(job_ids: Sequence[str]) -> None:
    """Cancels jobs and array tasks; those that ended already are passed over."""
    for i in range(0, len(job_ids), 500):
        ask(["scancel", "--quiet", *job_ids[i : i + 500]])


def limits(site: Site, in_queue: int) -> Limits:
    """The cluster's limits: those of the profile, else those that scontrol and sacctmgr report."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"]), re.MULTILINE)
    array_size = site.max_array_size or (int(found.group(1)) if found else DEFAULT_ARRAY_SIZE)
    most = site.max_submit_jobs or min(_submit_limits(site), default=None)
    return Limits(array_size, None if most is None else most - in_queue)


def _submit_limits(site: Site) -> Iterable[int]:
    """MaxSubmitJobs of the user's associations and MaxSubmitJobsPerUser of the qos; none if accounting is off."""
    show = ["sacctmgr", "--noheader", "--parsable2", "show"]
    account = ["account=" + site.account] if site.account else []
    asked = [[*show, "assoc", "user=" + getpass.getuser(), *account, "format=MaxSubmitJobs"]]
    if site.qos:
        asked.append([*show, "qos", "where", "name=" + site.qos, "format=MaxSubmitPU"])
    for command in asked:
        with contextlib.suppress(Failure):
            yield from (int(line) for line in ask(command).split() if line.isdigit())
