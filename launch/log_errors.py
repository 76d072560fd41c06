"""Which of the errors that the ranks of a job printed says why it ended."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def last_error(logs: Sequence[Path]) -> str:
    """Returns the last error that a rank printed, rather than what the others said of its end; '' if none did."""
    found = _errors(path for path in logs if path.suffix == ".err")
    # if its errors had no room on the disk, submitit's own may have
    found = found or _errors(path for path in logs if path.suffix == ".out")
    silent = [line for line in found if "Connection" not in line]
    own = [line for line in silent if "gloo" not in line.lower()]
    return (own or silent or found or [""])[0]


def _errors(logs: Iterable[Path]) -> list[str]:
    """The last error in each of the logs that have one."""
    found = []
    for path in logs:
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in text.splitlines()]  # torch puts it before each
        kinds = r"\S*(Error|Exception|Interrupted|error|Killed)\b|\[Errno \d+\]"
        errors = [line for line in lines if re.match(kinds, line)]
        found += errors[-1:]
    return found
