"""Running a study: the jobs that are missing, in order, here, as local processes, or on a SLURM cluster."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dynexit.errors import UserError, counted
from dynexit.jobs.finished import finished_jobs, report_is_done, unattained_budgets
from dynexit.jobs.planning.checks import check_identity, check_models, folders_elsewhere
from dynexit.jobs.planning.description import describe_plan
from dynexit.jobs.planning.images import changed_images
from dynexit.jobs.planning.missing import Job, done_together, missing_jobs
from dynexit.run_dir import STUDY, write_text
from dynexit.study.grid import Point, Study
from dynexit.study.outcomes import InferSettings
from dynexit.study.read import load_study, resolved_yaml
from dynexit.study.stages import INFER, STAGES, stages_until
from launch.local import run_here, run_local
from launch.lock import hold
from launch.slurm.site import Site, load_site
from launch.slurm.submissions import check_queue
from launch.tasks.worker import ONE_RANK

if TYPE_CHECKING:
    from dynexit.dist import Ranks

PLACES = ("here", "local", "slurm")


def run_study(study: Study, until: str, on: str, site: Path | None) -> list[str]:
    """Does the missing jobs up to the stage `until`. Returns the messages of those that failed.

    `on` is one of PLACES; slurm submits the jobs and returns. Raises UserError for a mistake of the request, the study
    or its models.
    """
    stages, profile = _checked_request(study, until, on, site)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _run_with_ranks(study, until, on)
    check_models(study, dry_run=False, data_is_here=profile is None)
    if profile is not None:
        submit(study, stages, profile)
        return []
    with _hold_idle(study):
        return _run_stages(study, stages, until, on, cast("Ranks", ONE_RANK))


def dry_run(study: Study, until: str, on: str, site: Path | None) -> str:
    """Returns points, packs, ids and resources of what would be done, as text. Raises UserError as `run_study` does."""
    stages, profile = _checked_request(study, until, on, site)
    plan = [describe_plan(study, stages, on)]
    if profile is not None:
        from launch.slurm.submit import describe_submission

        plan.append(describe_submission(study, stages, profile))
    check_models(study, dry_run=True)
    return "\n".join(plan)


def _checked_request(study: Study, until: str, on: str, site: Path | None) -> tuple[tuple[str, ...], Site | None]:
    """The stages asked for, and the cluster's profile with `on` slurm."""
    for name, value, allowed in (("until", until, (*STAGES, INFER.name)), ("on", on, PLACES)):
        if value not in allowed:
            raise UserError(f"{name} is {value!r}, allowed are {', '.join(allowed)}; name one of them")
    if on != "slurm" and site is not None:
        raise UserError(f"--site is for --on slurm, and this is --on {on}")
    if on == "slurm" and until == INFER.name:
        raise UserError("infer runs --on here or --on local; run it where the study's folder is")
    return stages_until(until, by_time=study.is_by_time), load_site(site) if on == "slurm" else None


def submit(study: Study, stages: Sequence[str], site: Site) -> None:
    """Submits the missing jobs of these stages, and prints a line for each array."""
    from launch.slurm.submit import submit_study

    for text in folders_elsewhere(study):
        print(f"dynexit: {text}", file=sys.stderr)
    with hold(study.directory):
        check_identity(study)
        write_text(study.directory / STUDY, resolved_yaml(study, with_meanings=False))
        print("\n".join(submit_study(study, stages, site)))


@contextlib.contextmanager
def _hold_idle(study: Study) -> Iterator[None]:
    """Holds a study of which no jobs are queued, without what killed writers left in it.

    Raises UserError if there are jobs, or it is held or of other settings.
    """
    with hold(study.directory):
        check_identity(study)
        check_queue(study)
        for left in study.directory.rglob(".*.tmp"):
            if left.is_file():
                left.unlink()
        yield


