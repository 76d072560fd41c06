"""`torchrun -m launch` and `accelerate launch -m launch`: this process is one of several that do the study together.

All of them train and record, and prepare if the study asks for that; the main one alone does the rest. What it finds
missing holds for all.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence

from dynexit.errors import Failure
from dynexit.jobs.finished import finished_jobs
from dynexit.study.grid import Study
from launch.local import run_here, run_local
from launch.lock import hold
from launch.plan import check_identity, done_together, missing_jobs
from launch.slurm.submissions import check_queue

_POLL_SECONDS = 0.5


def num_ranks() -> int:
    """How many processes do this together, as torchrun and accelerate announce it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this one does what one process does alone."""
    return os.environ.get("RANK", "0") == "0"


def prepare_alone(study: Study) -> None:
    """The main rank prepares the backbones in processes without ranks; the others wait.

    With several ranks batch normalisation would see another batch than the study's: they prepare together, in
    `run_together`, only if the study asks for that. Raises UserError or Failure if a process failed.
    """
    if done_together("prepare", study.config.dist):
        return
    while not is_main() and missing_jobs(study, "prepare"):
        time.sleep(_POLL_SECONDS)  # whoever started the ranks ends them all if the main one fails
    if not is_main() or not (jobs := missing_jobs(study, "prepare")):
        return
    with hold_idle(study):
        failures = run_local(study, jobs)
    if failures:
        raise Failure("\n".join(failures))


@contextlib.contextmanager
def hold_idle(study: Study) -> Iterator[None]:
    """Holds a study of which no jobs are queued. Raises UserError if there are, or it is held or of other settings."""
    with hold(study.directory):
        check_identity(study)
        check_queue(study)
        yield


def run_together(study: Study, stages: Sequence[str]) -> list[str]:
    """Does what is done together, so far as `stages` ask for it, with all ranks; the messages of the failures."""
    from dynexit.dist import start_ranks, stop_ranks

    dist = study.config.dist
    failures: list[str] = []
    with hold_idle(study) if is_main() else contextlib.nullcontext():
        ranks = start_ranks(dist.device, dist.num_threads, dist.timeout_seconds)
        for stage in (stage for stage in stages if done_together(stage, dist)):
            failures += run_here(ranks.broadcast(missing_jobs(study, stage, check_bytes=True) if ranks.is_main else []))
            points = ranks.broadcast([p for p in study.points if stage in finished_jobs(p)])
            study = dataclasses.replace(study, points=tuple(points))
        stop_ranks()
    return failures if is_main() else []
