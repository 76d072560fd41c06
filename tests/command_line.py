"""The program as a user starts it: in a process of its own, in a folder of its own."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "tiny_study.yaml"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
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


def dynexit(folder: Path, *arguments: str | Path, status: int = 0) -> "subprocess.CompletedProcess[str]":
    """A finished `dynexit`; fails, showing what it printed, where its exit status is another."""
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def digests(study_dir: Path) -> dict[str, str]:
    """SHA-256 of everything in a study's folder that must not depend on when it was interrupted."""
    results = (".safetensors", ".csv", "configurations.json", "manifest.json", "metrics.jsonl", "costs.json")
    return {
        str(path.relative_to(study_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(study_dir.rglob("*"))
        if path.name.endswith(results) and "infer" not in path.parts
    }
