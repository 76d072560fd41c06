"""Where results come from: each job leaves the code, packages, machine, command and time of its work in its folder."""

import contextlib
import datetime
import functools
import getpass
import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dynexit.contents import Done, Provenance
from dynexit.memory import naming_memory, peak_memory_bytes
from dynexit.progress import finished_loads, job_speed
from dynexit.run_dir import DONE, PROVENANCE, STUDY, RunDir, read_json, sha256_file, write_json
from dynexit.study.grid import Point
from dynexit.study.stages import stage_of
from dynexit.version import installed_version

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "numba", "accelerate")
_INSTRUCTION_SETS = ("avx512f", "avx2", "avx", "asimd")  # the widest first


def run_stage(stage: str, points: Sequence[Point]) -> None:
    """Does the stage's job for `points`, and leaves provenance.json in the folder of each that it finished.

    A stage without a folder per point returns the one that it made. Raises Failure where memory does not suffice.
    """
    since = time.monotonic()
    finished_loads.clear()
    one = stage_of(stage)
    in_pack = len(points) if one.ranks == "all" else 1
    with naming_memory(in_pack, one.batch_key) if one.batch_key else contextlib.nullcontext():
        made = one.runner()(points)
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0):
        return
    folders = {point.ids[stage]: RunDir(point, stage).path for point in points if stage in point.ids}
    finished = [folder for folder in [*folders.values(), made] if folder is not None and (folder / DONE).exists()]
    common = provenance_of(stage, since, len(points) if made else len(finished))
    study = {STUDY: sha256_file(path)} if (path := points[0].study_dir / STUDY).is_file() else {}
    for folder in finished:
        files = read_json(folder / DONE, Done)["files"]
        digests = study | {name: promised["sha256"] for name, promised in files.items()}
        write_json(folder / PROVENANCE, {**common, "digests": digests})


def read_provenance(folder: Path) -> Provenance | None:
    """What the job of a run folder left; None for work of earlier versions. Raises Failure where it is damaged."""
    try:
        found: Provenance = read_json(folder / PROVENANCE, Provenance)
    except FileNotFoundError:
        return None
    return found


def provenance_of(stage: str, since: float, num_points: int) -> Provenance:
    """Returns what a job that began at `since` of the monotonic clock leaves by now, without digests."""
    gpus, seconds = _gpus(), time.monotonic() - since
    started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
    world_size = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    return {
        "stage": stage,
        "dynexit": installed_version(),
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "dynexit"), *sys.argv[1:]]),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "cpu": cpu_name(),
        "instruction_set": instruction_set(),
        "gpu": gpus,
        "driver": _driver() if gpus else "",
        "user": _user(),
        "num_ranks": world_size,
        "started": started.isoformat(timespec="seconds"),
        "seconds": seconds,
        "gpu_hours": seconds * world_size / 3600 if gpus else 0.0,
        "num_points": num_points,
        "peak_memory_bytes": peak_memory_bytes(),
        **job_speed(),  # type: ignore[typeddict-item]
    }


def _gpus() -> str:
    """The GPU that the job used; jobs that do not load torch use none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"


def _driver() -> str:
    """The version of NVIDIA's driver."""
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
        return found.group(1) if found else ""
    return ""


def _user() -> str:
    """Who runs this; empty for a user without a name, as in some containers."""
    with contextlib.suppress(KeyError, OSError):
        return getpass.getuser()
    return ""


@functools.cache
def commit() -> str:
    """The commit of the code, with -dirty if it was changed since; empty if it was installed without its history."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def cpu_name() -> str:
    """Returns the model of the CPU, or what Python calls its architecture."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def instruction_set() -> str:
    """The widest vector instructions of the CPU: other ones round sums in another order."""
    flags = (_cpu_field("flags") or _cpu_field("Features")).split()
    return next((name for name in _INSTRUCTION_SETS if name in flags), platform.machine())


@functools.cache
def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
