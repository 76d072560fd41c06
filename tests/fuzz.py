"""Fuzzing: python tests/fuzz.py --trials 200 --seed 0. One damaged input a trial must end in one error message.

Damages studies, overrides, site profiles, the files of a small finished run and of a saved model, records, weights and
images, gives a command that reads them, and counts the faults by cause: a traceback, an exit status other than 0, 1
and 2, more than 30 s or 2 GB, a write outside the folder, a process started, code executed, another result than the
undamaged one's. Exit status 1 if there was a fault.

The program is imported once and every trial is a fork of it.
"""

import argparse
import collections
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}

from tests.forked import Ended, Forked  # noqa: E402  the path is set above

TINY = ROOT / "tests" / "tiny_study.yaml"
SHORT = ("sweep.seed=[0]", "jei_dnn.ce_ic_tradeoff=[0.1, 5]", "prepare.num_epochs=1", "train.num_epochs=3",
         "train.global_batch_size=150", "jei_dnn.max_warm_up_epochs=1", "report.mlflow=false")  # fmt: skip
STUDY = ("runs/tiny_study",)
LONGEST_SECONDS, MOST_BYTES = 30, 2 << 30  # of processor time; four times that long on the clock is a hang
MARK = "executed"  # a file that exists once foreign code ran
# what a value of JSON or YAML is replaced by
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 1e308, float("nan"), "", "x" * 5000, "../../x", [], {}, [[]], "é\0"),
)
NESTED = "nested"  # becomes a list in a list, 100,000 levels deep
STRANGE_TEXT = (
    *("null", "true", "-1", "1e999", ".nan", "''", "[]", "{}", "&a [*a]", "!!python/object:os.system x", "'\\0'"),
    *("9" * 400, "[" * 3000, "2026-01-01", "0x1F", "~", "|", "*a", "x: y", "\t"),
)


class Code:
    """Pickled, it creates the file MARK in whatever process unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(MARK),))


def damage_bytes(path: Path, chance: random.Random) -> str:
    """Truncates the file, changes or removes bytes, or puts something else in its place."""
    content = bytearray(path.read_bytes())
    kind = chance.choice(("truncate", "flip", "flip", "insert", "empty", "zeros", "folder", "fifo", "link", "pickle"))
    place = chance.randrange(len(content) or 1)
    if kind in ("folder", "fifo", "link", "pickle"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(path.name)
        else:
            path.write_bytes(pickle.dumps(Code()))
        return kind
    if kind == "truncate":
        content = content[:place]
    elif kind == "flip" and content:
        content[place] ^= 1 << chance.randrange(8)
    elif kind == "insert":
        content[place:place] = chance.randbytes(chance.choice((1, 8, 4096)))
    else:
        content = bytearray(len(content) if kind == "zeros" else 0)
    path.write_bytes(content)
    return f"{kind} at {place}"


def damage_json(path: Path, chance: random.Random) -> str:
    """Removes or replaces one value at a random place of the JSON, or of one line of JSON lines."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    number = chance.randrange(len(lines) or 1)
    content = json.loads(lines[number])
    place, at = [], content
    while isinstance(at, dict | list) and at and (not place or chance.random() < 0.75):
        key = chance.choice(list(at)) if isinstance(at, dict) else chance.randrange(len(at))
        place.append(key)
        at = at[key]
    if not place:
        content = chance.choice(STRANGE)
    else:
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        kind = chance.random()
        if kind < 0.3:
            del holder[place[-1]]
        elif kind < 0.35:
            holder[place[-1]] = NESTED
        else:
            holder[place[-1]] = chance.choice(STRANGE)
    lines[number] = json.dumps(content).replace(json.dumps(NESTED), "[" * 100_000 + "]" * 100_000)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{place} in line {number}"


