"""The program as a user starts it: in a process of its own, in a folder of its own."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from dynexit.jobs.planning.missing import missing_jobs
from dynexit.provenance import run_stage as run_stage
from dynexit.study.grid import Study

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny_study.yaml"
os.environ["PYTHONPATH"] = str(ROOT)
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "error::DeprecationWarning:dynexit",
}
for name in ("MLFLOW_TRACKING_URI", "PYTHONDONTWRITEBYTECODE"):
    ENVIRONMENT.pop(name, None)


def start(folder: Path, *arguments: str | Path) -> "subprocess.Popen[str]":
    """A running `dynexit` with its output in pipes."""
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, stdout=pipe, stderr=pipe)


# These processes come from one that has imported everything, which saves the greater part of a short command.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["launch.__main__", "dynexit.jobs.prepare", "dynexit.jobs.train", "dynexit.jobs.record"])


def run_in_fork(folder: Path, arguments: Sequence[str], environment: dict[str, str], printed: Path) -> None:
    """What a process of the server does: one command, its output into files."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    warnings.filterwarnings("error", category=DeprecationWarning, module="dynexit")
    from launch.__main__ import main

    sys.exit(main(arguments))


def dynexit(folder: Path, *arguments: str | Path, status: int = 0) -> "subprocess.CompletedProcess[str]":
    """A finished `dynexit`; fails, showing what it printed, where its exit status is another."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as printed:
        process = SERVER.Process(target=run_in_fork, args=(folder, words, ENVIRONMENT, Path(printed)))
        process.start()
        process.join(600)
        process.kill()
        out, err = ((Path(printed) / name).read_text() for name in ("out", "err"))
    assert process.exitcode == status, f"exit status {process.exitcode}\n{out}\n{err}"
    return subprocess.CompletedProcess(words, status, out, err)


def do_all_jobs(study: Study) -> None:
    """Does the missing jobs of all stages in this process, and the report."""
    study.directory.mkdir(parents=True, exist_ok=True)
    (study.directory / "study.yaml").write_text("")
    for stage in ("prepare", "train", "record", "search"):
        for job in missing_jobs(study, stage):
            run_stage(stage, job.points)
    run_stage("report", study.points)


def digests(study_dir: Path) -> dict[str, str]:
    """SHA-256 of everything in a study's folder that must not depend on when it was interrupted.

    Of a record: of all that reading it gives, since its shards depend on who was recorded together.
    """
    from tests.reference.fake_outputs import contents

    results = (".safetensors", ".csv", "configurations.json", "manifest.json", "metrics.jsonl", "costs.json")
    found = {}
    for path in sorted(study_dir.rglob("*")):
        folders = path.relative_to(study_dir).parts[:-1]
        moved_aside = any("." in name for name in folders)
        if path.name.endswith(results) and not moved_aside and not {"infer", "shards"} & set(folders):
            read = contents(path.parent) if path.name == "manifest.json" else {"": path.read_bytes()}
            found[str(path.relative_to(study_dir))] = hashlib.sha256(b"".join(read.values())).hexdigest()
    return found