def _run_with_ranks(study: Study, until: str, on: str) -> list[str]:
    """One of the processes of `torchrun -m launch` or `accelerate launch -m launch`.

    All of them train and record, and prepare if the study asks for that; the main one alone does the rest.
    """
    if on != "here" or until == INFER.name:
        what = INFER.name if until == INFER.name else f"--on {on}"
        raise UserError(f"{what} is for one process, and torchrun or accelerate started several; start it by dynexit")
    from dynexit.dist import start_ranks, stop_ranks

    dist, is_main = study.config.dist, os.environ.get("RANK", "0") == "0"
    if is_main:  # the others are ended with it
        check_models(study, dry_run=False)
    with _hold_idle(study) if is_main else contextlib.nullcontext():
        ranks = start_ranks(dist.device, dist.num_threads, dist.timeout_seconds)
        failures = _run_stages(study, stages_until(until, by_time=study.is_by_time), until, on, ranks)
        stop_ranks()
    return failures if is_main else []


def _run_stages(study: Study, stages: Sequence[str], until: str, on: str, ranks: "Ranks") -> list[str]:
    """Does the missing jobs of each stage; what the main rank finds missing holds for all."""
    failures: list[str] = []
    if ranks.is_main:
        _write_study(study, until)
    did_something = False
    left = study
    for stage in stages:
        if not left.points:
            break
        jobs = ranks.broadcast(_missing(left, study, stage) if ranks.is_main else [])
        failed = _run_jobs(jobs, on, study, ranks) if jobs else []
        did_something = did_something or bool(jobs)
        failures += failed
        if stage != "report":
            everyone = left.all_points
            kept = ranks.broadcast([_has(point, stage) for point in everyone] if ranks.is_main else [])
            left = left.only(kept)
            lost = [point.label for point, is_kept in zip(everyone, kept, strict=True) if not is_kept]
            if lost and not failed and ranks.is_main:
                points = counted(len(lost), "point has", "points have")
                failures.append(f"{stage}: {points} no results, although no job failed; first: {lost[0]}")
    if ranks.is_main and not did_something and until != INFER.name:
        done = counted(len(study.points), "point is", "points are")
        print(f"{study.directory}: nothing to do, {'all ' * (len(study.points) > 1)}{done} done")
        if mistake := changed_images(left.all_points):
            print(f"dynexit: warning: {mistake}", file=sys.stderr)
    if ranks.is_main and "report" in stages and until != INFER.name and report_is_done(study.points):
        from dynexit.report.terminal import result

        print(result(study.directory / "report"))
    if until == INFER.name and not failures:
        return _run_jobs([Job(INFER.name, left.points)], on, study, ranks)
    missed = unattained_budgets(left.points) if ranks.is_main and "search" in stages else []
    if missed and not failures:
        raise UserError("; ".join(missed))
    return [*failures, *missed]


def _write_study(study: Study, until: str) -> None:
    """Writes the resolved study into its folder; `infer` leaves its own section, since budgets hold for one command."""
    path = study.directory / STUDY
    if until == INFER.name:
        kept = InferSettings()
        with contextlib.suppress(UserError):  # it is not there yet, or of another version
            kept = load_study(path).config.infer
        study = dataclasses.replace(study, config=study.config.model_copy(update={"infer": kept}))
    write_text(path, resolved_yaml(study, with_meanings=False))


def _has(point: Point, stage: str) -> bool:
    """Whether the point's work of the stage is done, or it has none."""
    return stage not in point.stages or stage in finished_jobs(point)


def _missing(left: Study, study: Study, stage: str) -> list[Job]:
    if stage == "report":
        return [] if report_is_done(study.points) else [Job("report", study.points)]
    return missing_jobs(left, stage, check_bytes=True)


def _run_jobs(jobs: Sequence[Job], on: str, study: Study, ranks: "Ranks") -> list[str]:
    is_for_all = done_together(jobs[0].stage, study.config.dist)
    if not (ranks.is_main or is_for_all):
        return []
    if ranks.world_size > 1 and jobs[0].stage == "prepare" and not is_for_all:
        on = "local"  # a process without ranks: with several, batch normalisation would see another batch
    return run_here(jobs) if on == "here" else run_local(study, jobs)
