"""The ways a command can end early. The command line turns them into one sentence and an exit status."""

import contextlib
import errno
import signal
from collections.abc import Iterator

_LONGEST_SHOWN = 120  # characters of a user's name or value in a message


def shorten(text: str) -> str:
    """Returns the text, or its beginning and its length where it is too long for a message."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text):,} characters)"


def counted(count: int, one: str, several: str = "") -> str:
    """Returns the count with its noun: `one`, or `several`, which is `one` with an s if it is not given."""
    return f"{count} {one if count == 1 else several or one + 's'}"


class Reported(Exception):  # noqa: N818  users read its text alone
    """An error that is reported by its message alone. `on_all_ranks` says that all ranks raised it.

    `is_transient` says that another try may succeed; see `is_transient` below.
    """

    on_all_ranks = False
    is_transient = False


class UserError(Reported):
    """The user's mistake: a key, a value, a file that is not there. Exit status 2.

    The message is one sentence that names the key or file, the value, what is allowed and what to do.
    """


class Failure(Reported):
    """Something that went wrong although the request was sound: damaged files, NaN, a full disk. Exit status 1.

    The message is one sentence that names the file or member and the remedy.
    """


class Interrupted(BaseException):
    """A signal asked the job to stop; its state was saved at the step boundary. Exit status 130."""


@contextlib.contextmanager
def unmasked_interrupts() -> Iterator[None]:
    """Raises the interrupt itself where it came while a compiled module was loaded: such make an ImportError of it."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, (KeyboardInterrupt, Interrupted)):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise


_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)  # a network file system that is unavailable


def is_transient(error: BaseException) -> bool:
    """Returns whether another try may succeed: the error, or one that it was raised from, is of an unavailable disk."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "is_transient", False) or (isinstance(cause, OSError) and cause.errno in _TRANSIENT):
            return True
        cause = cause.__cause__
    return False


received_signals: list[int] = []
"""The signals that asked this process to stop, oldest first; what runs looks at it between steps."""


def request_stop(number: int, frame: object) -> None:
    """Handles a signal: notes it, and nothing else."""
    received_signals.append(number)


def end_if_stopped() -> None:
    """Raises Interrupted if a signal asked this process to stop."""
    if received_signals:
        raise Interrupted(f"stopped by {signal.Signals(received_signals[0]).name}")
