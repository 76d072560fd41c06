"""Where a run keeps things, and how it writes them: whole or not at all.

A run directory is finished when it holds `DONE`, its last write: JSON with the id of what was done and the size and
SHA-256 of every file that was promised. The existence of any other file says nothing.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from dynexit.contents import Costs, Done, MetricsRow
from dynexit.core.cost import ExitCosts
from dynexit.errors import Failure
from dynexit.files import read_text, regular
from dynexit.study.grid import Point

if TYPE_CHECKING:
    from torch import Tensor

DONE = "DONE"
FAILED = "FAILED.json"
PROGRESS = "progress.json"
PROVENANCE = "provenance.json"
BACKBONE, HEADS, COSTS, METRICS, CONFIG = (  # what jobs leave in their folders
    "backbone.safetensors",
    "heads.safetensors",
    "costs.json",
    "metrics.jsonl",
    "config.json",
)
BUDGETS = "budgets.json"
LATENCY = "latency.json"  # the times of stage bench; a search by time has a copy
CLASSES = "classes.json"
STUDY = "study.yaml"  # in a study's folder: the study that was run there, with every key
MEMBERS, BEGUN = "members.json", ".begun"  # of a pack: its points; a mark that exists until the pack is complete


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    The bytes are on disk (fsync of file and folder) before the rename, so a reader or a machine that loses power sees
    the old file or the new one. Raises Failure, naming the file, where the disk is full or the folder is read-only.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # less the umask
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise Failure(
            f"{path} could not be written: {reason}; free space or fix the permissions, then run again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes `text` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically; floats keep their full precision, NaN is refused (ValueError)."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, kind: Any = Any) -> Any:
    """Returns the JSON in `path`, checked against `kind`, a type of dynexit.contents.

    Raises Failure, naming the file and its first mistake, where it is damaged; FileNotFoundError where it is missing.
    """
    try:
        return _adapter(kind).validate_json(read_text(path), strict=True)
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise Failure(f"{path} is damaged ({_first_mistake(error)}); {move_aside(path.parent)}") from error


def read_json_lines(path: Path, kind: Any, *, skip_cut_off: bool = False) -> list[Any]:
    """Returns the values in a file of JSON lines, each checked against `kind`; `skip_cut_off` skips what is no JSON.

    Raises Failure, naming file and line, where one is damaged; FileNotFoundError where the file is missing.
    """
    found, number = [], 0
    try:
        for line in read_text(path).splitlines():
            number += 1
            try:
                found.append(_adapter(kind).validate_json(line, strict=True))
            except ValidationError as error:
                if not skip_cut_off or error.errors()[0]["type"] != "json_invalid":
                    raise
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        where = f"line {number}: " if number else ""
        raise Failure(f"{path} is damaged ({where}{_first_mistake(error)}); {move_aside(path.parent)}") from error
    return found


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first_mistake(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return getattr(error, "strerror", None) or str(error)
    mistake = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, mistake["loc"]))
    return f"{place}: {mistake['msg']}" if place else mistake["msg"]


def sha256_file(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def move_aside(directory: Path) -> str:
    """The remedy for a damaged output: a shell command that moves it aside, so that the next run recreates it."""
    number = sum(1 for _ in directory.parent.glob(f"{directory.name}.damaged*"))  # mv would put it into a folder
    source, last = shlex.quote(str(directory)), f"damaged{number or ''}"
    return f"move it aside with `mv {source} {source}.{last}` and run the same command again to remake it"


def folders_in_place(parent: Path) -> list[Path]:
    """The jobs' folders in `parent` by name, without those that were moved aside."""
    return sorted(path for path in parent.glob("*") if path.is_dir() and "." not in path.name)


def mark_done(directory: Path, identity: str, files: Sequence[str]) -> None:
    """Writes DONE: the id of what was done, and size and SHA-256 of each of `files` (names inside `directory`)."""
    listed = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": sha256_file(directory / name)} for name in files
    }
    for stale in (directory / FAILED, directory / PROGRESS, *directory.glob(".*.tmp")):  # .tmp of a killed writer
        stale.unlink(missing_ok=True)
    write_json(directory / DONE, {"id": identity, "files": listed})


def is_done(directory: Path, identity: str, *, check_bytes: bool = False) -> bool:
    """Whether `directory` holds the finished work `identity`.

    False where there is no DONE. Raises Failure, naming the file and the command that fixes it, if DONE is of
    another id or damaged, or where a promised file is missing or has another size (with `check_bytes`, other bytes).
    """
    try:
        done: Done = read_json(directory / DONE, Done)
    except FileNotFoundError:
        return False
    if done["id"] != identity:
        raise Failure(
            f"{directory} holds the work of another configuration (id {done['id']}, expected {identity}); "
            f"{move_aside(directory)}"
        )
    for name, promised in done["files"].items():
        check_file(directory, name, promised, check_bytes=check_bytes)
    return True


