"""Records into DIRECTORY while being killed: python killed_recorder.py DIRECTORY SEED KILLS

Each time 1 to 3 ranks (child processes) record what is missing and are killed (SIGKILL) at a random moment; then two
are left to end. Prints how often a kill hit.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from dynexit.record.manifest import Manifest, read_manifests
from dynexit.record.plan import Plan, finish
from tests.reference.fake_outputs import plan, record_rank


def start_ranks(planned: Plan) -> list[int]:
    return [_child(planned, rank) for rank in range(len(planned.shares))]


def _child(planned: Plan, rank: int) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            record_rank(planned, rank)
            status = 0
        finally:
            os._exit(status)
    return pid


def wait(children: list[int]) -> bool:
    """Whether all ended well."""
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    return not any(statuses)


def main(directory: Path, seed: int, kills: int) -> None:
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    moments = random.Random(seed)
    warm_up = directory / "duration"
    start = time.perf_counter()
    wait(start_ranks(plan([warm_up / "a", warm_up / "b"])))
    duration = time.perf_counter() - start
    shutil.rmtree(warm_up)
    hits = 0
    for _ in range(kills):
        children = start_ranks(plan([directory / "a", directory / "b"], moments.choice((1, 2, 3))))
        time.sleep(duration * moments.random() / 2)
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        hits += not wait(children)
    planned = plan([directory / "a", directory / "b"], 2)
    assert wait(start_ranks(planned))
    found = read_manifests(planned.folder)
    assert isinstance(found, Manifest)
    finish(planned, [shard for shard in found.shards if shard not in planned.manifest.shards])
    print(hits)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