def damage_text(path: Path, chance: random.Random) -> str:
    """Replaces one value of YAML, misspells a key, or repeats, removes or indents a line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    number = chance.choice([i for i, line in enumerate(lines) if ":" in line])
    kind = chance.choice(("value", "value", "value", "misspelt", "repeated", "removed", "indented"))
    key, _, value = lines[number].partition(":")
    if kind == "value":
        lines[number] = f"{key}: {chance.choice(STRANGE_TEXT)}"
    elif kind == "misspelt":
        lines[number] = f"{key}x:{value}"
    elif kind == "repeated":
        lines.insert(number, lines[number])
    elif kind == "removed":
        del lines[number]
    else:
        lines[number] = " " * chance.randrange(1, 5) + lines[number]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{kind}: {lines[min(number, len(lines) - 1)][:60]!r}"


def damage_file(path: Path, chance: random.Random) -> str:
    """Damages a file by its kind: the structure of text half of the times, else its bytes."""
    if chance.random() < 0.5:
        if path.suffix in (".json", ".jsonl") or path.name == "DONE":
            return damage_json(path, chance)
        if path.suffix == ".yaml":
            return damage_text(path, chance)
    return damage_bytes(path, chance)


@dataclass(frozen=True)
class Target:
    """A kind of input: the files that are damaged, by patterns, and the commands that read them."""

    patterns: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]


RECORDS = "train.npz", "val.npz", "macs.json"
SEARCH_RECORDS = ("search-records", "--train", RECORDS[0], "--val", RECORDS[1], "--macs", RECORDS[2], "--out", "o")
SEARCH_RECORDS += ("--accuracy-weights", "0.5:1:0.1")
TARGETS = {
    "run folder": Target(
        ("runs/tiny_study/**/*",),
        (
            ("status", *STUDY),
            ("report", *STUDY),
            ("infer", *STUDY),
            ("run", *STUDY),
            ("logs", *STUDY, "POINT"),
            ("aggregate", "runs", "--output", "all.csv"),
            ("save", *STUDY, "saved"),
            ("config", *STUDY),
        ),
    ),
    "model folder": Target(("model/*",), (("predict", "model", "images", "--out", "predictions.csv"),)),
    "study": Target(("tiny_study.yaml",), (("run", "tiny_study.yaml", "--dry-run"), ("config", "tiny_study.yaml"))),
    "site": Target(("site.yaml",), (("run", "tiny_study.yaml", "--on", "slurm", "--site", "site.yaml", "--dry-run"),)),
    "records": Target(RECORDS, (SEARCH_RECORDS,)),
    "images": Target(
        ("images/**/*.png",),
        (
            (
                "prepare",
                "tiny_study.yaml",
                "data.name=image_folder",
                "data.dir=images",
                "prepare.num_epochs=0",
                "data.num_validation=4",
                "data.num_test=4",
                "backbone.reset_classifier=true",
            ),
        ),
    ),
    "weights": Target(
        ("weights.*",),
        tuple(
            ("prepare", "tiny_study.yaml", f"backbone.weights={name}", "prepare.num_epochs=0", *SHORT)
            for name in ("weights.pth", "weights.safetensors")
        ),
    ),
    "overrides": Target((), (("run", "tiny_study.yaml", "--dry-run"),)),
}
RESULTS = ("operating_points.csv", "predictions.csv", "o/*.csv")


def override(chance: random.Random) -> str:
    """A key of the schema, whole or misspelt, with a strange value."""
    from dynexit.study.schema import Config

    def keys(model: Any, before: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            inner = field.annotation
            found += keys(inner, f"{before}{name}.") if hasattr(inner, "model_fields") else [before + name]
        return found

    key = chance.choice(keys(Config))
    return f"{key[: chance.choice((None, None, None, -1))]}={chance.choice(STRANGE_TEXT)}".replace("\0", "")


def command_in_fork(
    folder: Path, arguments: Sequence[str], output: Path, longest_seconds: float = 4 * LONGEST_SECONDS
) -> Ended:
    """Runs one command in a fork with its output in a file."""
    return Forked(folder, output, lambda: _run_watched(arguments)).end(longest_seconds)


def _run_watched(arguments: Sequence[str]) -> int:
    os.environ["PATH"] = ""  # no scheduler is asked
    resource.setrlimit(resource.RLIMIT_DATA, (4 * MOST_BYTES, 4 * MOST_BYTES))  # before the machine suffers
    sys.addaudithook(_watch)
    from launch.__main__ import main

    return main([*arguments])


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        program = Path(os.fsdecode(arguments[0])).name
        if program not in ("scontrol", "sinfo", "squeue", "sacctmgr", "git"):  # they are asked, and change nothing
            print(f"STARTED {program!r}", flush=True)


def cause_of(ended: Ended, target: str) -> str:
    """The fault in words that equal faults share; empty where there is none."""
    if "STARTED" in ended.text:
        return f"{target}: started {re.findall('STARTED (.*)', ended.text)[0]}"
    if "Traceback" in ended.text or ended.status == 70:
        places = re.findall(r'File "[^"]*?/((?:dynexit|launch)/[^"]+)", line (\d+)', ended.text)
        place = ":".join(places[-1]) if places else "?"
        return (
            f"{target}: traceback at {place}: {(ended.text.strip().splitlines() or ['nothing was printed'])[-1][:90]}"
        )
    if ended.status not in (0, 1, 2):
        return f"{target}: exit status {ended.status}"
    if ended.processor_seconds > LONGEST_SECONDS:
        return f"{target}: {ended.processor_seconds:.0f} s"
    if ended.peak_bytes > MOST_BYTES:
        return f"{target}: {ended.peak_bytes >> 20} MB"
    if ended.status and not re.search(r"^(dynexit|usage)", ended.text, re.MULTILINE):
        return f"{target}: no error message"
    return ""


def results_of(folder: Path) -> dict[str, str]:
    """Digests of the files that hold results."""
    paths = [path for pattern in RESULTS for path in folder.rglob(pattern) if path.is_file()]
    paths = [path for path in paths if not any("." in part for part in path.relative_to(folder).parts[:-1])]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def run_trial(template: Path, folder: Path, target: str, chance: random.Random) -> tuple[str, str]:
    """One damaged copy of `template` and one command. Returns what was done and the cause of its fault, if any."""
    kind = TARGETS[target]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True)
    files = sorted({path for pattern in kind.patterns for path in folder.glob(pattern) if path.is_file()})
    command = list(chance.choice(kind.commands))
    if target == "overrides":
        command.append(override(chance))
        what = command[-1]
    else:
        path = chance.choice(files)
        what = f"{path.relative_to(folder)}: {damage_file(path, chance)}"
    if "POINT" in command:
        command[command.index("POINT")] = next(iter((folder / "runs/tiny_study/train").iterdir())).name[:6]
    before = _names(folder.parent)
    ended = command_in_fork(folder, command, folder.parent / "output")
    cause = cause_of(ended, target)
    if not cause and _names(folder.parent) != before:
        cause = f"{target}: wrote outside"
    if (folder / MARK).exists():
        cause = f"{target}: executed code"
    # other MACs are a user's own, and give other results
    has_digests = target in ("run folder", "model folder") or (target == "records" and "macs.json" not in what)
    if not cause and ended.status == 0 and has_digests:
        cause = _wrong_results(template, folder, f"{target}: {command[0]}", what)
    return f"{' '.join(command)[:80]} after {what}", cause


def _names(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir()} - {"output", "trial"}


def _wrong_results(template: Path, folder: Path, where: str, what: str) -> str:
    expected = json.loads((template.parent / "expected.json").read_text())
    found = results_of(folder)
    wrong = [name for name, digest in found.items() if expected.get(name, digest) != digest and name not in what]
    return f"{where}: another {Path(wrong[0]).name}" if wrong else ""


def build_template(folder: Path) -> None:
    """A finished run, a saved model, records as files, weights and images, as small as can be."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    from tests.reference.exit_problems import random_problem
    from tests.search.recorded import macs_info, write_json, write_npz

    folder.mkdir()
    shutil.copy(TINY, folder)
    for command in (("run", "tiny_study.yaml", *SHORT), ("infer", *STUDY), ("save", *STUDY, "model")):
        ended = command_in_fork(folder, command, folder.parent / "output", 600)
        assert ended.status == 0, ended.text
    chance = np.random.default_rng(0)
    for number in range(16):
        path = folder / "images" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (24, 24), dtype=np.uint8)).save(path)
    backbone = next((folder / "runs" / "tiny_study" / "prepare").glob("*/backbone.safetensors"))
    shutil.copy(backbone, folder / "weights.safetensors")
    torch.save(load_file(backbone), folder / "weights.pth")
    shutil.copy(ROOT / "slurm" / "sites" / "example.yaml", folder / "site.yaml")
    problem = random_problem(chance, 300, 3, 2)
    for name in RECORDS[:2]:
        write_npz(folder / name, problem)
    write_json(folder / RECORDS[2], macs_info(problem))
    for command in (SEARCH_RECORDS, ("predict", "model", "images", "--out", "predictions.csv")):
        ended = command_in_fork(folder, command, folder.parent / "output", 600)
        assert ended.status == 0, ended.text
    (folder.parent / "expected.json").write_text(json.dumps(results_of(folder)))
    shutil.rmtree(folder / "o", ignore_errors=True)
    (folder / "predictions.csv").unlink()


