"""Epochs in MLflow while a training runs, with `report.mlflow: live`."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dynexit.jobs.reporting.tracked import history, tracked_point, tracking_uri
from dynexit.report.tracking import LiveRuns, TrackedPoint, first_line
from dynexit.study.grid import Point

_SECONDS = 5.0  # between two batches of epochs
_ENDING_SECONDS = 20.0  # that the end of a training waits for a slow server


@contextlib.contextmanager
def followed(points: Sequence[Point], rows: Callable[[], Sequence[Any]]) -> Iterator[None]:
    """While the block runs, a thread appends the epochs in `rows` to the points' runs: rows of metrics, with a member.

    A store that does not take them is only warned of, once; the report writes the same figures at the end.
    """
    stop, now = threading.Event(), time.time()
    tracked: list[TrackedPoint] = [{**tracked_point(point), "span": (now, now)} for point in points]
    thread = threading.Thread(target=_follow, args=(points[0], tracked, rows, stop), name="mlflow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_ENDING_SECONDS)


def _follow(
    first: Point, points: Sequence[TrackedPoint], rows: Callable[[], Sequence[Any]], stop: threading.Event
) -> None:
    runs, done, warned, is_last = None, 0, False, False
    while not is_last:
        is_last = stop.wait(_SECONDS)
        found = list(rows())
        if len(found) == done:
            continue
        try:
            if runs is None:
                runs = LiveRuns(tracking_uri(first), first.config.name, points)
            new = [[row for row in found[done:] if row["member"] == i] for i in range(len(points))]
            runs.append([{"id": p["id"], "history": history(of)} for p, of in zip(points, new, strict=True) if of])
            done = len(found)
        except Exception as error:  # whatever mlflow, its database or its server raise: the training continues
            if not warned:
                print(f"MLflow does not take the epochs now: {first_line(error)}; training continues", flush=True)
            warned = True