def check_file(directory: Path, name: str, promised: Mapping[str, Any], *, check_bytes: bool) -> None:
    """Raises Failure where a file is missing or has not the `promised` size (with `check_bytes`, SHA-256)."""
    path, remedy = directory / name, move_aside(directory)
    if not path.is_file():
        raise Failure(f"{path} is missing although its job is finished; {remedy}")
    size = path.stat().st_size
    if size != promised["bytes"]:
        raise Failure(f"{path} has {size} bytes instead of {promised['bytes']}; {remedy}")
    if check_bytes and sha256_file(path) != promised["sha256"]:
        raise Failure(f"{path} was altered (its SHA-256 is not the one in DONE); {remedy}")


class RunDir:
    """The folder of one stage's work for a point: its paths, its files, and whether the work is done.

    Everything that jobs leave is written whole or not at all. Points with the same id of a stage share the folder.
    """

    def __init__(self, point: Point, stage: str, identity: str | None = None) -> None:
        """`identity` is the id of work that is not a point's own, as of a pack."""
        self.identity = point.ids[stage] if identity is None else identity
        self.path = point.study_dir / stage / self.identity

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_marked(self) -> bool:
        """Whether DONE is there; nothing else is looked at."""
        return (self.path / DONE).is_file()

    def is_done(self, *, check_bytes: bool = False) -> bool:
        """Returns whether the work is finished and whole; see `is_done`. Raises Failure where it is damaged."""
        return is_done(self.path, self.identity, check_bytes=check_bytes)

    def mark_done(self, files: Sequence[str]) -> None:
        """Writes DONE, which promises `files`."""
        mark_done(self.path, self.identity, files)

    def digest(self, name: str) -> str:
        """Returns the SHA-256 that DONE promises for the file `name`."""
        done: Done = self.read_json(DONE, Done)
        if name not in done["files"]:
            raise Failure(f"{self.path / DONE} is damaged (it does not list {name}); {move_aside(self.path)}")
        return done["files"][name]["sha256"]

    def read_json(self, name: str, kind: Any = Any) -> Any:
        """Returns the JSON in `name`; see `read_json`."""
        return read_json(self.path / name, kind)

    def costs(self) -> ExitCosts:
        """Returns what leaving at each exit costs, from costs.json. Raises Failure where it is damaged."""
        try:
            return ExitCosts.from_json(self.read_json(COSTS, Costs))
        except ValueError as error:
            raise Failure(f"{self.path / COSTS} is damaged ({error}); {move_aside(self.path)}") from error

    def read_lines(self, name: str) -> list[MetricsRow]:
        """Returns the rows of JSON lines; see `read_json_lines`."""
        return read_json_lines(self.path / name, MetricsRow)

    def write_json(self, name: str, content: Any) -> None:
        """Writes JSON atomically."""
        write_json(self.path / name, content)

    def write_lines(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes JSON lines atomically."""
        write_text(self.path / name, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))

    def save_tensors(self, name: str, tensors: "Mapping[str, Tensor]") -> str:
        """Writes tensors atomically and returns the file's SHA-256."""
        return save_tensors(self.path / name, tensors)

    def load_tensors(self, name: str) -> "dict[str, Tensor]":
        """Returns the tensors in the file `name`. Raises Failure where it cannot be read."""
        return load_tensors(self.path / name)


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> str:
    """Writes the tensors atomically and returns the file's SHA-256. Raises Failure, naming it, on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file(_apart(tensors), temporary)
            temporary.chmod(mode)  # a file of its own would be for its owner alone
        except SafetensorError as error:  # a full disk is an error of its own there, with the number in its text
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number.group(1)) if number else errno.EIO, str(error)) from error
        return sha256_file(temporary)


def _apart(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """The tensors on the CPU, no two in the same memory, as tied weights are: safetensors refuses these."""
    found, places = {}, set()
    for name, tensor in tensors.items():
        found[name] = tensor.detach().cpu().contiguous()
        place = found[name].untyped_storage().data_ptr()
        found[name] = found[name].clone() if place in places else found[name]
        places.add(place)
    return found


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """The tensors in a file of `save_tensors`; Failure, naming it, where it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(regular(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise Failure(f"{path} cannot be read ({error}); {move_aside(path.parent)}") from error
