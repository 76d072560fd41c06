"""One rank of a recording over gloo, as a process: RUNS_DIR and the study's overrides.

With KILL="RANK SHARDS" in the environment that rank kills itself (SIGKILL) once it has written so many shards, before
the last of them is in a manifest.
"""

import os
import signal
import sys

from dynexit.dist import start_ranks, stop_ranks
from dynexit.record import shard_file, shards
from dynexit.study.read import load_study
from tests.command_line import TINY, run_stage


def main(runs_dir: str, overrides: list[str]) -> None:
    ranks = start_ranks("cpu", 1)
    killed_rank, num_shards = map(int, os.environ.get("KILL", "-1 0").split())
    write_shard, written = shard_file.write_shard, []

    def dies(*arguments):  # type: ignore[no-untyped-def]
        written.append(write_shard(*arguments))
        if len(written) == num_shards:
            os.kill(os.getpid(), signal.SIGKILL)
        return written[-1]

    if ranks.global_rank == killed_rank:
        shards.write_shard = dies
    study = load_study(TINY, [f"runs_dir={runs_dir}", *overrides])
    run_stage("record", study.points)
    stop_ranks()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