def fuzz(num_trials: int, seed: int, targets: Sequence[str], show: Callable[[str], None] = print) -> int:
    """Runs the trials. Returns the number of faults, and prints each of their causes with an example."""
    # the forks find them there
    import dynexit.jobs.prepare
    import dynexit.jobs.record
    import dynexit.jobs.train  # noqa: F401
    import launch.__main__
    import launch.local  # noqa: F401

    causes: dict[str, list[str]] = collections.defaultdict(list)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        template = Path(place) / "template"
        build_template(template)
        for number in range(num_trials):
            chance = random.Random(f"{seed} {number}")
            target = targets[number % len(targets)]
            try:
                what, cause = run_trial(template, Path(place) / "trial", target, chance)
            except KeyboardInterrupt:
                num_trials = number
                break
            if cause:
                if cause not in causes:  # a long run shows its causes as they come
                    print(f"trial {number}: {cause}", file=sys.stderr, flush=True)
                causes[cause].append(f"trial {number}: {what}")
    for cause, examples in sorted(causes.items(), key=lambda item: -len(item[1])):
        show(f"{len(examples):4d}  {cause}\n      {examples[0]}")
    num_faults = sum(map(len, causes.values()))
    show(f"{num_trials} trials with seed {seed}, {num_faults} faults of {len(causes)} causes, "
         f"{time.monotonic() - begun:.0f} s")  # fmt: skip
    return num_faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end it with the result so far
    sys.exit(fuzz(options.trials, options.seed, options.target or list(TARGETS)) > 0)
