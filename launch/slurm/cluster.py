"""What is asked of SLURM's commands: its limits, the queue. Works without accounting; one squeue call for all jobs."""

import contextlib
import dataclasses
import getpass
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence

from dynexit.errors import Failure, UserError
from launch.slurm.site import Site

DEFAULT_ARRAY_SIZE = 1001  # SLURM's MaxArraySize where nobody set another
QUERY_SECONDS = 30  # between two questions for the queue
# options that users may give the commands by the environment; others, as SQUEUE_PARTITION, would change their answers
OF_USERS = (
    *("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"),
    *(f"SBATCH_{name}" for name in ("ACCOUNT", "CLUSTERS", "CONSTRAINT", "PARTITION", "QOS", "RESERVATION")),
)
_OPTIONS = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_")
_SECONDS = 60  # a controller that is restarted answers within that, or not at all
LIVE = (
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "STOPPED",
    "SIGNALING",
)


@dataclasses.dataclass(frozen=True)
class QueuedJob:
    """A job (or array task) as squeue shows it."""

    job_id: str
    state: str
    reason: str
    node: str
    study: str = ""  # the folder that dynexit gave it as a comment

    @property
    def is_live(self) -> bool:
        """Whether it waits or runs."""
        return self.state in LIVE


@dataclasses.dataclass(frozen=True)
class Limits:
    """Most tasks of one array, and most jobs and tasks that may be added to the queue (None: no limit known)."""

    array_size: int
    new_jobs: int | None


class _Refusal(Failure):
    """A command ended with an error, for the reason that it printed."""

    def __init__(self, command: Sequence[str], reason: str) -> None:
        super().__init__(f"`{' '.join(command)}` failed: {reason}")
        self.reason = reason


def ask(command: Sequence[str]) -> str:
    """What a command printed. Raises Failure where it is missing, fails or does not answer."""
    environment = {
        name: value for name, value in os.environ.items() if name in OF_USERS or not name.startswith(_OPTIONS)
    }
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except FileNotFoundError:
        raise Failure(f"there is no {command[0]} on this machine; submit from a node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise Failure(f"{command[0]} did not answer within {_SECONDS} seconds; try again") from None
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split())
        raise _Refusal(command, reason or f"exit status {done.returncode}")
    return done.stdout


def is_here() -> bool:
    """Whether this machine can submit to a cluster."""
    return shutil.which("sbatch") is not None


