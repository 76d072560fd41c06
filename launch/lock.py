"""Who works on a study: one launcher at a time, and the processes that it started, which may outlive it for a while."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dynexit.errors import UserError
from dynexit.files import regular

_LOCK, _WORKERS = ".lock", ".workers"
_ENDING_SECONDS = 90.0  # in which processes find out that their launcher has ended, end their step and save
_POLL_SECONDS = 0.5


@contextlib.contextmanager
def hold(study_dir: Path) -> Iterator[None]:
    """Holds the study for this launcher; UserError, naming the holder, where another one has it.

    Where processes of a launcher that was killed still work on it, waits for their end.
    """
    study_dir.mkdir(parents=True, exist_ok=True)
    with _opened(study_dir / _LOCK, "a+") as lock:
        if not any(_locked(lock, fcntl.LOCK_EX, wait) for wait in (0.1, 0.1, 0.0)):  # `status` looks for a moment
            lock.seek(0)
            raise UserError(
                f"{study_dir} is held by {lock.read().strip() or 'another launcher'}; wait for it or stop it"
            )
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()} (`{' '.join(sys.argv[1:3])}`)")
        lock.flush()
        _wait_for_workers(study_dir)
        yield


def is_held(study_dir: Path) -> bool:
    """Whether a launcher works on the study now."""
    try:
        with _opened(study_dir / _LOCK, "r") as lock:
            return not _locked(lock, fcntl.LOCK_SH)
    except (OSError, UserError):
        return False


def _opened(path: Path, mode: str) -> IO[str]:
    """The file opened. Raises UserError where something else has its name: to open a pipe would wait for ever."""
    try:
        regular(path)
    except FileNotFoundError:
        pass  # made by those who write
    except OSError as error:
        raise UserError(f"{path} {error.strerror}; remove it") from None
    return path.open(mode, encoding="utf-8")


def _locked(file: IO[str], kind: int, wait: float = 0.0) -> bool:
    """Whether the lock was got, after `wait` seconds where it was not. A file system without locks gives it to all."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            time.sleep(wait)
            return False
    return True


def _wait_for_workers(study_dir: Path) -> None:
    started, announced = time.monotonic(), False
    with _opened(study_dir / _WORKERS, "a") as workers:
        while not _locked(workers, fcntl.LOCK_EX, _POLL_SECONDS):
            if not announced:
                announced = True
                print(f"{study_dir}: waits for processes of a launcher that was killed to save and end", flush=True)
            if time.monotonic() - started > _ENDING_SECONDS:
                raise UserError(f"processes of a launcher that was killed still work on {study_dir}; end them first")


def work_for(launcher: int, study_dir: Path) -> None:
    """Makes this process one that works for its parent `launcher`: it gets SIGTERM when that has ended."""
    workers = _opened(study_dir / _WORKERS, "a")
    _locked(workers, fcntl.LOCK_SH)

    def watch() -> None:
        with workers:  # held until this process ends
            while os.getppid() == launcher:
                time.sleep(_POLL_SECONDS)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_ENDING_SECONDS)
            os._exit(1)

    threading.Thread(target=watch, name="watch", daemon=True).start()
