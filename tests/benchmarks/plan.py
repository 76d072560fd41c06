"""Times planning of large sweeps: python tests/benchmarks/plan.py [POINTS]. Validates every point, submits nothing."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def main(num_points: int) -> None:
    sys.path.insert(0, str(ROOT))
    from dynexit.study.read import load_study
    from dynexit.study.stages import STAGES
    from launch.slurm.arrays import plan_arrays
    from launch.slurm.cluster import Limits
    from launch.slurm.site import Site
    from launch.slurm.submit import describe_submission

    seeds = list(range(num_points // 100))
    grid = [f"sweep.seed={seeds}", f"sweep.jei_dnn.ce_ic_tradeoff={[i / 10 for i in range(100)]}"]
    with tempfile.TemporaryDirectory() as folder:
        with _timed(f"{num_points} points read and validated"):
            study = load_study(ROOT / "tests" / "tiny_study.yaml", [*grid, f"runs_dir={folder}"])
        with _timed("planned"):
            arrays = plan_arrays(study, tuple(STAGES), Limits(1001, 200), {}, {})
        with _timed(f"{sum(len(array.tasks) for array in arrays)} jobs' scripts written"):
            describe_submission(study, tuple(STAGES), Site())
        study_and_grid = ["tests/tiny_study.yaml", *grid, f"runs_dir={folder}"]
        command = [sys.executable, "-m", "launch", "run", *study_and_grid, "--on", "slurm", "--dry-run"]
        imports = [sys.executable, "-c", "import dynexit.jobs.load"]
        pairs = [_side_by_side(imports, command) for _ in range(5)]
        alone, whole = (sorted(seconds) for seconds in zip(*pairs, strict=True))
    print(f"{alone[2]:6.2f} s (median of {alone}): importing torch and timm, in a process")
    print(f"{whole[2]:6.2f} s (median of {whole}): dynexit run --dry-run --on slurm, from start to end, in a process")
    print(f"{whole[2] / alone[2]:6.2f}: the ratio of the two")


def _side_by_side(*commands: list[str]) -> list[float]:
    """The seconds that each command takes, one after the other."""
    seconds = []
    for command in commands:
        begun = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds.append(round(time.perf_counter() - begun, 2))
    return seconds


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    begun, cpu = time.perf_counter(), _cpu_seconds()
    yield
    print(f"{time.perf_counter() - begun:6.2f} s, {_cpu_seconds() - cpu:6.2f} s of CPU: {what}")


def _cpu_seconds() -> float:
    """Of this process and those it waited for; other work on the machine does not count."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
