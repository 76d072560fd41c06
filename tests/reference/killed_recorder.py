"""Records into DIRECTORY while being killed: python killed_recorder.py DIRECTORY SEED KILLS

Children that record are killed (SIGKILL) at random moments, then one is left to end. Prints how many kills hit.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tests.reference.fake_outputs import record_rank


def child(directories: list[Path]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            record_rank(directories)
            status = 0
        finally:
            os._exit(status)
    return pid


def main(directory: Path, seed: int, kills: int) -> None:
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    moments = random.Random(seed)
    warm_up = directory / "duration"
    start = time.perf_counter()
    os.waitpid(child([warm_up / "a", warm_up / "b"]), 0)
    duration = time.perf_counter() - start
    hits = 0
    for _ in range(kills):
        pid = child([directory / "a", directory / "b"])
        time.sleep(duration * moments.random() / 2)
        os.kill(pid, signal.SIGKILL)
        hits += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    _, status = os.waitpid(child([directory / "a", directory / "b"]), 0)
    print(hits, status)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
