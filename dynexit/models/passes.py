"""A frozen backbone's passes made faster: maps channels last in memory, torch.compile. Answers differ by rounding."""

import contextlib
import json
from collections.abc import Iterator

import torch

from dynexit.errors import Failure, UserError
from dynexit.models.backbones import Backbone
from dynexit.models.cut.backbone import OwnBackbone
from dynexit.models.multi_exit import MultiExit
from dynexit.study.schema import BackboneSettings


@contextlib.contextmanager
def compiling(key: str) -> Iterator[None]:
    """Turns what torch.compile raises, a hundred lines, into a Failure of one sentence that names the key."""
    try:
        yield
    except RuntimeError as error:  # looked at by name: importing the class takes seconds
        if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise Failure(
            f"{key} = true: torch.compile failed ({reason}); fix its compiler, empty its cache "
            f"(TORCHINDUCTOR_CACHE_DIR), or set {key}=false"
        ) from error


def quicken(model: MultiExit, settings: BackboneSettings, device: torch.device, batch_size: int) -> None:
    """Makes `MultiExit.features` faster, in place, as backbone.channels_last and backbone.compile say.

    If either is so, runs it once on a blank batch of that size: what fails does so here. Raises UserError for a
    backbone that takes no maps with their channels last, Failure where torch.compile fails.
    """
    backbone, asked = model.backbone, settings.channels_last
    channels_last = _gains(backbone, device) if asked == "auto" else asked
    if channels_last:
        backbone.to(memory_format=torch.channels_last)
        model.memory_format = torch.channels_last
    if settings.compile:
        model.compile_features()
    if not (channels_last or settings.compile):
        return
    blank = torch.zeros(max(batch_size, 2), *backbone.input_size, device=device)
    try:
        with compiling("backbone.compile"):
            model.features(blank)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a module may look at strides
        if not channels_last:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"backbone.channels_last = {json.dumps(asked)}: {backbone.name} takes no maps with their channels last "
            f"({reason}); set backbone.channels_last=false"
        ) from error


def _gains(backbone: Backbone, device: torch.device) -> bool:
    """Whether channels last is known to be faster: for tensor cores, to which cuDNN else copies maps in that order.

    Modules of the user's own are left as they are: they may look at strides.
    """
    return device.type == "cuda" and backbone.precision != "float32" and not isinstance(backbone, OwnBackbone)
