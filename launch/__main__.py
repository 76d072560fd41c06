"""The command line: its commands and options, and the exit status."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dynexit
from dynexit.errors import Failure, Interrupted, Reported, UserError, shorten, unmasked_interrupts
from dynexit.study.stages import BENCH, INFER, STAGES
from launch.deploy_commands import add_deploy_commands, add_model_bench
from launch.tasks.worker import leave
from launch.tools import add_command, add_tools

_JOBS = {
    "run": "do all jobs that are missing, in order, up to the report",
    **{stage.name: stage.help for stage in (*STAGES.values(), INFER)},
}
_RUN_CODE = ("retry", "cut", "save", "predict", "export")
"""The other commands that run code which a study or a model folder names, if it is allowed."""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="dynexit", description="Turns a frozen image classifier into a family of early-exit networks."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {dynexit.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _JOBS.items():
        command = _study_command(commands, name, text + ", and what it needs" * (name not in ("run", "prepare")))
        command.add_argument(
            "--on",
            choices=("here", "local", "slurm"),
            default="here",
            help="in this process, as local processes, or as jobs of a SLURM cluster, submitted at once",
        )
        command.add_argument("--site", type=Path, metavar="SITE.yaml", help="the cluster's profile, for --on slurm")
        command.add_argument("--open", action="store_true", help="open the report's page at the end")
        command.add_argument("--dry-run", action="store_true", help="print points, packs, ids and resources only")
        if name == BENCH:
            add_model_bench(command)
    _study_command(commands, "config", "the resolved study: every key with its meaning, unit and default")
    _study_command(commands, "ui", "MLflow's page on the study's results")
    status = _study_command(commands, "status", "state, step, last figures, attempts and log of every point")
    status.add_argument("--watch", action="store_true", help="print it again every 30 s until all is over")
    status.add_argument("--json", action="store_true", help="print it once, as JSON")
    _study_command(commands, "logs", "the end of what the jobs of a point printed", "POINT")
    _study_command(commands, "cancel", "take a study's jobs, or those of some points, out of the queue", "POINT")
    retry = _study_command(commands, "retry", "submit again what failed or is missing, and nothing else")
    retry.add_argument("--site", type=Path, metavar="SITE.yaml", help="default: as it was submitted before")
    text = "operating points of any number of studies, also while some still run, as one table (CSV)"
    aggregate = add_command(commands, "aggregate", text)
    aggregate.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="a study's folder, or runs/")
    where = aggregate.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, metavar="FILE.csv", help="the table; default: a short one on a terminal")
    where.add_argument("--out", type=Path, metavar="FOLDER", help="the table, and one page that compares the studies")
    add_tools(commands)
    add_deploy_commands(commands)
    for name in (*_JOBS, *_RUN_CODE):
        commands.choices[name].add_argument(
            "--allow-code",
            action="append",
            default=[],
            metavar="package.module",
            help="allow the code of this module to run (see backbone.module); may be given several times",
        )
    return parser


def _study_command(commands: Any, name: str, text: str, points: str = "") -> argparse.ArgumentParser:
    command = add_command(commands, name, text)
    command.add_argument("study", type=Path, metavar="STUDY.yaml", help="a study, or the folder in which one was run")
    what = "ids of points (or how they begin), and overrides of the study's keys" if points else "overrides of its keys"
    command.add_argument("words", nargs="*", metavar=f"{points} key.path=value".strip(), help=what)
    return command


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse alone would take no overrides after an option."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and ("words" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if "words" in options:
        options.words += rest
    return options


def _call(options: argparse.Namespace) -> None:
    does_jobs = options.command in _JOBS and not options.dry_run
    if not does_jobs and os.environ.get("RANK", "0") != "0":
        return  # of torchrun's processes one does it
    if "tool" in options:
        options.tool(options)
        return
    from launch.commands import COMMANDS

    COMMANDS[options.command](options)


def _report(error: Reported, lines: Sequence[str]) -> None:
    """Prints what is wrong, unless the first process on this node prints the same."""
    torch = sys.modules.get("torch")
    is_shared = error.on_all_ranks or torch is None or not torch.distributed.is_initialized()
    if is_shared and os.environ.get("LOCAL_RANK", "0") != "0":
        return
    for line in lines:
        print(f"dynexit: {line}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, 1 for a failure, 2 for the user's mistake, 130 when interrupted."""
    try:
        with unmasked_interrupts():
            _call(_parse(arguments))
        return 0
    except UserError as error:
        _report(error, [str(error)])
        return 2
    except Failure as error:
        _report(error, str(error).splitlines())
        return 1
    except (KeyboardInterrupt, Interrupted) as stop:
        print(f"dynexit: {str(stop) or 'interrupted'}; the same command resumes from there", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        text = shorten(str(error)) if error.errno == errno.ENAMETOOLONG else error
        print(f"dynexit: {text}; fix it, then run the same command again", file=sys.stderr)
        return 1


if __name__ == "__main__":
    status = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        leave(status)
    sys.exit(status)
