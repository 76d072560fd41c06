"""One shard file: written whole, checked when opened, mapped when read."""

import hashlib
import json
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from dynexit.errors import Failure
from dynexit.record.manifest import Layout, Shard, shard_file
from dynexit.run_dir import atomic_write, move_aside

_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "F32": np.dtype(np.float32)}


def write_shard(directory: Path, batches: tuple[int, int], arrays: dict[str, np.ndarray]) -> Shard:
    """Writes the shard of `batches` (first and last) atomically and returns its entry for the manifest."""
    content = save(arrays)
    with atomic_write(directory / shard_file(*batches)) as temporary:
        temporary.write_bytes(content)
    checksums = f"{zlib.crc32(content):08x}", hashlib.sha256(content).hexdigest()
    return Shard(*batches, len(arrays["index"]), len(content), *checksums)


class MappedShard:
    """A shard file whose size, header and indices were found right, and whose bytes are checked when first read."""

    def __init__(self, directory: Path, layout: Layout, shard: Shard) -> None:
        self.num_samples = shard.num_samples
        self._path = directory / shard.file
        self._shard = shard
        self._verified = False
        check_size(directory, shard)
        first, stop = layout.sample_range(shard.first_batch, shard.last_batch)
        self._arrays = _array_offsets(self._path)
        found = {name: (dtype, shape) for name, (dtype, shape, _) in self._arrays.items()}
        if found != layout.arrays(stop - first) or shard.num_samples != stop - first:
            raise Failure(f"{self._path} does not hold the arrays that its manifest says; {move_aside(directory)}")
        index = np.fromfile(self._path, np.int64, stop - first, offset=self._arrays["index"][2])
        if len(index) != stop - first:
            raise Failure(f"{self._path} is damaged (its header points past its end); {move_aside(directory)}")
        wrong = np.flatnonzero(index != np.arange(first, stop))
        if len(wrong):
            raise Failure(
                f"{self._path} holds sample {index[wrong[0]]} where sample {first + wrong[0]} belongs, so that not "
                f"every sample is there exactly once; {move_aside(directory)}"
            )

    def arrays(self) -> Mapping[str, np.ndarray]:
        if not self._verified:
            if _crc32_file(self._path) != self._shard.crc32:
                raise Failure(
                    f"{self._path} was altered (its CRC-32 is not the one in the manifest); "
                    f"{move_aside(self._path.parent)}"
                )
            self._verified = True
        # mapped anew each time: a kept map would hold a file descriptor per shard
        with self._path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            name: np.frombuffer(mapped, dtype, int(np.prod(shape)), offset).reshape(shape)
            for name, (dtype, shape, offset) in self._arrays.items()
        }


def check_size(directory: Path, shard: Shard) -> None:
    """Raises Failure where the shard's file is missing or has another size than its manifest says."""
    path = directory / shard.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise Failure(f"{path} is missing although its manifest lists it; {move_aside(directory)}") from None
    if size != shard.bytes:
        raise Failure(f"{path} has {size} bytes instead of {shard.bytes}; {move_aside(directory)}")


def _crc32_file(path: Path) -> str:
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc32 = zlib.crc32(chunk, crc32)
    return f"{crc32:08x}"


def _array_offsets(path: Path) -> dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]:
    """Type, shape and place in the file of every array of a safetensors file."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > 1_000_000:
                raise ValueError("no header")
            header = json.loads(file.read(header_bytes))
        return {
            name: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure(f"{path} is damaged (not a safetensors file: {error}); {move_aside(path.parent)}") from error
