"""Whether a point is recorded on every split, and whole."""

from pathlib import Path

from dynexit.record.manifest import MANIFEST
from dynexit.record.shards import Record
from dynexit.run_dir import is_done

SPLITS = ("validation", "test")
_MOST_CHECKED_BYTES = 64 << 20


def is_recorded(directory: Path, identity: str, *, check_bytes: bool = False) -> bool:
    """Whether `directory` holds the finished record `identity` on every split.

    A split that was moved aside is not there and will be recorded again, alone. Raises Failure, naming the shard, where
    one is missing or of another size, and with `check_bytes` where one of a small record (up to 64 MiB a split) was
    altered; of a larger one that is found when the shard is first read.
    """
    if not is_done(directory, identity, check_bytes=check_bytes):
        return False
    folders = [directory / split for split in SPLITS]
    if not all((folder / MANIFEST).is_file() for folder in folders):
        return False
    for folder in folders if check_bytes else ():
        record = Record.open(folder)
        if sum(path.stat().st_size for path in folder.iterdir()) <= _MOST_CHECKED_BYTES:
            for _ in record.parts():
                pass  # reading a part checks its bytes
    return True
