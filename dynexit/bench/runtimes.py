"""The ways to run a model folder that are timed: the plain model, and one operating point after another.

A runtime has a name, the device it runs on, and two ways to classify images (B, C, H, W).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dynexit.core.tradeoff import Configuration
from dynexit.deploy.description import SavedPoint
from dynexit.deploy.model import EarlyExitModel
from dynexit.errors import UserError
from dynexit.export.convert import check_packages, write_program
from dynexit.export.folder import export_model
from dynexit.export.programs import BackboneStage
from dynexit.export.router import ExportedModel

Classify = Callable[[Tensor], np.ndarray]
"""From images to the exits taken (B,)."""


class Runtime(Protocol):
    """What can be timed."""

    name: str

    def plain(self, images: Tensor) -> object:
        """Runs the plain model, without exits, on images on its device."""

    def early(self, point: SavedPoint, way: Configuration | None) -> Classify:
        """Returns the way to classify with a point's exits at the thresholds of `way`; None: the gates decide."""


class TorchRuntime:
    """The engine of this program, and the backbone by itself."""

    name = "torch"

    def __init__(self, model: EarlyExitModel, directory: Path, scratch: Path) -> None:
        self._model = model

    def plain(self, images: Tensor) -> object:
        return next(iter(self._model.engines.values())).plain(images)

    def early(self, point: SavedPoint, way: Configuration | None) -> Classify:
        router = self._model.engines[point.training].router(way, point.confidence, self._model.tolerance)
        return lambda images: router.classify(images).exit_index_B


class OptimizedRuntime(TorchRuntime):
    """As TorchRuntime, of what `optimize` makes of the model."""

    name, compiles = "optimized", False

    def __init__(self, model: EarlyExitModel, directory: Path, scratch: Path) -> None:
        super().__init__(model.optimize(str(model.device), compile=self.compiles), directory, scratch)


class CompiledRuntime(OptimizedRuntime):
    """As OptimizedRuntime, with torch.compile."""

    name, compiles = "compiled", True


class OnnxRuntime:
    """What `dynexit export` writes, on onnxruntime with as many threads as torch has, and the backbone as one graph.

    Raises UserError on another device than the CPU, and if a package is missing.
    """

    name = "onnx"

    def __init__(self, model: EarlyExitModel, directory: Path, scratch: Path) -> None:
        check_packages("onnx")
        if model.device.type != "cpu":
            raise UserError(f"--runtime onnx runs on the CPU, and the device is {model.device}; leave --device out")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        graphs = scratch / "graphs"
        export_model(directory, graphs, "onnx", verify=False)
        example = {"in_state": torch.zeros(2, *model.input_size)}
        write_program(graphs / "full.onnx", BackboneStage(model.backbone, None, None), example)
        self._router = ExportedModel(graphs, sess_options=options)

    def plain(self, images: Tensor) -> object:
        pool = {"state": images.numpy()}
        self._router.run({"program": "full.onnx", "inputs": ["state"]}, pool)
        return pool["logits"]

    def early(self, point: SavedPoint, way: Configuration | None) -> Classify:
        name, saved = f"{point.name} as timed", self._router.points[point.name]
        steps = [dict(step) for step in saved["steps"]]
        for step in steps:
            if way is not None and "threshold" in step:
                step["threshold"] = way.exits[step["exit_index"]][1]
        self._router.points[name] = {**saved, "steps": steps}
        return lambda images: self._router(images.numpy(), name).exit_index


_KINDS: list[Any] = [TorchRuntime, OptimizedRuntime, CompiledRuntime, OnnxRuntime]
RUNTIMES: dict[str, Callable[[EarlyExitModel, Path, Path], Runtime]] = {kind.name: kind for kind in _KINDS}
"""By the name that `--runtime` takes."""


def make_runtime(name: str, model: EarlyExitModel, directory: Path, scratch: Path) -> Runtime:
    """Returns a runtime by its name, for the model that is in `directory` too; it may write below `scratch`.

    Raises UserError for an unknown one.
    """
    if name not in RUNTIMES:
        raise UserError(f"--runtime {name}: should be one of {', '.join(RUNTIMES)}")
    return RUNTIMES[name](model, directory, scratch)
