"""One of several ranks, as a process: FOLDER DEVICE, and in the environment GPUS, JSON with what each rank has of GPUs.

Writes how far it came into FOLDER/rank{RANK}.txt.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from dynexit.dist import start_ranks, stop_ranks
from dynexit.errors import Failure, UserError
from dynexit.gpus import Gpus

TIMEOUT_SECONDS = 8.0


def main(folder: Path, device: str) -> None:
    rank = int(os.environ["RANK"])
    written = folder / f"rank{rank}.txt"
    gpus = Gpus(*json.loads(os.environ["GPUS"])[rank])
    try:
        ranks = start_ranks(device, 1, TIMEOUT_SECONDS, probe=lambda: gpus)
    except UserError as error:
        written.write_text(f"{error.on_all_ranks} {error}")
        return
    with ranks.failing_together():
        if not ranks.is_main:
            time.sleep(1.5 * TIMEOUT_SECONDS)
    gathered = ranks.gather(rank)
    agreed = ranks.broadcast({"from": rank})
    total = torch.tensor([rank])
    ranks.all_reduce([total])
    try:
        with ranks.failing_together():
            if rank == 1:
                raise Failure("rank 1 alone failed")
    except Failure as failure:
        written.write_text(f"{ranks.device} {gathered} {agreed} {total.item()} {failure}")
    stop_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
