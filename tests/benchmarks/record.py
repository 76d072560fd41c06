"""What recording costs beside the bare forward pass, and how long a record of ImageNet's size takes to read.

    python tests/benchmarks/record.py [--members M] [--batches N] [--repeats N] [--device cuda] [--samples N]

Cost: a ViT of T2T-ViT-7's size (256 wide, 7 blocks) at 224 px, batch 64, 1000 classes, linear heads and gates after six
blocks. Passes with and without a Recorder (opening and closing it included) alternate; the target is a ratio <= 1.03.
Reading: `--samples` (1.28 million) x 80 exits are written once, then opened and read; the target is < 1 s to open.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch

from dynexit.record.manifest import Layout
from dynexit.record.plan import finish, make_plan
from dynexit.record.recorder import Recorder
from dynexit.record.shards import Record, ShardWriter

BATCH_SIZE, NUM_CLASSES, NUM_EXITS = 64, 1000, 6


class Model(torch.nn.Module):
    """Backbone, heads and gates; returns exit logits (M, E, B, K), the backbone's (B, K) and gates (M, E, B)."""

    def __init__(self, num_members: int) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "vit_base_patch16_224", embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0, num_classes=NUM_CLASSES
        )
        self.heads = torch.nn.Parameter(torch.randn(num_members, NUM_EXITS, 256, NUM_CLASSES) / 16)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        last, kept = self.backbone.forward_intermediates(images, indices=NUM_EXITS + 1, output_fmt="NLC")
        features = torch.stack([feature.mean(1) for feature in kept[:NUM_EXITS]])
        logits = torch.einsum("ebd,medk->mebk", features, self.heads)
        return logits, self.backbone.forward_head(last), logits.amax(-1).sigmoid()


def one_pass(
    model: Model, images: torch.Tensor, num_batches: int, directory: Path | None, num_members: int
) -> tuple[float, float, float]:
    """Seconds per batch: by the clock, of processor time (all threads), and of the caller's processor time in add().

    With a Recorder where there is a directory for its records.
    """
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None
    label = torch.zeros(BATCH_SIZE, dtype=torch.int64, device=images.device)
    synchronize()
    in_add = 0.0
    start = time.perf_counter(), time.process_time()
    if directory is None:
        for _ in range(num_batches):
            model(images)
    else:
        exits = tuple((block, "linear") for block in range(NUM_EXITS))
        plan = make_plan(
            [directory / str(member) for member in range(num_members)],
            [{"checkpoint_sha256": "0"}] * num_members,
            Layout(exits, topk=1, num_gates=NUM_EXITS, num_samples=num_batches * BATCH_SIZE, batch_size=BATCH_SIZE),
            shards_dir=directory / "shards",
        )
        with Recorder(plan) as recorder:
            for batch in recorder.missing_batches():
                logits, backbone_logits, gates = model(images)
                index = torch.arange(*recorder.layout.sample_range(batch))
                in_add -= time.thread_time()
                recorder.add(batch, index, label, logits, gates, backbone_logits_BK=backbone_logits)
                in_add += time.thread_time()
        finish(plan, recorder.shards)
    synchronize()
    end = time.perf_counter(), time.process_time()
    return (end[0] - start[0]) / num_batches, (end[1] - start[1]) / num_batches, in_add / num_batches


def cost(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = Model(arguments.members).eval().to(arguments.device)
    images = torch.randn(BATCH_SIZE, 3, 224, 224, device=arguments.device)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        one_pass(model, images, 2, None, arguments.members)
        bare, recorded = [], []
        for repeat in range(arguments.repeats):
            bare.append(one_pass(model, images, arguments.batches, None, arguments.members))
            directory = Path(folder) / str(repeat)
            recorded.append(one_pass(model, images, arguments.batches, directory, arguments.members))
    print(f"{arguments.members} members, {torch.get_num_threads()} threads, {arguments.device}, per batch of 64:")
    for name, which in (("clock", 0), ("processor time", 1)):
        before, after = ([1000 * seconds[which] for seconds in passes] for passes in (bare, recorded))
        ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
        print(
            f"  {name}: bare {statistics.median(before):.1f} ms, recorded {statistics.median(after):.1f} ms, "
            f"median of pairwise ratios {ratio:.4f} (target 1.03)"
        )
    in_add = 1000 * statistics.median(seconds[2] for seconds in recorded)
    share = in_add / (1000 * statistics.median(seconds[1] for seconds in bare))
    print(f"  the caller's processor time in add(): {in_add:.1f} ms, {100 * share:.2f} % of the bare pass's")


def reading(num_samples: int) -> None:
    layout = Layout(
        exits=tuple((position, head_type) for position in range(16) for head_type in "abcde"),
        topk=1,
        num_gates=0,
        num_samples=num_samples,
        batch_size=256,
    )
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan([Path(folder)], [{"checkpoint_sha256": "0"}], layout)
        writer = ShardWriter(plan)
        start = time.perf_counter()
        for batch in writer.missing_batches:
            first, stop = layout.sample_range(batch)
            numbers = generator.random((1, 81, 1, stop - first), np.float32)
            arrays = dict.fromkeys(("margin", "entropy", "label_probability"), numbers[:, :, 0])
            writer.add(
                batch,
                {
                    "index": np.arange(first, stop),
                    "label": np.full(stop - first, 3, np.int32),
                    "prediction": (10 * numbers).astype(np.int32),
                    "probability": numbers,
                    **arrays,
                },
            )
        finish(plan, writer.shards)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f"{num_samples} samples x 80 exits: {size / 1e9:.2f} GB written in {time.perf_counter() - start:.1f} s")
        record = timed("open", lambda: Record.open(folder))
        timed("read one row (and check every checksum)", lambda: record.read_row(3))
        timed("read one row", lambda: record.read_row(4))
        before = anonymous_bytes()
        confidence = timed("read all confidences", lambda: record.confidence("max_probability"))
        grown = anonymous_bytes() - before
        print(f"  {confidence.nbytes / 1e6:.0f} MB of confidences took {grown / 1e6:.0f} MB of memory")
        timed("read what is correct", lambda: record.correct_RN)


def anonymous_bytes() -> int:
    """This process's own memory, without what is mapped from files (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def timed(name: str, function):
    start = time.perf_counter()
    result = function()
    print(f"  {name}: {time.perf_counter() - start:.3f} s")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=1_281_167)
    arguments = parser.parse_args()
    cost(arguments)
    if arguments.samples:
        reading(arguments.samples)
