"""Tensors in safetensors files: written whole or not at all; a damaged file is named."""

import errno
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynexit.errors import Failure
from dynexit.run_dir import atomic_write, move_aside, sha256_file


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Writes the tensors atomically and returns the file's SHA-256. Raises Failure, naming it, on a full disk."""
    with atomic_write(path) as temporary:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:  # how safetensors tells of a full disk
            raise OSError(errno.EIO, str(error)) from error
        return sha256_file(temporary)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of `save_tensors`; Failure, naming it, where it cannot be read."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Failure(f"{path} cannot be read ({error}); {move_aside(path.parent)}") from error
