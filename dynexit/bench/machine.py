"""The machine on which times are measured, in words."""

import datetime
import platform
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: torch.device, precision: str) -> dict[str, Any]:
    """Returns device (cpu or cuda), device_name, threads, torch, precision and date (UTC, ISO)."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": precision,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """Returns the model of the CPU, or what Python calls its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
