"""Checks and timings on a GPU, in one command under nine minutes; needs no network.

    python -m tests.benchmarks.gpu [--out gpu.json] [--only STAGE ...] [--device cpu --tiny]

Each stage is a process with its own time limit; after each the results so far are written as JSON. A stage that fails
or runs out of time stops no other; the exit status is 1 then. With `--device cpu --tiny` every stage runs in seconds on
a CPU, on the pretend device where waits are counted. Needs the wheels in NEEDED, and no mlflow, deepspeed or submitit.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_WHEELS = (
    "accelerate fvcore matplotlib numba numpy psutil pydantic pytest rich safetensors scipy timm torch torchvision tqdm"
)
NEEDED = {name: name for name in _WHEELS.split()} | {
    "jinja2": "Jinja2",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
}
"""Modules and the wheels that they come in."""


def environment(device: str, tiny: bool) -> dict[str, Any]:
    """Wheels, driver and card. Fails, naming them, if wheels are missing or torch finds no GPU."""
    missing = sorted(wheel for name, wheel in NEEDED.items() if importlib.util.find_spec(name) is None)
    if missing:
        raise SystemExit(f"missing wheels: {', '.join(missing)}; run: pip install {' '.join(missing)}")
    import torch

    from dynexit.gpus import choose_device, find_gpus

    choose_device(device, find_gpus())
    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "memory_bytes": properties.total_memory, "driver": find_gpus().driver}
    return found


def steps(device: str, tiny: bool) -> dict[str, Any]:
    """Every method's step without a wait of the host."""
    import torch

    from tests.pretend_cuda import pretend_cuda
    from tests.test_pretend_cuda import ALONE, TASKS, take_steps

    names = list(TASKS)[: 2 if tiny else None]
    with pretend_cuda() if device == "cpu" else contextlib.nullcontext() as world:
        for name in names:
            task = TASKS[name](ALONE)
            take_steps(task, 18, 1.0)
            if world is not None:
                world.reset()
            else:
                torch.cuda.set_sync_debug_mode("error")
            take_steps(task, 18, 1.0)
            if world is not None:
                assert world.waits == {}, world.waits
            else:
                torch.cuda.set_sync_debug_mode("default")
    return {"methods": names}


