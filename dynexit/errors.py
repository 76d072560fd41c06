"""The ways a command can end early. The command line turns them into one sentence and an exit status."""

import contextlib
from collections.abc import Iterator


class Reported(Exception):  # noqa: N818  users read its text alone
    """An error that is reported by its message alone. `on_all_ranks` says that all ranks raised it."""

    on_all_ranks = False


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
