"""The arithmetic of a frozen backbone: float32, TF32 products, or bfloat16 weights and states."""

import contextlib
from collections.abc import Iterator

import torch

from dynexit.errors import UserError
from dynexit.models.backbones import Backbone

_AMPERE = (8, 0)  # the first compute capability with TF32 and bfloat16


def check_precision(precision: str, device: torch.device) -> None:
    """Raises UserError for a backbone.precision (float32, tf32, bf16) that `device` cannot compute."""
    lacks, instead = "", "float32"
    if device.type == "cuda" and precision != "float32":
        found = torch.cuda.get_device_capability(device)
        if found < _AMPERE:
            lacks = f"{torch.cuda.get_device_name(device)} (compute capability {found[0]}.{found[1]}, needed is 8.0)"
    elif precision == "tf32" and device.type != "cuda":
        lacks, instead = f"a {device.type} device", "float32 or bf16"
    if lacks:
        raise UserError(f"backbone.precision = {precision!r}: {lacks} does not compute it; set {instead}")


def set_precision(backbone: Backbone, precision: str) -> None:
    """Makes a frozen backbone compute in that precision, in place; images are cast, exits and losses are not."""
    backbone.precision = precision
    if precision == "bf16":
        backbone.to(torch.bfloat16)


@contextlib.contextmanager
def products_of(precision: str) -> Iterator[None]:
    """Within, CUDA's convolutions and products are float32 to the last bit, or in TF32 where `precision` says so."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
