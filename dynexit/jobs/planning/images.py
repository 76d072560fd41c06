"""Whether a finished study's images are still those that it was made of."""

import os
from collections.abc import Sequence
from pathlib import Path

from dynexit.errors import UserError
from dynexit.run_dir import CLASSES, RunDir
from dynexit.study.grid import Point


def changed_images(points: Sequence[Point]) -> str | None:
    """What is wrong with the images of a study whose backbones are prepared; None if nothing is.

    Takes milliseconds where no folder of data.dir is newer than the backbone. Else the images are listed, which imports
    torch. A file that was overwritten in place is not noticed: that changes no folder.
    """
    latest: dict[str, int] = {}
    for point in {point.ids["prepare"]: point for point in points}.values():
        where, prepared = point.config.data.dir, RunDir(point, "prepare") / CLASSES
        if where is None:
            continue
        try:
            latest[where] = latest.get(where) or _last_change(Path(where).expanduser())
            is_newer = latest[where] > prepared.stat().st_mtime_ns
        except OSError:  # the images need not be here
            continue
        if is_newer:
            from dynexit.data import load_data
            from dynexit.jobs.load import check_images

            try:
                check_images(point, load_data(point.config.data, checked=True))
            except UserError as mistake:
                return str(mistake)
    return None


def _last_change(folder: Path) -> int:
    """When an entry of the folder, or of one below it, was last added, removed or renamed, in nanoseconds."""
    status = folder.stat()
    latest = status.st_mtime_ns
    if status.st_nlink != 2:  # then it holds no folders, and need not be listed; some file systems do not count them
        with os.scandir(folder) as entries:
            below = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
        latest = max([latest, *map(_last_change, below)])
    return latest
