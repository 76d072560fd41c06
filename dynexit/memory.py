"""Memory of this process: a lack of it as an error message, and the most that was in use."""

import contextlib
import resource
import sys
from collections.abc import Iterator

from dynexit.errors import Failure


@contextlib.contextmanager
def naming_memory(num_points: int, batch_key: str) -> Iterator[None]:
    """Turns a lack of memory into a Failure that names what to lower; another try would meet it again."""
    try:
        yield
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        # torch.OutOfMemoryError by its name: a search needs no torch
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in reason:
            raise
        in_pack, pack = "", ""
        if num_points > 1:
            in_pack = f" with {num_points} points in one pack"
            pack = f"dist.members_per_pack below {num_points}, or "
        raise Failure(f"out of memory{in_pack} ({reason}); set {pack}{batch_key} lower") from error


def peak_memory_bytes() -> int:
    """Returns the most bytes that tensors took of this rank's GPU; without a GPU those that the process had in RAM."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return max(int(torch.cuda.max_memory_allocated(i)) for i in range(torch.cuda.device_count()))
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
