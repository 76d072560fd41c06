"""Whether a point is recorded on every split, whole, and from the weights it has now."""

from pathlib import Path

from dynexit.config import Record as RecordSettings
from dynexit.errors import Failure, UserError
from dynexit.record.manifest import MANIFEST
from dynexit.record.shards import Record
from dynexit.run_dir import is_done, job_dir
from dynexit.sweep import Point

SPLITS = ("validation", "test")
_MOST_CHECKED_BYTES = 64 << 20
_MOST_FULL_CLASSES = 10


def recorded_splits(settings: RecordSettings) -> tuple[str, ...]:
    """The splits that are recorded."""
    return (*SPLITS, "train") if settings.train else SPLITS


def default_topk(num_classes: int) -> int:
    """How many classes are recorded where record.topk is null: all of few, else the prediction alone."""
    return num_classes if num_classes <= _MOST_FULL_CLASSES else 1


def is_recorded(point: Point, study_dir: Path, *, check_sizes: bool = False, check_bytes: bool = False) -> bool:
    """Whether `point` has a finished record of every split.

    A split that was moved aside is not there and will be recorded again, alone. Raises Failure, naming the shard, with
    `check_sizes` where one is missing or of another size, and with `check_bytes` also where one of a small record (up
    to 64 MiB a split) was altered; of a larger one that is found when the shard is first read.
    """
    identity = point.ids["record"]
    directory = job_dir(study_dir, "record", identity)
    if not is_done(directory, identity, check_bytes=check_bytes):
        return False
    folders = [directory / split for split in recorded_splits(point.config.record)]
    if not all((folder / MANIFEST).is_file() for folder in folders):
        return False
    for folder in folders if check_sizes or check_bytes else ():
        record = Record.open(folder)
        if check_bytes and sum(path.stat().st_size for path in folder.iterdir()) <= _MOST_CHECKED_BYTES:
            for _ in record.parts():
                pass  # reading a part checks its bytes
    return True


def set_aside_stale(point: Point, study_dir: Path, checkpoint_sha256: str) -> list[Path]:
    """Moves what was recorded and searched of other weights of `point` aside, so that it is made again; the new names.

    A point that was trained again, alone after damage, has last bits of its own, and all of its outputs must be of the
    same weights. A record that is not finished cannot tell and goes too.
    """
    record = job_dir(study_dir, "record", point.ids["record"])
    if not record.is_dir() or all(_is_of(record / split, checkpoint_sha256) for split in SPLITS):
        return []
    moved = []
    for directory in (record, job_dir(study_dir, "search", point.ids["search"])):
        if directory.is_dir():
            number = sum(1 for _ in directory.parent.glob(f"{directory.name}.stale*"))
            moved.append(directory.rename(f"{directory}.stale{number or ''}"))
    return moved


def _is_of(folder: Path, checkpoint_sha256: str) -> bool:
    try:
        Record.open(folder, checkpoint_sha256)
    except (Failure, UserError, OSError):
        return False
    return True
