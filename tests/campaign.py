"""Fault campaign: python tests/campaign.py --faults 200 --seed 0. Real runs, disturbed, must end with the same bits.

Each run of a small study gets several faults at random moments, one after the other: kills, signals, truncated files, a
full disk, a slow disk. After each, the remedy that the program prints is applied and the same command given again. At
the end weights, records, configurations and the table are compared with those of a run that nothing disturbed. Exit
status 1 if anything was lost. Needs root (the runs are on a tmpfs of their own).

The program is imported once and every run is a fork of it, so that a start costs nothing; what is disturbed is the same
code, from the parsing of the command line on.
"""

import argparse
import collections
import contextlib
import mmap
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}

from tests.command_line import digests  # noqa: E402  the path is set above
from tests.forked import Ended, Forked  # noqa: E402

STUDY = ("sweep.seed=[0]", "jei_dnn.ce_ic_tradeoff=[0.1, 5]", "report.mlflow=false")
# of every other run: both points in one pack, or a pack of its own for each, and then heads are truncated too, as the
# bits of a point that is trained again alone are those it had
PACK_SIZES = (2, 1)
SHORT = ("prepare.num_epochs=1", "train.num_epochs=3", "train.global_batch_size=150", "jei_dnn.max_warm_up_epochs=1")
LONGEST_SECONDS = 300.0
MOST_TRIES = 12
SLOW_SECONDS = 0.1  # of every fsync while the disk is slow
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Program(Forked):
    """One `dynexit run` in `folder`; `slow` is shared with it: seconds that each fsync takes longer."""

    def __init__(self, folder: Path, output: Path, slow: mmap.mmap, pack_size: int) -> None:
        slow[:8] = struct.pack("d", 0.0)
        super().__init__(folder, output, lambda: _run_study(slow, pack_size))


def _run_study(slow: mmap.mmap, pack_size: int) -> int:
    really = os.fsync

    def fsync(file: int) -> None:
        time.sleep(struct.unpack("d", slow[:8])[0])
        really(file)

    os.fsync = fsync  # type: ignore[assignment]
    from launch.__main__ import main

    return main(["run", str(ROOT / "tests" / "tiny_study.yaml"), *STUDY, *SHORT, f"dist.members_per_pack={pack_size}"])


class DisturbedRun:
    """A run of the study that gets `num_faults` faults, and what came of it."""

    def __init__(self, folder: Path, output: Path, chance: random.Random, seconds: float, pack_size: int) -> None:
        self.folder, self.output, self.chance, self.seconds = folder, output, chance, seconds
        self.pack_size = pack_size
        self.study = folder / "runs" / "tiny_study"
        self.slow = mmap.mmap(-1, 8)
        self.faults: list[str] = []
        self.remedies: list[str] = []
        self.complaint = ""

    def disturb(self, num_faults: int) -> None:
        """Faults one after the other, then the command again until it comes through."""
        for _ in range(MOST_TRIES * num_faults):
            if len(self.faults) >= num_faults or self.complaint:
                break
            program = self._begin()
            part = self.chance.choice((0.1, 0.3, 1))  # the more is done, the less of a run is left
            program.wait(self.chance.uniform(0, part * self.seconds))
            fault = self.chance.choice((self._kill, self._signal, self._truncate, self._fill, self._slow_down))
            fault(program)
        for _ in range(MOST_TRIES):
            ended = self._begin().end(LONGEST_SECONDS)
            if ended.status == 0 or self.complaint:
                return
            self._remedy(ended)
        self.complaint = self.complaint or f"{MOST_TRIES} tries were not enough; the last said: {ended.text[-500:]}"

    def _begin(self) -> Program:
        return Program(self.folder, self.output, self.slow, self.pack_size)

    def _kill(self, program: Program) -> None:
        if not program.is_over():
            self.faults.append("kill")
            program.send(signal.SIGKILL)
        self._after(program, -signal.SIGKILL)

    def _signal(self, program: Program) -> None:
        number = self.chance.choice(SIGNALS)
        if not program.is_over():
            self.faults.append(number.name)
            program.send(number)
        self._after(program, 130, -number)

    def _truncate(self, program: Program) -> None:
        self._kill(program)
        kept = self.study / "train" if self.pack_size > 1 else None
        files = [path for path in self.study.rglob("*") if path.is_file() and path.stat().st_size]
        files = [path for path in files if kept not in path.parents]
        if files:
            path = self.chance.choice(sorted(files))
            os.truncate(path, self.chance.randrange(path.stat().st_size))
            self.faults.append(f"truncated {path.relative_to(self.study)}")

    def _fill(self, program: Program) -> None:
        if program.is_over():
            self._after(program)
            return
        self.faults.append("full disk")
        filler = self.folder / "filler"
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
            ended = program.end(LONGEST_SECONDS)
        finally:
            filler.unlink(missing_ok=True)  # the remedy: make room, then run again
        if ended.status != 1 or "No space left on device" not in ended.text or "Traceback" in ended.text:
            self._after(program, 0)

    def _slow_down(self, program: Program) -> None:
        """From now on every fsync takes longer; then a kill, which so is likely to come during a save."""
        if not program.is_over():
            self.faults.append("slow disk")
            self.slow[:8] = struct.pack("d", SLOW_SECONDS)
            program.wait(self.chance.uniform(0, 20 * SLOW_SECONDS))
        self._kill(program)

    def _after(self, program: Program, *expected: int) -> None:
        ended = program.end(LONGEST_SECONDS)
        if ended.status in (0, *expected):
            return
        self._remedy(ended)

    def _remedy(self, ended: Ended) -> None:
        """Does what the program says; what it says must be a sentence."""
        found = re.findall(r"`(mv [^`]+)`", ended.text)
        if ended.status == 1 and found:
            done = subprocess.run(found[-1], shell=True, cwd=self.folder, capture_output=True, text=True, check=False)
            self.remedies.append(found[-1])
            if done.returncode:
                self.complaint = f"the remedy `{found[-1]}` failed: {done.stderr}"
        elif ended.status not in (0, 130) or "Traceback" in ended.text:
            self.complaint = f"exit status {ended.status} and no remedy: {ended.text[-800:]}"

    def losses(self, expected: dict[str, str]) -> list[str]:
        """What is not as it should be."""
        if self.complaint:
            return [self.complaint]
        found = results(self.study)
        return [name for name in expected | found if expected.get(name) != found.get(name)]


