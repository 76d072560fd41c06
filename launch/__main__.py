"""The command line: parse, plan, submit, print. No logic, and no torch before a job needs it."""

import argparse
import atexit
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynexit.study.stages import INFER, STAGES, stages_until
from launch.commands import add_commands
from launch.deploy_commands import add_deploy_commands
from launch.tools import add_tools

if TYPE_CHECKING:
    from dynexit.study.grid import Study
    from launch.plan import Job

JOB_HELP = {
    "run": "do all jobs that are missing, in order, up to the report",
    **{stage.name: stage.help for stage in (*STAGES.values(), INFER)},
}


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="dynexit", description="Turns a frozen image classifier into a family of early-exit networks."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in JOB_HELP.items():
        command = _study_command(commands, name, text + ", and what it needs" * (name not in ("run", "prepare")))
        command.add_argument(
            "--on",
            choices=("here", "local", "slurm"),
            default="here",
            help="in this process, as local processes, or as jobs of a SLURM cluster, submitted at once",
        )
        command.add_argument("--site", type=Path, metavar="SITE.yaml", help="the cluster's profile, for --on slurm")
        command.add_argument("--dry-run", action="store_true", help="print points, packs, ids and resources only")
    _study_command(commands, "config", "the resolved study: every key with its meaning, unit and default")
    _study_command(commands, "ui", "MLflow's page on the study's results")
    add_commands(commands)
    add_tools(commands)
    add_deploy_commands(commands)
    return parser


