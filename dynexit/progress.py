"""What a long job says while it runs: a bar on a terminal, plain lines in its log, a file for `dynexit status`."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dynexit.errors import Failure
from dynexit.memory import peak_memory_bytes
from dynexit.run_dir import PROGRESS, write_json

T = TypeVar("T")

NOTABLE_WAIT = 0.05  # of the time

finished_loads: list["Load"] = []
"""What this process has loaded and worked on, one entry for each Progress that finished; `job_speed` adds them up."""


@dataclasses.dataclass(frozen=True)
class Load:
    """Images of one rank, and the seconds that it took them: all, and those of waiting for data."""

    num_images: float
    seconds: float
    seconds_waited: float

    def speed(self) -> dict[str, float]:
        """Returns images a second of a rank and the share of the time that it waited for data."""
        seconds = max(self.seconds, 1e-9)
        waited = min(self.seconds_waited / seconds, 1.0)
        return {"images_per_second_per_rank": self.num_images / seconds, "share_waiting_for_data": waited}


def job_speed() -> dict[str, float]:
    """Returns the speed of all in `finished_loads` together; nothing if there are none."""
    if not finished_loads:
        return {}
    return Load(*(sum(values) for values in zip(*map(dataclasses.astuple, finished_loads), strict=True))).speed()


class Progress:
    """Counts the steps of a job; says at most every `log_seconds` where it is.

    `directory` receives `log.txt` (lines are appended) and `progress.json`. A quiet Progress (ranks but the main one)
    says nothing. The images that are counted are of `num_ranks` ranks together.
    """

    def __init__(
        self, name: str, directory: Path, log_seconds: float = 10.0, *, quiet: bool = False, num_ranks: int = 1
    ) -> None:
        self.name, self.directory, self.log_seconds, self.quiet = name, directory, log_seconds, quiet
        self.num_ranks = num_ranks
        self._bar: Any = None
        self._begin(0, 0)

    def _begin(self, step: int, num_steps: int) -> None:
        self.step, self.num_steps = step, num_steps
        self._first_step, self._num_images, self._seconds_waited = step, 0, 0.0
        self._started = self._last_said = time.monotonic()

    def start(self, num_steps: int, step: int = 0) -> None:
        """Begins counting to `num_steps`, from `step` if a run resumes."""
        self._begin(step, num_steps)
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=step, desc=self.name, unit="step", dynamic_ncols=True)

    def awaited(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields `batches`, timing how long each takes to come: a large share of that is shown."""
        source = iter(batches)
        while True:
            began = time.monotonic()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self._seconds_waited += time.monotonic() - began
            yield batch

    def advance(self, num_images: int, figures: Mapping[str, Any]) -> None:
        """One step done on `num_images` images; `figures` are read only when something is said.

        A tensor of several values is shown as the mean of those that are not NaN.
        """
        self.step += 1
        self._num_images += num_images
        if self._bar is not None:
            self._bar.update()
        if not self.quiet and time.monotonic() - self._last_said >= self.log_seconds:
            self._say_where(figures)

    def _say_where(self, figures: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self._last_said = now
        seconds = max(now - self._started, 1e-9)
        speed = self._load(now).speed()
        values = {
            name: float(value.nanmean() if getattr(value, "ndim", 0) else value) for name, value in figures.items()
        }
        rate = self._num_images / seconds
        left = seconds / max(self.step - self._first_step, 1) * (self.num_steps - self.step)
        shown = " ".join(f"{name} {value:.4f}" for name, value in values.items())
        waited = speed["share_waiting_for_data"]
        waits = f", {100 * waited:.0f} % of the time waiting for data" if waited > NOTABLE_WAIT else ""
        self._write(
            f"{self.name}: step {self.step}/{self.num_steps} {shown} {rate:.0f} images/s {left:.0f} s left{waits}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        content = {"step": self.step, "num_steps": self.num_steps, "figures": {k: repr(v) for k, v in values.items()}}
        speed |= {"images_per_second": rate, "seconds_left": left, "peak_memory_bytes": peak_memory_bytes()}
        with contextlib.suppress(Failure):  # a full disk is reported by the writers that need it
            write_json(self.directory / PROGRESS, {**content, **speed})

    def say(self, text: str) -> None:
        """A line in the log and on the terminal."""
        if not self.quiet:
            self._write(f"{self.name}: {text}", always=True)

    def _write(self, line: str, *, always: bool = False) -> None:
        with contextlib.suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / "log.txt").open("a", encoding="utf-8") as log:
                log.write(time.strftime("%Y-%m-%dT%H:%M:%S ") + line + "\n")
        if self._bar is None:
            print(line, flush=True)
        elif always:
            self._bar.write(line)

    def _load(self, now: float) -> Load:
        return Load(self._num_images / self.num_ranks, now - self._started, self._seconds_waited)

    def finish(self) -> None:
        """Takes the bar down. Says how fast images went and what memory that took, if any were loaded."""
        if self._num_images and self._seconds_waited:
            finished_loads.append(self._load(time.monotonic()))
            speed = finished_loads[-1].speed()
            each = f" ({speed['images_per_second_per_rank']:.0f} a rank)" if self.num_ranks > 1 else ""
            self.say(
                f"{self._num_images} images in {finished_loads[-1].seconds:.1f} s: "
                f"{self.num_ranks * speed['images_per_second_per_rank']:.0f} images/s{each}, "
                f"{100 * speed['share_waiting_for_data']:.0f} % of the time waiting for data, at most "
                f"{peak_memory_bytes() / 2**20:.0f} MiB of memory"
            )
        if self._bar is not None:
            self._bar.close()
            self._bar = None
