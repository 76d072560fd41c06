"""What a machine has of GPUs, and the device that a rank takes."""

import contextlib
import dataclasses
import os
import re
from pathlib import Path

import torch

from dynexit.errors import UserError


@dataclasses.dataclass(frozen=True)
class Gpus:
    """What torch and this machine have of GPUs."""

    usable: bool  # by torch
    file: str  # the device file of one that this process may open, or ''
    driver: str  # the version of the loaded driver, or ''
    uuids: tuple[str, ...] = ()  # of the GPUs that this process sees; empty if they were not asked for


def find_gpus(root: Path = Path("/"), visible: str | None = None) -> Gpus:
    """Returns what there is of GPUs; `root` has the folders dev and proc, `visible` is CUDA_VISIBLE_DEVICES.

    A GPU that `visible` hides, or that a cluster's control group does not let this process open, does not count.
    """
    hidden = visible is not None and visible.strip() in ("", "-1", "NoDevFiles")
    files = [] if hidden else sorted((root / "dev").glob("nvidia[0-9]*"))
    driver = ""
    with contextlib.suppress(OSError):
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        driver = (re.findall(r"\s(\d+\.\d[\d.]*)\s", text) or [""])[0]
    return Gpus(torch.cuda.is_available(), next((str(path) for path in files if _opens(path)), ""), driver)


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def choose_device(device: str, gpus: Gpus) -> str:
    """Returns cpu or cuda for a `dist.device` of auto, cpu or cuda.

    Raises UserError where cuda is asked for and torch can use no GPU, and where there is a GPU that torch cannot use:
    training on the CPU instead would take days, and nothing would say why.
    """
    if device == "cpu" or (device == "auto" and not gpus.usable and not gpus.file):
        return "cpu"
    if gpus.usable:
        return "cuda"
    what = f"torch cannot use the GPU {gpus.file}" if gpus.file else "torch finds no GPU"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        what += f" (CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r})"
    driver = f"the NVIDIA driver is {gpus.driver}" if gpus.driver else "no NVIDIA driver is loaded"
    wheel = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    raise UserError(
        f"dist.device = {device!r}: {what}; {driver}, torch {torch.__version__} is {wheel}; install a driver and a "
        "wheel of torch that fit each other (a container needs the driver's libraries: --nv, --gpus), or set "
        "dist.device=cpu"
    )


def own_gpu() -> torch.device:
    """This rank's GPU among those that it sees: of one, as SLURM may bind them, the first whatever the rank."""
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def local_rank() -> int:
    """This process's number among those of its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))