def _study_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    command.add_argument("study", type=Path, metavar="STUDY.yaml")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of the study's keys")
    return command


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for; argparse alone would take no overrides after an option."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    name = next((name for name in ("overrides", "words") if name in options), None)
    if rest and (name is None or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if name is not None:
        setattr(options, name, [*getattr(options, name), *rest])
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status: 0, 1 for a failure, 2 for the user's mistake, 130 when interrupted."""
    from dynexit.errors import Failure, Interrupted, UserError, unmasked_interrupts

    try:
        with unmasked_interrupts():
            return _dispatch(_parse(arguments))
    except UserError as error:
        print(f"dynexit: {error}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"dynexit: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Interrupted) as stop:
        print(f"dynexit: {str(stop) or 'interrupted'}; the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"dynexit: {error}; mend it, then run the same command again", file=sys.stderr)
        return 1


def _dispatch(options: argparse.Namespace) -> int:
    if "tool" in options:
        options.tool(options)
        return 0
    from dynexit.errors import UserError
    from launch.checks import checked_study
    from launch.model_check import misfits_finder

    runs = "on" in options
    if runs and options.site is not None and options.on != "slurm":
        raise UserError(f"--site is for --on slurm, and this is --on {options.on}")
    with misfits_finder(beside=runs and (options.dry_run or options.on != "here")) as misfits:
        study = checked_study(options.study, options.overrides, misfits)
        return _run(study, options, misfits) if runs else _show(study, options)


def _show(study: "Study", options: argparse.Namespace) -> int:
    from dynexit.study.read import resolved_yaml

    if options.command == "ui":
        return _open_ui(study)
    print(resolved_yaml(study), end="")
    return 0


def _run(study: "Study", options: argparse.Namespace, misfits: Callable[..., list[str]]) -> int:
    from launch.checks import check_models
    from launch.lock import hold
    from launch.plan import check_identity
    from launch.ranks import num_ranks
    from launch.slurm.submissions import check_is_there, check_queue

    stages = stages_until("report" if options.command == "run" else options.command)
    if options.dry_run:
        return _print_plan(study, stages, options, misfits)
    if num_ranks() > 1:
        return _run_with_ranks(study, stages, options)
    check_is_there(study.directory)
    check_models(study, dry_run=False, misfits=misfits)
    if options.on == "slurm":
        return _submit(study, stages, options)
    with hold(study.directory):
        check_identity(study)
        check_queue(study)
        return _run_stages(study, stages, options)


def _submit(study: "Study", stages: Sequence[str], options: argparse.Namespace) -> int:
    from dynexit.errors import UserError
    from dynexit.run_dir import write_text
    from dynexit.study.read import resolved_yaml
    from launch.checks import folders_elsewhere
    from launch.lock import hold
    from launch.plan import check_identity
    from launch.slurm.site import load_site
    from launch.slurm.submit import submit_study

    if options.command == "infer":
        raise UserError("infer runs --on here or --on local; run it where the study's folder is")
    site = load_site(options.site)
    _tell(folders_elsewhere(study))
    with hold(study.directory):
        check_identity(study)
        write_text(study.directory / "study.yaml", resolved_yaml(study, with_meanings=False))
        print("\n".join(submit_study(study, stages, site)))
    return 0


def _run_with_ranks(study: "Study", stages: Sequence[str], options: argparse.Namespace) -> int:
    """One of the processes of `torchrun -m launch` or `accelerate launch -m launch`."""
    from dynexit.errors import UserError
    from launch.checks import check_models
    from launch.lock import hold
    from launch.ranks import is_main, prepare_alone, run_together
    from launch.slurm.submissions import check_is_there

    if options.on != "here" or options.command == "infer":
        what = "infer" if options.command == "infer" else f"--on {options.on}"
        raise UserError(f"{what} is for one process, and torchrun or accelerate started several; start it by dynexit")
    if is_main():  # the others are ended with it
        check_is_there(study.directory)
        check_models(study, dry_run=False)
    status = prepare_alone(study, [str(options.study), *options.overrides])
    if status:
        return status
    failures = run_together(study, stages)
    rest = [stage for stage in stages if stage in ("search", "report")]
    if not is_main() or not rest:
        return _told(failures)
    with hold(study.directory):
        return max(_told(failures), _run_stages(study, rest, options))


def _run_stages(study: "Study", stages: Sequence[str], options: argparse.Namespace) -> int:
    from dynexit.jobs.finished import check_budgets
    from dynexit.run_dir import write_text
    from dynexit.study.read import resolved_yaml
    from launch.plan import Job, missing_jobs, report_is_done

    failures: list[str] = []
    write_text(study.directory / "study.yaml", resolved_yaml(study, with_meanings=False))
    did_something = False
    left = study if stages[0] == next(iter(STAGES)) else dataclasses.replace(study, points=_finished(study, "record"))
    for stage in stages:
        if not left.points:
            break
        if stage == "report":
            jobs = [] if report_is_done(study) else [Job("report", study.points)]
        else:
            jobs = missing_jobs(left, stage, check_bytes=True)
        if jobs:
            did_something = True
            failures += _run_jobs(jobs, options.on, study)
        if stage != "report":
            left = dataclasses.replace(left, points=_finished(left, stage))
        if stage == "search":
            check_budgets(left.points)
    if not did_something and options.command != "infer":
        print(f"{study.directory}: nothing to do, all {len(study.points)} points are done")
    if "report" in stages and report_is_done(study):
        _print_result(study)
    if options.command == "infer" and not failures:
        failures += _run_jobs([Job("infer", left.points)], options.on, study)
    return _told(failures)


def _told(failures: Sequence[str]) -> int:
    _tell(failures)
    return 1 if failures else 0


def _tell(sentences: Sequence[str]) -> None:
    for text in sentences:
        print(f"dynexit: {text}", file=sys.stderr)


def _finished(study: "Study", stage: str) -> tuple:  # type: ignore[type-arg]
    from dynexit.jobs.finished import finished_jobs

    return tuple(point for point in study.points if stage in finished_jobs(point))


def _run_jobs(jobs: "Sequence[Job]", where: str, study: "Study") -> list[str]:
    from launch.local import run_here, run_local

    return run_here(jobs) if where == "here" else run_local(jobs, study.directory / "submitted")


def _print_plan(
    study: "Study", stages: Sequence[str], options: argparse.Namespace, misfits: Callable[..., list[str]]
) -> int:
    from launch.checks import check_models
    from launch.plan import describe_plan

    plan = [describe_plan(study, stages, options.on)]
    if options.on == "slurm":
        from launch.slurm.site import load_site
        from launch.slurm.submit import describe_submission

        plan.append(describe_submission(study, stages, load_site(options.site)))
    check_models(study, dry_run=True, misfits=misfits)
    print("\n".join(plan))
    return 0


def _print_result(study: "Study") -> None:
    from dynexit.report.table import read_csv
    from dynexit.report.terminal import short_table

    directory = study.directory / "report"
    print(short_table(read_csv(directory / "operating_points.csv")))
    print(f"report: {directory / 'report.html'}")


def _open_ui(study: "Study") -> int:
    config = study.config
    uri = config.report.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    uri = uri or f"sqlite:///{(Path(config.runs_dir) / 'mlflow.db').resolve()}"
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    os.execv(command[0], command)


if __name__ == "__main__":
    status = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # threads of a process group that was left may abort an interpreter
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
