"""What the commands on studies do: run and its stages, config, ui, status, logs, cancel, retry, aggregate."""

import argparse
import contextlib
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dynexit.errors import Failure, UserError, counted
from dynexit.study.own_code import allowing_code
from dynexit.study.stages import BENCH, INFER, STAGES, stages_until
from launch.api import LoadedStudy, load_study
from launch.deploy_commands import bench_folder

if TYPE_CHECKING:
    from dynexit.study.grid import Point

_LOG_LINES = 40


def _load(options: argparse.Namespace) -> tuple[LoadedStudy, "list[Point]"]:
    """The study, and the points whose ids were named among its overrides; all if none was."""
    study = load_study(options.study, [word for word in options.words if "=" in word])
    names = [word for word in options.words if "=" not in word]
    chosen: list[Point] = []
    for name in names:
        found = [point for point in study.all_points if point.id.startswith(name)]
        if not found:
            known = ", ".join(point.id for point in study.all_points[:5])
            raise UserError(f"no point's id begins with {name!r}; `dynexit status` shows them ({known}, ...)")
        chosen += found
    return study, chosen if names else list(study.all_points)


def _run(options: argparse.Namespace) -> None:
    if options.command == BENCH and bench_folder(options):
        return
    study = load_study(options.study, options.words, allow_code=options.allow_code)
    changes = any(not word.startswith("infer.") for word in options.words)
    if options.command == INFER.name and options.study.is_dir() and changes:
        kept = load_study(options.study, allow_code=options.allow_code)
        if [point.ids for point in study.points] != [point.ids for point in kept.points]:
            raise UserError(
                f"{' '.join(options.words)} makes another study of the run folder {options.study}, and infer leaves it "
                "as it is; give the study's YAML file in place of the folder"
            )
    until = "report" if options.command == "run" else options.command
    if options.open and (until != "report" or options.on == "slurm"):
        raise UserError("--open is for `run` and `report` with --on here or local, which make the page")
    if options.dry_run:
        print(study.dry_run(until, options.on, options.site))
    else:
        study.run(until, options.on, options.site)
        if options.open:
            from dynexit.report.terminal import open_page

            open_page((study.directory / "report" / "report.html").resolve().as_uri())


def _config(options: argparse.Namespace) -> None:
    from dynexit.study.read import resolved_yaml

    print(resolved_yaml(load_study(options.study, options.words)), end="")


def _ui(options: argparse.Namespace) -> None:
    from dynexit.report.tracking import default_tracking_uri, serve

    config = load_study(options.study, options.words).config
    if serve(config.report.tracking_uri or default_tracking_uri(Path(config.runs_dir)), config.name):
        raise Failure("MLflow's server ended; its own messages are above")


def _status(options: argparse.Namespace) -> None:
    from dynexit.report.terminal import show_status
    from launch.slurm.cluster import QUERY_SECONDS
    from launch.status import whole_status

    study, _ = _load(options)
    while True:
        status = whole_status(study)
        points = [dataclasses.asdict(one) for one in status.points]
        if options.json:
            names = ("study", "queue_error", "report")
            print(json.dumps({name: getattr(status, name) for name in names} | {"points": points}, indent=1))
            return
        for point in points:
            del point["speed"]
        notes = [*_other_points(study, points)]
        if status.queue_error:
            notes += [f"the queue could not be asked, so it is not known what waits or runs: {status.queue_error}"]
        show_status(points, status.report, notes, redraw=options.watch)
        if status.is_idle:
            words = shlex.join([str(options.study), *(word for word in options.words if "=" in word)])
            how = "retry" if any(point["attempts"] for point in points) else "run"
            print(f"nothing of this study runs; it resumes with: dynexit {how} {words}", flush=True)
        if status.is_over or not options.watch:
            return
        time.sleep(QUERY_SECONDS)


def _other_points(study: LoadedStudy, points: "list[dict[str, str]]") -> Iterator[str]:
    """A hint if nothing was run in the study's folder, or other points, as with overrides of its keys."""
    folder = study.directory
    if not folder.is_dir():
        yield f"{folder} is not there: nothing of this study was run yet, or not with this folder"
    elif all(one["state"] == "waiting" for one in points):
        with contextlib.suppress(UserError):  # there is no study, or one of another version
            if {one.id for one in load_study(folder).points}.isdisjoint(point["id"] for point in points):
                yield f"{folder} was run with other keys; `dynexit status {folder}` shows its points"


def _logs(options: argparse.Namespace) -> None:
    from dynexit.jobs.finished import pack_folders
    from dynexit.run_dir import RunDir
    from launch.slurm.submissions import newest_jobs

    study, points = _load(options)
    jobs = newest_jobs(study.directory, {identity for point in points for identity in point.ids.values()})
    printed = [path for job in jobs for path in job.logs() if path.stat().st_size]
    newest = max((path.stat().st_mtime for path in printed), default=0.0)
    packs = pack_folders(study.directory)  # what ran in the launcher's own process left their logs alone
    folders = [*(RunDir(point, "prepare").path for point in points), *(packs[p.id] for p in points if p.id in packs)]
    own = [folder / "log.txt" for folder in dict.fromkeys(folders)]
    printed += [path for path in own if path.is_file() and path.stat().st_mtime > newest]
    for path in printed:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join([f"==> {path}", *lines[-_LOG_LINES:], ""]))
    if not printed:
        raise UserError("no job of these points has printed anything")


def _cancel(options: argparse.Namespace) -> None:
    from launch.slurm.submissions import cancel, live_jobs

    study, points = _load(options)
    named = any("=" not in word for word in options.words)
    ids = {identity for point in points for stage, identity in point.ids.items() if stage != "prepare"}
    live = [job for job, _ in live_jobs(study.directory) if not named or ids & {identity for _, identity in job.work}]
    if not live:
        print("no jobs of this study are queued")
        return
    cancel(live)
    chosen = {point.id for point in points}
    for job in live:
        others = {identity for stage, identity in job.work if stage == "train"} - chosen  # those of points
        with_others = (
            f", and with it {counted(len(others), 'other point')} of its task"
            if others and job.stage == "train"
            else ""
        )
        print(f"cancelled {job.stage} {job.job_id}{with_others}")


def _retry(options: argparse.Namespace) -> None:
    from launch.run import submit
    from launch.slurm.site import load_last_site, load_site
    from launch.slurm.submissions import last_site

    study, _ = _load(options)
    before = last_site(study.directory)
    site = load_site(options.site) if options.site else load_last_site(before, study.directory)
    with allowing_code(options.allow_code):
        submit(study, stages_until("report", by_time=study.is_by_time), site)


def _aggregate(options: argparse.Namespace) -> None:
    from dynexit.jobs.aggregate import aggregate

    found = aggregate(options.directories, say=lambda line: print(line, file=sys.stderr))
    if options.out is not None:
        found.write(options.out)
        print(f"page: {options.out / 'report.html'}")
    elif options.output is not None:
        from dynexit.run_dir import write_text

        write_text(options.output, found.csv())
    else:  # a file or another program gets the whole table
        print(found.short() if sys.stdout.isatty() else found.csv().rstrip("\n"))
    if found.damaged:
        raise Failure(f"damaged, as the column reason says: {', '.join(found.damaged)}")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    **dict.fromkeys(("run", *STAGES, INFER.name), _run),
    "config": _config,
    "ui": _ui,
    "status": _status,
    "logs": _logs,
    "cancel": _cancel,
    "retry": _retry,
    "aggregate": _aggregate,
}
"""By name what a command does."""
