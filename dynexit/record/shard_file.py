"""One shard file: written whole, checked when opened, mapped when read."""

import hashlib
import json
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dynexit.errors import Failure
from dynexit.record.manifest import SHARED, Layout, Shard, shard_file
from dynexit.run_dir import atomic_write, move_aside

_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "F32": np.dtype(np.float32)}


def write_shard(directory: Path, batches: tuple[int, int], arrays: dict[str, np.ndarray], num_members: int) -> Shard:
    """Writes the shard of `batches` (first and last) atomically and returns its entry for the manifest.

    The arrays must be contiguous. They are written piece by piece: `save` of safetensors copies them twice.
    """
    names = _in_order(arrays)
    header = _safetensors_header({name: arrays[name] for name in names})
    sha256, crc32 = hashlib.sha256(header), [zlib.crc32(header)] * num_members
    with atomic_write(directory / shard_file(*batches)) as temporary, temporary.open("wb") as file:
        file.write(header)
        for name in names:
            for member, array in enumerate([arrays[name]] if name in SHARED else arrays[name]):
                file.write(array.data)
                sha256.update(array.data)
                for summed in range(num_members) if name in SHARED else [member]:
                    crc32[summed] = zlib.crc32(array.data, crc32[summed])
        num_bytes = file.tell()
    texts = tuple(f"{one:08x}" for one in crc32)
    return Shard(*batches, len(arrays["index"]), num_bytes, texts, sha256.hexdigest())


def _in_order(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The names of arrays as they are written and summed."""
    return sorted(arrays, key=lambda name: (name not in SHARED, name))


def _safetensors_header(arrays: Mapping[str, np.ndarray]) -> bytes:
    """What stands before the arrays, which follow one another, in a safetensors file."""
    entries, start = {}, 0
    for name, array in arrays.items():
        (dtype,) = (text for text, known in _DTYPES.items() if known == array.dtype)
        place = [start, start := start + array.nbytes]
        entries[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": place}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def member_arrays(arrays: Mapping[str, np.ndarray], member: int) -> dict[str, np.ndarray]:
    """A member's part of the arrays of a shard."""
    return {name: array if name in SHARED else array[member] for name, array in arrays.items()}


class MappedShard:
    """One member's part of a shard file.

    The file's size, header and indices are checked here; the member's bytes when they are first read.
    """

    def __init__(self, directory: Path, layout: Layout, shard: Shard, num_members: int, member: int) -> None:
        self.num_samples = shard.num_samples
        self._path = directory / shard.file
        self._crc32 = shard.crc32[0]
        self._member = member if num_members else None
        self._verified = False
        check_size(directory, shard)
        first, stop = layout.sample_range(shard.first_batch, shard.last_batch)
        self._arrays, self._header_bytes = _array_offsets(self._path)
        found = {name: (dtype, shape) for name, (dtype, shape, _) in self._arrays.items()}
        if found != layout.shard_arrays(stop - first, num_members) or shard.num_samples != stop - first:
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
        # mapped again each time: a kept map would hold a file descriptor per shard
        with self._path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {
            name: np.frombuffer(mapped, dtype, int(np.prod(shape)), offset).reshape(shape)
            for name, (dtype, shape, offset) in self._arrays.items()
        }
        if self._member is not None:
            arrays = member_arrays(arrays, self._member)
        if not self._verified:
            whole = self._member is None
            crc32 = f"{zlib.crc32(mapped):08x}" if whole else _crc32_member(mapped[: self._header_bytes], arrays)
            if crc32 != self._crc32:
                raise Failure(
                    f"{self._path} was altered (its CRC-32 is not the one in the manifest); "
                    f"{move_aside(self._path.parent)}"
                )
            self._verified = True
        return arrays


def check_size(directory: Path, shard: Shard) -> None:
    """Raises Failure where the shard's file is missing or has another size than its manifest says."""
    path = directory / shard.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise Failure(f"{path} is missing although its manifest lists it; {move_aside(directory)}") from None
    if size != shard.bytes:
        raise Failure(f"{path} has {size} bytes instead of {shard.bytes}; {move_aside(directory)}")


def _crc32_member(header: bytes, arrays: Mapping[str, np.ndarray]) -> str:
    crc32 = zlib.crc32(header)
    for name in _in_order(arrays):
        crc32 = zlib.crc32(np.ascontiguousarray(arrays[name]).data, crc32)
    return f"{crc32:08x}"


def _array_offsets(path: Path) -> tuple[dict[str, tuple[np.dtype[Any], tuple[int, ...], int]], int]:
    """Type, shape and place in the file of every array of a safetensors file, and where its header ends."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > 1_000_000:
                raise ValueError("no header")
            header = json.loads(file.read(header_bytes))
        return {
            name: (_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
            for name, entry in header.items()
        }, 8 + header_bytes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Failure(f"{path} is damaged (not a safetensors file: {error}); {move_aside(path.parent)}") from error
