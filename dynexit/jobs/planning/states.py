"""How far each point is, read from the files that its jobs leave."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dynexit.contents import JobProgress
from dynexit.jobs.finished import finished_jobs, last_figures, read_progress
from dynexit.progress import NOTABLE_WAIT
from dynexit.provenance import read_provenance
from dynexit.run_dir import RunDir
from dynexit.study.grid import Point

INTERRUPTED = "interrupted"  # ends the state of what began and does not run
_SPEED = ("images_per_second_per_rank", "share_waiting_for_data", "peak_memory_bytes")


@dataclasses.dataclass(frozen=True)
class PointState:
    """What the files say of a point. `missing` is its first stage that is not done, None if all are."""

    missing: str | None
    state: str
    step: str
    figures: str
    log: Path
    is_logged: bool
    """Whether `log` is that of the stage that is missing."""
    speed: dict[str, float]
    """Images a second of a rank, share of the time waiting for data, peak memory: of what runs, or of the training."""


def point_state(point: Point, pack: Path | None, *, is_held: bool) -> PointState:
    """Returns the state of a point. `pack` is the folder of its pack, `is_held` says that a launcher works here."""
    finished = finished_jobs(point)
    missing = next((job for job in point.stages if job not in finished), None)
    backbone = RunDir(point, "prepare").path
    log = (backbone if pack is None else pack) / "log.txt"
    working_in = pack if missing == "train" else backbone if missing == "prepare" else None
    progress = read_progress(working_in) if working_in is not None else None
    step = f"{progress['step']}/{progress['num_steps']}" if progress else ""
    measured: Mapping[str, Any] = (
        progress or (read_provenance(RunDir(point, "train").path) if "train" in finished else None) or {}
    )
    figures = " ".join(_figures(progress, is_running=is_held))
    if "train" in finished:
        figures = "; ".join(filter(None, (last_figures(point), ", ".join(_speed(measured)))))
    is_logged = log.is_file() and (pack is not None or missing == "prepare")
    if missing is None:
        state = "done"
    elif not is_held and missing in ("prepare", "train") and (progress or is_logged):
        state = f"{missing} {INTERRUPTED}"
    elif finished or pack is not None:
        state = f"{missing} {'running' if is_held and (missing != 'train' or pack is not None) else 'to do'}"
    else:
        state = "waiting (prepare running)" if is_held else "waiting"
    speed = {name: measured[name] for name in _SPEED if name in measured}
    return PointState(missing, state, step, figures, log, is_logged, speed)


def _speed(job: Mapping[str, Any]) -> Iterator[str]:
    if "images_per_second_per_rank" in job:
        each = " a rank" if job.get("num_ranks", 1) > 1 else ""
        yield f"{job['images_per_second_per_rank']:.0f} images/s{each}"
    if (waited := job.get("share_waiting_for_data", 0.0)) > NOTABLE_WAIT:
        yield f"{100 * waited:.0f} % waiting for data"
    if "peak_memory_bytes" in job:
        yield f"{job['peak_memory_bytes'] / 2**20:.0f} MiB"


def _figures(progress: JobProgress | None, *, is_running: bool) -> Iterator[str]:
    if progress is not None:
        yield from (f"{name} {float(value):.4g}" for name, value in progress["figures"].items())
    if progress is not None and is_running:
        yield f"{progress['images_per_second']:.0f} images/s {progress['seconds_left']:.0f} s left"