def results(study: Path) -> dict[str, str]:
    """Digests of what must be the same; what was moved aside does not count."""
    return {name: value for name, value in digests(study).items() if ".damaged" not in name and ".stale" not in name}


@contextlib.contextmanager
def small_disk(megabytes: int) -> Iterator[Path]:
    """A tmpfs of its own."""
    folder = Path(tempfile.mkdtemp(prefix="campaign"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def campaign(num_faults: int, seed: int, faults_per_run: int) -> int:
    """Prints what was done and what was lost; the exit status."""
    # the forks find them there
    import dynexit.jobs.prepare
    import dynexit.jobs.record
    import dynexit.jobs.train  # noqa: F401
    import launch.__main__
    import launch.local  # noqa: F401

    counts: collections.Counter[str] = collections.Counter()
    num_runs = num_same = num_remedies = 0
    losses: list[str] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as logs:
        output = Path(logs) / "output"
        expected = {}
        for size in PACK_SIZES:
            with small_disk(96) as folder:
                ended = Program(folder, output, mmap.mmap(-1, 8), size).end(LONGEST_SECONDS)
                if ended.status:
                    print(f"the undisturbed run failed: {ended.text}")
                    return 1
                expected[size] = results(folder / "runs" / "tiny_study")
            print(
                f"undisturbed, packs of {size}: {ended.seconds:.1f} s, {len(expected[size])} files to compare",
                flush=True,
            )
        while sum(counts.values()) < num_faults:
            with small_disk(96) as folder:
                size = PACK_SIZES[num_runs % len(PACK_SIZES)]
                run = DisturbedRun(folder, output, random.Random(f"{seed} {num_runs}"), ended.seconds, size)
                run.disturb(min(faults_per_run, num_faults - sum(counts.values())))
                lost = run.losses(expected[size])
            num_runs, num_same, num_remedies = num_runs + 1, num_same + (not lost), num_remedies + len(run.remedies)
            counts.update(fault.split()[0] for fault in run.faults)
            losses += [f"run {num_runs - 1}: {text}" for text in lost]
            said = f"; {len(run.remedies)} remedies" if run.remedies else ""
            print(f"run {num_runs - 1}: {', '.join(run.faults)}{said}: {'LOST' if lost else 'same bits'}", flush=True)
            for text in lost:
                print(f"    {text}", flush=True)
    each = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    print(f"{sum(counts.values())} faults injected ({each}) into {num_runs} runs, {num_remedies} remedies applied")
    print(f"{num_same} of {num_runs} runs ended with the bits of the undisturbed run; lost: {len(losses)}")
    print(f"{time.monotonic() - begun:.0f} s")
    return 1 if losses else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200, metavar="N", help="how many to inject")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the kinds and moments")
    parser.add_argument("--faults-per-run", type=int, default=4, metavar="K")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # not without taking the disk down
    sys.exit(campaign(options.faults, options.seed, options.faults_per_run))
