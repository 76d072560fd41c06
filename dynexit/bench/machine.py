"""The machine on which times are measured, in words."""

import datetime
from typing import Any

import torch

from dynexit.provenance import cpu_name


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
