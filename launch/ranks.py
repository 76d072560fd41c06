"""`torchrun -m launch` and `accelerate launch -m launch`: this process is one of several that do the study together.

All of them train and record, and prepare where the study says so; the main one alone does the rest. What
it finds missing holds for all.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from dynexit.errors import Failure, UserError
from dynexit.study.grid import Study
from launch.local import run_here
from launch.lock import hold
from launch.plan import check_identity, done_together, missing_jobs, with_finished
from launch.slurm.submissions import check_queue

_POLL_SECONDS = 0.5
# what tells a process that it is one of several
_ANNOUNCEMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def num_ranks() -> int:
    """How many processes do this together, as torchrun and accelerate say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this one does what one process does alone."""
    return os.environ.get("RANK", "0") == "0"


def prepare_alone(study: Study, arguments: Sequence[str]) -> None:
    """The main rank prepares the backbone in a process without ranks; the others wait.

    With several ranks batch normalisation would see another batch than the study's: they prepare together, in
    `run_together`, only where the study says so. Raises UserError or Failure if that process, which prints why, failed.
    """
    if done_together("prepare", study.config.dist):
        return
    if not is_main():
        while missing_jobs(study, "prepare"):
            time.sleep(_POLL_SECONDS)  # whoever started the ranks ends them all if the main one fails
        return
    if not missing_jobs(study, "prepare"):
        return
    alone = {name: value for name, value in os.environ.items() if name not in _ANNOUNCEMENT}
    command = [sys.executable, "-m", "launch", "prepare", *arguments]
    status = subprocess.run(command, env=alone, check=False).returncode
    if status:
        raise (UserError if status == 2 else Failure)(f"`dynexit prepare` failed with exit status {status}; see above")


def run_together(study: Study, stages: Sequence[str]) -> list[str]:
    """Does what is done together, so far as `stages` ask for it, with all ranks; the sentences of the failures."""
    from dynexit.dist import start_ranks, stop_ranks

    dist = study.config.dist
    failures: list[str] = []
    with hold(study.directory) if is_main() else contextlib.nullcontext():
        if is_main():
            check_identity(study)
            check_queue(study)
        ranks = start_ranks(dist.device, dist.num_threads, dist.timeout_seconds)
        for stage in (stage for stage in stages if done_together(stage, dist)):
            failures += run_here(ranks.broadcast(missing_jobs(study, stage, check_bytes=True) if ranks.is_main else []))
            study = ranks.broadcast(with_finished(study, stage))
        stop_ranks()
    return failures if is_main() else []