def queue() -> dict[str, QueuedJob]:
    """Every job and array task of this user that SLURM still knows, the ended ones of the last minutes included."""
    lines = ask(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%N|%k"]).splitlines()
    jobs = (QueuedJob(*line.strip().split("|", 4)) for line in lines if line.count("|") >= 4)
    return {job.job_id: job for job in jobs}


def cancel_jobs(job_ids: Sequence[str]) -> None:
    """Cancels jobs and array tasks; those that ended already are passed over."""
    for i in range(0, len(job_ids), 500):
        ask(["scancel", "--quiet", *job_ids[i : i + 500]])


def limits(site: Site, in_queue: int) -> Limits:
    """The cluster's limits: those of the profile, else what scontrol and sacctmgr say."""
    config = ask(["scontrol", "show", "config"])
    array_size = site.max_array_size or _number(config, "MaxArraySize") or DEFAULT_ARRAY_SIZE
    if site.max_submit_jobs is not None:
        return Limits(array_size, site.max_submit_jobs - in_queue)
    room = [limit - in_queue for limit in _submit_limits(site)]
    with contextlib.suppress(Failure):  # sbatch would say it too
        if (count := _number(config, "MaxJobCount")) is not None:
            room.append(count - _num_jobs_of_all())
    return Limits(array_size, min(room, default=None))


def _num_jobs_of_all() -> int:
    """Everybody's jobs, and those that ended minutes ago."""
    return len(ask(["squeue", "--noheader", "--array", "--states=all", "--format=%i"]).splitlines())


def rehearse(script: str, partition: str | None) -> str:
    """Why no node could run the script's job as the cluster is now, or ''.

    Raises UserError with what sbatch would refuse or no node could ever run.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        try:
            ask(["sbatch", "--test-only", file.name])
        except _Refusal as refusal:
            reason = refusal.reason.removeprefix("allocation failure: ")
            if "node configuration" in reason and not _are_all_up(partition):  # those that have it may be drained
                return reason
            raise UserError(reason) from None
    return ""


def _are_all_up(partition: str | None) -> bool:
    """Whether all nodes can be had, now or when other jobs are over."""
    try:
        chosen = ["--partition=" + partition] if partition else []
        states = ask(["sinfo", "--noheader", *chosen, "--format=%t"]).split()
    except Failure:
        return False
    return all(state in ("idle", "mix", "alloc", "comp") for state in states)


def _number(config: str, name: str) -> int | None:
    found = re.search(rf"^{name}\s*=\s*(\d+)", config, re.MULTILINE)
    return int(found.group(1)) if found else None


def _submit_limits(site: Site) -> Iterable[int]:
    """MaxSubmitJobs of the user's associations and MaxSubmitJobsPerUser of the qos; none where accounting is off."""
    if shutil.which("sacctmgr") is None:
        return
    show = ["sacctmgr", "--noheader", "--parsable2", "show"]
    account = ["account=" + site.account] if site.account else []
    asked = [[*show, "assoc", "user=" + getpass.getuser(), *account, "format=MaxSubmitJobs"]]
    if site.qos:
        asked.append([*show, "qos", "where", "name=" + site.qos, "format=MaxSubmitPU"])
    for command in asked:
        try:
            lines = ask(command).split()
        except Failure:
            continue  # no accounting, no such limit
        yield from (int(line) for line in lines if line.isdigit())


def check_request(site: Site, nodes: int, minutes: int) -> None:
    """Raises UserError where the partition is unknown or can never run such a job: SLURM would let it wait for ever."""
    partitions = _partitions()
    if not partitions:
        return
    default = next((name for name, facts in partitions.items() if facts.get("Default") == "YES"), None)
    for name in (site.partition or default or "").split(","):
        if not name:
            raise UserError(
                f"the cluster has no default partition; name one in the site profile: {', '.join(partitions)}"
            )
        if name not in partitions:
            raise UserError(f"partition = {name!r}: the cluster has no such partition; it has {', '.join(partitions)}")
    asked = [partitions[name] for name in (site.partition or default or "").split(",")]
    longest = [_minutes(facts.get("MaxTime", "")) for facts in asked]
    if all(limit is not None and limit < minutes for limit in longest):
        raise UserError(
            f"time_minutes = {minutes}: partition {site.partition or default} allows at most "
            f"{max(limit for limit in longest if limit is not None)} minutes"
        )
    largest = [_most_nodes(facts) for facts in asked]
    if all(limit is not None and limit < nodes for limit in largest):
        raise UserError(
            f"dist.nodes = {nodes}: partition {site.partition or default} gives a job at most "
            f"{max(limit for limit in largest if limit is not None)} nodes"
        )


def _partitions() -> dict[str, dict[str, str]]:
    facts = [
        dict(word.split("=", 1) for word in line.split() if "=" in word)
        for line in ask(["scontrol", "--oneliner", "show", "partition"]).splitlines()
    ]
    return {one["PartitionName"]: one for one in facts if "PartitionName" in one}


def _most_nodes(facts: dict[str, str]) -> int | None:
    known = [int(facts[name]) for name in ("MaxNodes", "TotalNodes") if facts.get(name, "").isdigit()]
    return min(known, default=None)


def _minutes(text: str) -> int | None:
    """Minutes of SLURM's DAYS-HH:MM:SS; None for UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not found:
        return None
    days, hours, minutes, _ = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + minutes
