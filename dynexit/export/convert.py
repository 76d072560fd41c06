"""A program as a file: an ONNX graph, or an archive of torch.export. Both take batches of any size."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from dynexit.errors import UserError

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
"""By format the end of a program's name."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages(kind: str) -> None:
    """Raises UserError for an unknown format, and if a package that it needs is missing."""
    if kind not in SUFFIXES:
        raise UserError(f"the format is {kind!r}, allowed are {', '.join(SUFFIXES)}")
    missing = [name for name in _PACKAGES if kind == "onnx" and find_spec(name) is None]
    if missing:
        raise UserError(f"export to onnx needs {', '.join(missing)}; run: pip install 'dynexit[export]'")


@torch.no_grad()
def write_program(path: Path, program: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Writes a program as its name's suffix says, and returns its outputs for the example.

    `example` has the program's arguments by name, with two samples or more. In the file the number of samples is free.
    """
    program.eval()
    batch = torch.export.Dim("batch")
    with _quiet():
        shapes = {name: {0: batch} for name in example}
        exported = torch.export.export(program, (), kwargs=dict(example), dynamic_shapes=shapes)
        outputs: dict[str, Tensor] = program(**example)
        if path.suffix == SUFFIXES["torch"]:
            exported.example_inputs = None  # they would be stored as a pickle
            torch.export.save(exported, path)
        else:
            graph = torch.onnx.export(
                exported, (), input_names=list(example), output_names=list(outputs), dynamo=True, verbose=False
            )
            assert graph is not None
            graph.save(path)
    return outputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what exporters say about their own work; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
