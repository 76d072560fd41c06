"""How much faster two processes train and record than one, on two cores: python tests/benchmarks/ranks.py [--rounds 5].

The jobs of a study run as local processes with one and with two ranks in turn, one thread each, over fresh images. A
run's time is the one in its log, from the first batch to the last, so imports and start are no part; the ratio is that
of the fastest runs. The goal is 1.8.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

STUDY = """
data: {name: fashion_mnist, image_size: 32, num_validation: 20000}
backbone:
  name: resnet18
  arguments: {layers: [2, 2, 2, 2], channels: [16, 24, 32, 48], stem_type: deep, stem_width: 6, output_stride: 8}
prepare: {num_epochs: 0}
train: {method: jei_dnn, num_epochs: 2, global_batch_size: 512}
jei_dnn: {max_warm_up_epochs: 0}
dist: {num_threads: 1, log_seconds: 1000, checkpoint_seconds: 1000}
sweep: {jei_dnn.ce_ic_tradeoff: [0.01, 0.1, 0.5, 1]}
"""
STAGES = {"training": "pack/*/log.txt", "recording": "record/*/log.txt"}


def seconds_of(settings: list[str], num_ranks: int) -> dict[str, float]:
    """Runs the study in a folder of its own; the seconds that its stages worked on images."""
    with tempfile.TemporaryDirectory() as folder:
        study = Path(folder) / "ranks.yaml"
        study.write_text(STUDY)
        own = [f"runs_dir={folder}/runs", f"dist.tasks_per_node={num_ranks}", *settings]
        command = [sys.executable, "-m", "launch", "record", str(study), "--on", "local", *own]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = {}
        for stage, pattern in STAGES.items():
            texts = [path.read_text() for path in Path(folder).glob(f"runs/ranks/{pattern}")]
            taken = [float(seconds) for text in texts for seconds in re.findall(r"images in ([\d.]+) s:", text)]
            assert taken, f"{stage} said no time"
            found[stage] = sum(taken)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("settings", nargs="*", help="key=value")
    options = parser.parse_args()
    rounds = [{num: seconds_of(options.settings, num) for num in (1, 2)} for _ in range(options.rounds)]
    for stage in STAGES:
        one, two = (min(times[num][stage] for times in rounds) for num in (1, 2))
        ratios = ", ".join(f"{times[1][stage] / times[2][stage]:.2f}" for times in rounds)
        print(f"{stage}: one process {one:.1f} s, two {two:.1f} s, {one / two:.2f}x (rounds: {ratios})")


if __name__ == "__main__":
    main()
