"""Ranks of one job as processes of this machine."""

import socket
import subprocess
from collections.abc import Sequence

from tests.command_line import ENVIRONMENT, ROOT


def run_ranks(
    world_size: int, command: Sequence[str], timeout: float = 400, *, may_fail: bool = False, **environment: object
) -> list[int]:
    """Runs `command` once a rank and waits; the exit statuses.

    Fails, showing what it wrote, where one does not succeed, unless it `may_fail`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        announced = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
        own = {**ENVIRONMENT, **{name: str(value) for name, value in {**announced, **where}.items()}}
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, cwd=ROOT, env=own, stderr=pipe, stdout=pipe, text=True))
    try:
        for process in processes:
            out, error = process.communicate(timeout=timeout)
            assert may_fail or process.returncode == 0, f"{out}\n{error}"
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes]
