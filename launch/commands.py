"""Commands that follow a study on a cluster: status, logs, cancel, retry; and aggregate, for many studies."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynexit.study.grid import Point, Study
    from launch.slurm.submissions import Submitted

_LOG_LINES = 40


def add_commands(commands: Any) -> None:
    """Adds the commands to the command line."""
    status = _command(commands, "status", "state, step, last figures, attempts and log of every point", _status)
    status.add_argument("--watch", action="store_true", help="print it again every half minute until all is over")
    _command(commands, "logs", "the end of what the jobs of a point printed", _logs, "POINT")
    _command(commands, "cancel", "take a study's jobs, or those of some points, out of the queue", _cancel, "POINT")
    retry = _command(commands, "retry", "submit again what failed or is missing, and nothing else", _retry)
    retry.add_argument("--site", type=Path, metavar="SITE.yaml", help="default: as it was submitted before")
    aggregate = commands.add_parser(
        "aggregate", help="operating points of any number of studies as one table (CSV)", description=_aggregate.__doc__
    )
    aggregate.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a study's folder, or runs/")
    aggregate.add_argument("--output", type=Path, metavar="FILE.csv", help="default: the terminal")
    aggregate.set_defaults(tool=_aggregate)


def _command(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], None], points: str = ""
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.add_argument("study", type=Path, metavar="STUDY.yaml")
    what = "ids of points (or how they begin), and overrides of the study's keys" if points else "overrides"
    command.add_argument("words", nargs="*", metavar=f"{points} key.path=value".strip(), help=what)
    command.set_defaults(tool=run)
    return command


def _study_of(options: argparse.Namespace) -> "tuple[Study, list[Point]]":
    """The study, and the points that were named (all where none was)."""
    from dynexit.errors import UserError
    from dynexit.study.read import load_study

    study = load_study(options.study, [word for word in options.words if "=" in word])
    names = [word for word in options.words if "=" not in word]
    chosen: list[Point] = []
    for name in names:
        found = [point for point in study.points if point.id.startswith(name)]
        if not found:
            known = ", ".join(point.id for point in study.points[:5])
            raise UserError(f"no point's id begins with {name!r}; `dynexit status` shows them ({known}, ...)")
        chosen += found
    return study, chosen if names else list(study.points)


def _status(options: argparse.Namespace) -> None:
    study, _ = _study_of(options)
    from launch.slurm.cluster import QUERY_SECONDS

    while _print_status(study, options.watch):
        time.sleep(QUERY_SECONDS)
        print("\n" + time.strftime("%H:%M:%S"))


def _print_status(study: "Study", watch: bool) -> bool:
    """Whether there is more to watch. Raises UserError if no list knows the study's jobs, and nobody watches."""
    from dynexit.errors import UserError
    from launch.slurm.submissions import QueueView
    from launch.status import OVER, report_state, study_status, table

    jobs = QueueView(study.directory)
    if jobs.unlisted and not watch:
        raise UserError(jobs.unlisted)
    if jobs.unlisted:
        print(f"dynexit: {jobs.unlisted}", flush=True)
        return True
    if jobs.unanswered:
        print(f"dynexit: the queue could not be asked, so it is not known what waits or runs: {jobs.unanswered}")
    if not study.directory.is_dir():
        print(f"dynexit: {study.directory} is not there: nothing of this study was run yet, or not with this folder")
    states = study_status(study, jobs)
    report, is_over = report_state(study, jobs)
    print(table(states, report), flush=True)
    return watch and not (is_over and all(one.state in OVER for one in states))


def _logs(options: argparse.Namespace) -> None:
    from dynexit.errors import UserError
    from launch.slurm.submissions import all_submitted, check_listed

    study, points = _study_of(options)
    check_listed(study.directory)
    printed = False
    ids = {identity for point in points for identity in point.ids.values()}
    newest: dict[str, Submitted] = {}
    for job in all_submitted(study.directory):
        if job.stage == "report" or ids & {identity for _, identity in job.work}:
            newest[job.stage] = job
    for job in newest.values():
        for path in job.logs():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            if lines:
                printed = True
                print("\n".join([f"==> {path}", *lines[-_LOG_LINES:], ""]))
    if not printed:
        raise UserError(
            f"no job of these points has printed anything; their own logs are in {study.directory / 'pack'}"
        )


def _cancel(options: argparse.Namespace) -> None:
    from launch.slurm.submissions import cancel, check_listed, live_jobs

    study, points = _study_of(options)
    check_listed(study.directory)
    named = any("=" not in word for word in options.words)
    ids = {identity for point in points for stage, identity in point.ids.items() if stage != "prepare"}
    live = [job for job, _ in live_jobs(study.directory) if not named or ids & {identity for _, identity in job.work}]
    if not live:
        print("nothing of it is in the queue")
        return
    cancel(live)
    chosen = {point.id for point in points}
    for job in live:
        others = {identity for stage, identity in job.work if stage == "train"} - chosen  # those of points
        with_others = f", and with it {len(others)} other points of its task" if others and job.stage == "train" else ""
        print(f"cancelled {job.stage} {job.job_id}{with_others}")


def _retry(options: argparse.Namespace) -> None:
    from dynexit.study.stages import STAGES
    from launch.lock import hold
    from launch.plan import check_identity
    from launch.slurm.site import load_last_site, load_site
    from launch.slurm.submissions import check_listed, last_site
    from launch.slurm.submit import submit_study

    study, _ = _study_of(options)
    check_listed(study.directory)
    before = last_site(study.directory)
    site = load_site(options.site) if options.site else load_last_site(before, study.directory)
    with hold(study.directory):
        check_identity(study)
        print("\n".join(submit_study(study, tuple(STAGES), site)))


def _aggregate(options: argparse.Namespace) -> None:
    """Operating points of all finished points of any number of studies, also while others still run, as CSV."""
    from dynexit.errors import Failure
    from dynexit.jobs.aggregate import aggregate

    text, left_out = aggregate(options.directories, say=lambda line: print(line, file=sys.stderr))
    if options.output is None:
        print(text, end="")
    else:
        from dynexit.run_dir import write_text

        write_text(options.output, text)
    if left_out:
        raise Failure(f"not in the table, for what is told above: {', '.join(map(str, left_out))}")
