"""What ends the program of a SLURM job before it is through: signals, and SLURM beginning the job elsewhere."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from dynexit.errors import Interrupted
from launch.slurm.notes import Notes

_WATCH_SECONDS = 5


class Terminated(Interrupted):
    """By SIGTERM outside training, which srun sends too when another rank was killed."""


@contextlib.contextmanager
def watched(notes: Notes) -> Iterator[None]:
    """Notices a file system that is lost; ends this process soon after SLURM, which took its node for dead, has begun
    the job on another: two must not write one folder for long, and what is being written is dropped whole.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_WATCH_SECONDS):
            notes.look()
            if notes.is_begun_again():
                print("SLURM has begun this job again elsewhere; this one ends", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGUSR2 (time-out, preemption) and SIGTERM (requeue, cancel) end the work at once; a training saves first.

    Whatever is being written is dropped whole. Training has handlers of its own, which let it end its step and save.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        _ignore()
        kind = Terminated if number == signal.SIGTERM else Interrupted
        raise kind(f"stopped by {signal.Signals(number).name}")

    def _ignore() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        _ignore()
