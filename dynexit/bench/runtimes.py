"""The ways to run a model folder that are timed: the plain model, and one operating point after another.

A runtime has a name, the device it runs on, and two ways to classify images (B, C, H, W).
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dynexit.core.tradeoff import Configuration
from dynexit.deploy.model import EarlyExitModel
from dynexit.errors import UserError

Classify = Callable[[Tensor], np.ndarray]
"""From images to the exits taken (B,)."""


class Runtime(Protocol):
    """What can be timed."""

    name: str

    def plain(self, images: Tensor) -> object:
        """Runs the plain model, without exits, on images on its device."""

    def early(self, training: str, way: Configuration | None, confidence: str) -> Classify:
        """Returns the way to classify with early exit; None: the gates decide."""


class TorchRuntime:
    """The engine of this program, and the backbone by itself."""

    name = "torch"

    def __init__(self, model: EarlyExitModel) -> None:
        self._model = model

    @torch.inference_mode()
    def plain(self, images: Tensor) -> object:
        return self._model.backbone(images)

    def early(self, training: str, way: Configuration | None, confidence: str) -> Classify:
        router = self._model.engines[training].router(way, confidence, self._model.tolerance)
        return lambda images: router.classify(images).exit_index_B


RUNTIMES: dict[str, Callable[[EarlyExitModel], Runtime]] = {"torch": TorchRuntime}
"""By the name that `--runtime` takes."""


def make_runtime(name: str, model: EarlyExitModel) -> Runtime:
    """Returns a runtime by its name. Raises UserError for an unknown one."""
    if name not in RUNTIMES:
        raise UserError(f"--runtime {name}: should be one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name](model)
