"""Which files of a folder were checked before, so that opening it again reads only files that changed."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

ROTATED, UNSTATED_DEPTH, PIXELS = 1, 2, 4  # bits of a record: what was seen, and whether the pixels were decoded
_KEY_BYTES = 16


class CheckedFiles:
    """The sound files of `folder`, by name, size and time of modification. Kept in the user's cache folder.

    A cache that cannot be read or written costs time, never a result.
    """

    def __init__(self, folder: Path) -> None:
        digest = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=_KEY_BYTES).hexdigest()
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self.path = Path(cache) / "dynexit" / "checked" / digest
        self._before: dict[bytes, int] = {}
        self._now: dict[bytes, int] = {}
        with contextlib.suppress(OSError):
            content = self.path.read_bytes()
            for i in range(0, len(content) - _KEY_BYTES, _KEY_BYTES + 1):
                self._before[content[i : i + _KEY_BYTES]] = content[i + _KEY_BYTES]

    def key(self, path: Path) -> bytes:
        """Returns a digest of the file's path, size and time. Raises OSError if it is missing."""
        status = path.stat()
        text = os.fsencode(path) + f"\0{status.st_size} {status.st_mtime_ns}".encode()
        return hashlib.blake2b(text, digest_size=_KEY_BYTES).digest()

    def get(self, key: bytes, *, pixels: bool) -> int | None:
        """Returns what is remembered of a sound file; None if it was not checked, or without `pixels`."""
        found = self._before.get(key)
        if found is None or (pixels and not found & PIXELS):
            return None
        self._now[key] = found
        return found

    def add(self, key: bytes, record: int) -> None:
        self._now[key] = record

    def save(self) -> None:
        """Writes what is known of the files that were asked for or added."""
        if self._now == self._before:
            return
        content = b"".join(key + bytes([record]) for key, record in self._now.items())
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
                file.write(content)
            os.replace(file.name, self.path)
