"""Which files of a folder were checked before, so that opening it again reads only files that changed."""

import contextlib
import functools
import hashlib
import os
import tempfile
from pathlib import Path

ROTATED, UNSTATED_DEPTH, PIXELS = 1, 2, 4  # bits of a record: what was seen, and whether the pixels were decoded
_KEY_BYTES = _DIGEST_BYTES = 16
_ENTRY_BYTES = _KEY_BYTES + 1 + _DIGEST_BYTES
_NO_DIGEST = bytes(_DIGEST_BYTES)
_blake2b = functools.partial(hashlib.blake2b, digest_size=_KEY_BYTES)


def cache_path(kind: str, folder: Path, version: int) -> Path:
    """The file in the user's cache folder that keeps what is known of `folder`, of one kind and version."""
    name = _blake2b(os.fsencode(folder.resolve())).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "dynexit" / kind / f"{name}-{version}"


class CheckedFiles:
    """The sound files of `folder`, by name, size and time of modification. Kept in the user's cache folder.

    A cache that cannot be read or written costs time, never a result.
    """

    def __init__(self, folder: Path) -> None:
        self.path = cache_path("checked", folder, 2)
        self._before: dict[bytes, tuple[int, bytes]] = {}  # by key what was seen, and the digest of the content
        self._now: dict[bytes, tuple[int, bytes]] = {}
        with contextlib.suppress(OSError):
            content = self.path.read_bytes()
            for i in range(0, len(content) - _ENTRY_BYTES + 1, _ENTRY_BYTES):
                entry = content[i : i + _ENTRY_BYTES]
                self._before[entry[:_KEY_BYTES]] = entry[_KEY_BYTES], entry[_KEY_BYTES + 1 :]

    def state(self, path: Path) -> tuple[bytes, int]:
        """Returns a key, a digest of the file's path, size and time, and its size. Raises OSError if it is missing."""
        status = path.stat()
        text = os.fsencode(path) + f"\0{status.st_size} {status.st_mtime_ns}".encode()
        return _blake2b(text).digest(), status.st_size

    def get(self, key: bytes, *, pixels: bool) -> int | None:
        """Returns what is remembered of a sound file; None if it was not checked, or without `pixels`."""
        seen, digest = self._before.get(key, (None, _NO_DIGEST))
        if seen is None or (pixels and not seen & PIXELS):
            return None
        self._now[key] = seen, digest
        return seen

    def add(self, key: bytes, record: int) -> None:
        self._now[key] = record, self._before.get(key, (0, _NO_DIGEST))[1]

    def digest(self, key: bytes, path: Path) -> bytes:
        """Returns a digest of the content of a file that was checked, which is read if that was not done before."""
        seen, found = self._before.get(key, (0, _NO_DIGEST))
        if found == _NO_DIGEST:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, _blake2b).digest()
        self._now[key] = seen, found
        return found

    def save(self) -> None:
        """Writes what is known of the files that were asked for or added."""
        if self._now == self._before:
            return
        content = b"".join(key + bytes([seen]) + digest for key, (seen, digest) in self._now.items())
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
                file.write(content)
            os.replace(file.name, self.path)
