"""The program in a fork of a process that has imported it: for the fuzzer and the fault campaign."""

import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Ended:
    """A fork that is over."""

    status: int  # negative: the signal that ended it; 124: it hung and was killed; 70: an error that was not handled
    text: str
    seconds: float
    processor_seconds: float
    peak_bytes: int


class Forked:
    """`run`, which returns an exit status, in a fork in `folder` with its output in a file."""

    def __init__(self, folder: Path, output: Path, run: Callable[[], int]) -> None:
        self._output, self._started = output, time.monotonic()
        self._processor_seconds, self._peak_bytes = 0.0, 0
        self.status: int | None = None
        self.process = os.fork()
        if self.process == 0:
            _run(folder, output, run)

    def is_over(self) -> bool:
        if self.status is None:
            process, status, usage = os.wait4(self.process, os.WNOHANG)
            if process:
                self.status = os.waitstatus_to_exitcode(status)
                self._processor_seconds, self._peak_bytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
        return self.status is not None

    def wait(self, seconds: float) -> bool:
        """Whether it is over within that time."""
        deadline = time.monotonic() + seconds
        try:
            while not self.is_over() and time.monotonic() < deadline:
                time.sleep(0.002)
        except (SystemExit, KeyboardInterrupt):
            self.send(signal.SIGKILL)
            os.waitpid(self.process, 0)
            raise
        return self.is_over()

    def send(self, number: int) -> None:
        os.kill(self.process, number)

    def end(self, longest_seconds: float) -> Ended:
        """How it ended; one that hangs is killed."""
        hangs = not self.wait(longest_seconds)
        if hangs:
            self.send(signal.SIGKILL)
            self.wait(longest_seconds)
        text = self._output.read_text(encoding="utf-8", errors="replace")
        status, seconds = 124 if hangs else self.status or 0, time.monotonic() - self._started
        return Ended(status, text, seconds, self._processor_seconds, self._peak_bytes)


def _run(folder: Path, output: Path, run: Callable[[], int]) -> None:
    """What the fork does; never returns."""
    status = 70
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        os.chdir(folder)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = run()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
