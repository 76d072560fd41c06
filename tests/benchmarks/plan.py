"""Times planning of large sweeps: python tests/benchmarks/plan.py [POINTS]. Validates every point, submits nothing."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
STAGES = ("prepare", "train", "record", "search", "report")


def main(num_points: int) -> None:
    sys.path.insert(0, str(ROOT))
    from dynexit.config_io import load_study
    from launch.arrays import plan_arrays
    from launch.cluster import Limits
    from launch.site import Site
    from launch.slurm import describe_submission

    seeds = list(range(num_points // 100))
    grid = [f"sweep.seed={seeds}", f"sweep.jei_dnn.ce_ic_tradeoff={[i / 10 for i in range(100)]}"]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        study = load_study(ROOT / "tests" / "tiny_study.yaml", [*grid, f"runs_dir={folder}"])
        print(f"{len(study.points)} points read and validated in {time.perf_counter() - begun:.2f} s")
        begun = time.perf_counter()
        arrays = plan_arrays(study, STAGES, Limits(1001, 200), {})
        print(f"planned as {sum(len(array.tasks) for array in arrays)} jobs in {time.perf_counter() - begun:.2f} s")
        begun = time.perf_counter()
        describe_submission(study, STAGES, Site())
        print(f"scripts written in {time.perf_counter() - begun:.2f} s")
        begun = time.perf_counter()
        overrides = [*grid, f"runs_dir={folder}"]
        command = [
            sys.executable,
            "-m",
            "launch",
            "run",
            "tests/tiny_study.yaml",
            *overrides,
            "--on",
            "slurm",
            "--dry-run",
        ]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        print(f"dynexit run --dry-run --on slurm, from start to end: {time.perf_counter() - begun:.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