def marked_tests(device: str, tiny: bool) -> dict[str, Any]:
    """`pytest -m gpu`, of the files that have such tests: others need more wheels. On a CPU they skip themselves."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "\n@pytest.mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return {"summary": done.stdout.strip().splitlines()[-1]}


def study(device: str, tiny: bool) -> dict[str, Any]:
    """The digits study with the stage infer."""
    file = ROOT / ("tests/tiny_study.yaml" if tiny else "configs/digits.yaml")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch", "infer", str(file), "--on", "here", f"dist.device={device}"]
        command.append("report.mlflow=false")
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
        (summary,) = Path(folder).rglob("infer/*/summary.json")
        jobs = [json.loads(path.read_text()) for path in Path(folder).rglob("provenance.json")]
        inferred = json.loads(summary.read_text())
    names = ("seconds", "gpu", "images_per_second_per_rank", "share_waiting_for_data", "peak_memory_bytes")
    by_stage = {job["stage"]: {name: job[name] for name in names if name in job} for job in jobs}
    return {"infer": inferred, "jobs": by_stage}


def parity(device: str, tiny: bool) -> dict[str, Any]:
    """Training here and on the CPU, and a training that was killed and resumed: the same bits on one device."""
    import torch

    from dynexit.dist import Ranks
    from dynexit.progress import Progress
    from dynexit.train.checkpoint import Checkpoints
    from tests.test_pretend_cuda import TASKS
    from tests.train.tiny import KilledError, largest_difference, tiny_split

    def train(name: str, where: str, folder: Path, stop_at: int | None = None) -> list[dict[str, torch.Tensor]]:
        task = TASKS[name](Ranks(0, 1, torch.device(where)))
        step = task.train_step

        def die(batch: Any, share: float) -> Any:
            if task.step_number == stop_at:
                raise KilledError
            return step(batch, share)

        task.train_step = die  # type: ignore[method-assign]
        task.train(tiny_split(), Checkpoints(folder, 0.0), Progress("train", folder, 1e9, quiet=True))
        return [{key: value.cpu() for key, value in task.member_state(i).items()} for i in range(len(task.members))]

    here, found = "cuda:0" if device == "cuda" else "cpu", {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ["jei_dnn"] if tiny else TASKS:
            whole, cpu = train(name, here, Path(folder, f"{name} a")), train(name, "cpu", Path(folder, f"{name} b"))
            with contextlib.suppress(KilledError):
                train(name, here, Path(folder, f"{name} c"), stop_at=4)
            resumed = train(name, here, Path(folder, f"{name} c"))
            assert max(map(largest_difference, whole, resumed)) == 0.0, f"{name} resumes with other bits"
            found[name] = max(map(largest_difference, whole, cpu))
            assert found[name] < 1e-3, f"{name} differs by {found[name]} from the CPU"
    return {"largest_difference_from_cpu": found}


def _seconds_of(run: Callable[[], object], device: str, repeats: int) -> float:
    """The median of `repeats`, after one that does not count."""
    import statistics

    import torch

    found = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


GOALS = {(10, 16): 0.1, (1000, 28): 0.3}
"""By classes and members the most that a step may add to a backbone in bf16."""


def packs(device: str, tiny: bool) -> dict[str, Any]:
    """Steps by model, classes, members and precision, next to the bare backbone; `roofline --beside` has the model."""
    grid = [("t2t_vit_7", 10, one) for one in ("float32", "bf16")]
    if not tiny:
        precisions = ("float32", "tf32", "bf16")
        grid = [(name, k, one) for name in ("t2t_vit_7", "resnet50") for k in (10, 1000) for one in precisions]
    return {"rows": [_pack_row(device, tiny, *point) for point in grid]}


def _pack_row(device: str, tiny: bool, name: str, num_classes: int, precision: str) -> dict[str, Any]:
    import torch

    from dynexit.data import Split
    from dynexit.dist import Ranks
    from dynexit.models.backbones import build_backbone
    from dynexit.models.macs import exit_costs
    from dynexit.models.multi_exit import MultiExit
    from dynexit.models.passes import quicken
    from dynexit.models.precision import set_precision
    from dynexit.study.methods import JeiDnnSettings
    from dynexit.study.schema import BackboneSettings, TrainSettings
    from dynexit.train.jei_dnn import JeiDnnTask
    from dynexit.train.pack import Member, Pack

    where, batch, size, repeats = torch.device(device), 4 if tiny else 256, 64 if tiny else 224, 2 if tiny else 9
    method = JeiDnnSettings(max_warm_up_epochs=0, bilevel_batch_count=1)
    backbone = build_backbone(name, num_classes=num_classes, image_size=size)
    costs = exit_costs(backbone, range(backbone.num_blocks - 1), ["linear"])
    model = MultiExit(backbone, costs.positions).to(where)
    set_precision(backbone, precision)
    quicken(model, BackboneSettings(), where, batch)
    images = torch.randn(batch, 3, size, size)
    split = Split(images, torch.arange(batch) % num_classes, torch.arange(batch))
    loaded = split.labels, images.to(where), split.labels.to(where)

    def seconds_with(num_members: int) -> float:
        members = [Member(i, str(i), JeiDnnSettings()) for i in range(num_members)]
        task = JeiDnnTask(Pack(model, costs, members, TrainSettings(), split, Ranks(0, 1, where), 100), method)
        return _seconds_of(lambda: [task.train_step(loaded, 1.0) for _ in range(2)], device, repeats) / 2

    steps = {m: seconds_with(m) for m in ((1, 2) if tiny else (1, 16, 28))}
    bare = _seconds_of(lambda: model.features(loaded[1]), device, repeats)
    named = {"model": name, "classes": num_classes, "precision": precision, "batch": batch, "image_size": size}
    added = {m: seconds / bare - 1 for m, seconds in steps.items()}
    goals = {m: (added[m], most) for (k, m), most in GOALS.items() if k == num_classes and m in added}
    met = {f"goal_{m}": f"{share:.3f} of at most {most:g}" for m, (share, most) in goals.items() if precision == "bf16"}
    return {
        **named,
        "backbone_seconds": bare,
        **{f"step_seconds_{m}": seconds for m, seconds in steps.items()},
        **{f"added_to_backbone_{m}": share for m, share in added.items()},
        **met,
    }


def batch_sizes(device: str, tiny: bool) -> dict[str, Any]:
    """How far confidences lie apart from one batch size to another, and that an empty batch runs."""
    import torch

    from dynexit.core.confidence import max_probability
    from dynexit.models.backbones import build_backbone
    from dynexit.models.multi_exit import MultiExit
    from dynexit.models.precision import set_precision

    found = {}
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        backbone = build_backbone("t2t_vit_7", num_classes=10, image_size=64)
        model = MultiExit(backbone, range(backbone.num_blocks - 1)).to(device)
        set_precision(backbone, precision)
        images = torch.randn(8 if tiny else 64, 3, 64, 64, device=device)
        together = max_probability(model.features(images)[1].float())
        alone = torch.cat([max_probability(model.features(part)[1].float()) for part in images.split(1)])
        found[precision] = float((together - alone).abs().max())
        features, final_BK = model.features(images[:0])
        assert [len(feature) for feature in (*features, final_BK)] == [0] * (len(features) + 1)
    return {"largest_difference": found}


def copies(device: str, tiny: bool) -> dict[str, Any]:
    """Bytes a second to the device, from pinned memory and through `Ranks.to_device`; seconds of a batch of images.

    That is cropped, flipped, normalised and copied, as uint8 that the device finishes and as floats; the same bits.
    """
    import numpy as np
    import torch

    from dynexit.data import Split, load_batches
    from dynexit.data.images import ArraySource, TransformedImages
    from dynexit.data.transforms import train_transform
    from dynexit.dist import Ranks
    from dynexit.study.schema import DataSettings

    batch, side, repeats = (2 if tiny else 256), 224, 9
    ranks, images = Ranks(0, 1, torch.device(device)), torch.zeros(batch, 3, side, side)
    found = {"pageable": _seconds_of(lambda: ranks.to_device(images), device, repeats)}
    if device == "cuda":
        pinned = images.pin_memory()
        found["pinned"] = _seconds_of(lambda: ranks.to_device(pinned), device, repeats)
    found = {f"{name}_bytes_per_second": images.nbytes / one for name, one in found.items()}
    pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    order, labels = list(range(batch)), torch.zeros(batch, dtype=torch.int64)
    transform, _ = train_transform(DataSettings(name="cifar10", image_size=side))
    source = ArraySource(pixels, labels.numpy())
    held = TransformedImages(source, torch.arange(batch), transform, 0, cache="memory", image_size=side)
    split = Split(held, labels, labels)
    ways = {
        "as_uint8": lambda: next(load_batches(split, [order], ranks=ranks))[1],
        "as_float32": lambda: ranks.images_to_device(split.__getitems__(order)[1]),
    }
    assert torch.equal(*(way() for way in ways.values())), "images finished on the device have other bits"
    return found | {f"batch_seconds_{name}": _seconds_of(way, device, repeats) for name, way in ways.items()}


def one_rank(device: str, tiny: bool) -> dict[str, Any]:
    """A process group of one rank, over NCCL on a GPU, and an all-reduce."""
    import torch

    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    backend, device_id = ("nccl", where) if device == "cuda" else ("gloo", None)
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, device_id=device_id)
        values = torch.ones(1000 if tiny else 50_000_000, device=where)
        seconds = _seconds_of(lambda: torch.distributed.all_reduce(values), device, 5)
        assert bool((values == 1).all())
        torch.distributed.destroy_process_group()
    return {"backend": backend, "bytes": values.nbytes, "seconds": seconds}


STAGES: dict[str, tuple[Callable[[str, bool], dict[str, Any]], int]] = {
    "environment": (environment, 30),
    "steps": (steps, 60),
    "one_rank": (one_rank, 40),
    "copies": (copies, 25),
    "batch_sizes": (batch_sizes, 25),
    "parity": (parity, 70),
    "packs": (packs, 120),
    "study": (study, 90),
    "marked_tests": (marked_tests, 75),
}
"""What runs, in this order, and the most seconds that it may take: 535 in all."""


def run_stage(name: str, device: str, tiny: bool) -> dict[str, Any]:
    """Runs a stage as a process; its figures, or `error`, and its seconds."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        command = [sys.executable, "-m", "tests.benchmarks.gpu", "--stage", name, "--device", device, "--out", file]
        limit = STAGES[name][1] * (10 if tiny else 1)  # a test machine may be busy
        command += ["--tiny"] * tiny
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            found: dict[str, Any] = {"error": f"took longer than {limit} s"}
        else:
            if done.returncode == 0:
                found = json.loads(file.read_text())
            else:
                found = {"error": done.stderr.strip()[-2000:] or f"exit status {done.returncode}"}
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """Runs the stages; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the file of the results")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything runs")
    options = parser.parse_args()
    if options.stage:
        options.out.write_text(json.dumps(STAGES[options.stage][0](options.device, options.tiny)))
        return 0
    results: dict[str, Any] = {"date": time.strftime("%F %T"), "device": options.device, "tiny": options.tiny}
    for name in options.only:
        results[name] = run_stage(name, options.device, options.tiny)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {results[name].get('error', 'ok')} ({results[name]['seconds']} s)", flush=True)
        if name == "environment" and "error" in results[name]:
            return 1
    return int(any("error" in one for one in results.values() if isinstance(one, dict)))


if __name__ == "__main__":
    sys.exit(main())
