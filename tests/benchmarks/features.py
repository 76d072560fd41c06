"""What training on kept features costs: python tests/benchmarks/features.py [--study STUDY.yaml] [--epochs 15].

The train job of 16 points (2 seeds, 8 tradeoffs of JEI-DNN) on a backbone that is prepared, with fresh and with kept
features, and once more on features that are there. Printed are images that pass through the backbone over the images of
one pass (training and validation), and processor time over that of one bare pass over the same images.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from dynexit.data import load_batches, load_data
from dynexit.jobs.load import load_model, ranks_of
from dynexit.jobs.planning.missing import missing_jobs
from dynexit.models.multi_exit import MultiExit
from dynexit.study.read import load_study
from dynexit.study.stages import stage_of

POINTS = ("seed=[0, 1]", "jei_dnn.ce_ic_tradeoff=[0.01, 0.03, 0.1, 0.3, 0.5, 1, 2, 5]", "train.method=jei_dnn")
QUIET = ("dist.num_threads=1", "dist.log_seconds=1000", "dist.checkpoint_seconds=1000", "exits.head_types=[linear]")


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The sizes of the batches of images that a backbone is run on."""
    sizes: list[int] = []
    start = MultiExit.start

    def counting(model: MultiExit, x: torch.Tensor) -> object:
        sizes.append(len(x))
        return start(model, x)

    MultiExit.start = counting  # type: ignore[method-assign, assignment]
    try:
        yield sizes
    finally:
        MultiExit.start = start  # type: ignore[method-assign]


def main(path: Path, num_epochs: int, with_fresh: bool, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        seconds: dict[str, float] = {}
        passed: dict[str, int] = {}
        prepared = Path()
        for name in (*["fresh"] * with_fresh, "kept", "kept again"):
            features = name.partition(" ")[0]
            given = [f"runs_dir={folder}", f"train.num_epochs={num_epochs}", f"train.features={features}"]
            study = load_study(path, [*given, f"name={name.replace(' ', '_')}", *POINTS, *QUIET, *overrides])
            if not seconds:
                stage_of("prepare").runner()(study.points)
                point, prepared = study.points[0], study.directory / "prepare"
            else:
                study.directory.mkdir()
                (study.directory / "prepare").symlink_to(prepared.resolve())
            with counted() as sizes:
                began = time.process_time()
                (job,) = missing_jobs(study, "train")
                stage_of("train").runner()(job.points)
                seconds[name], passed[name] = time.process_time() - began, sum(sizes)
        data = load_data(point.config.data)
        model, _ = load_model(point, ranks_of(point.config))
        began = time.process_time()
        for split in (data.plain_train, data.validation):
            batches = [range(i, min(i + 256, len(split))) for i in range(0, len(split), 256)]
            for _, images, _ in load_batches(split, batches):
                model.features(images)
        one_pass = time.process_time() - began
    num_images = len(data.plain_train) + len(data.validation)
    print(f"{num_images} images, {len(study.points)} points, {num_epochs} epochs; one bare pass {one_pass:.1f} s")
    for name, taken in seconds.items():
        passes = passed[name] / num_images
        print(f"{name}: {passes:.2f} passes of the backbone, {taken:.1f} s, {taken / one_pass:.2f} passes' time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("configs/digits.yaml"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--no-fresh", action="store_true", help="leave out the training on images")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    main(options.study, options.epochs, not options.no_fresh, options.overrides)
