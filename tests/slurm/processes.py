"""The processes of SLURM jobs on this machine, which is all nodes of the cluster."""

import contextlib
import signal
from pathlib import Path


def ranks_of(job_id: str) -> list[int]:
    """The ranks of a job that are started, by rank."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"SLURM_JOB_ID={job_id}".encode() in environment and b"launch.tasks.worker" in command:
            ranks = [int(word.partition(b"=")[2]) for word in environment if word.startswith(b"SLURM_PROCID=")]
            found += [(rank, int(folder.name)) for rank in ranks if not command.startswith(b"srun")]
    return [number for _, number in sorted(found)]


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


def waits_for(process: int, number: signal.Signals) -> bool:
    """Whether a stopped process has got the signal, or has ended before it was stopped."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in pending)
