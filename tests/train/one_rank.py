"""One rank of a training over gloo, as a process: saves what its members have become. A folder is its only argument."""

import itertools
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from dynexit.dist import start_ranks, stop_ranks
from dynexit.errors import Failure, Interrupted
from dynexit.progress import Progress
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.schema import TrainSettings
from dynexit.train import checkpoint
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.loop import fit
from tests.train.tiny import tiny_pack, tiny_split, tradeoff_members

MEMBERS = [(0, 0.05), (0, 0.4), (1, 0.3)]
DISTURBED_STEP, DISTURBED_RANK = 31, 1


def main(folder: Path, disturbance: str) -> None:
    """Trains as one of the ranks that the environment announces; `disturbance`: nan or signal, of one of them.

    With `clock` a second passes whenever a rank asks for the time, and a checkpoint is due every 10 of them. With
    `full` the main rank then cannot write it.
    """
    ranks = start_ranks("cpu", 1)
    settings = TrainSettings(num_epochs=5, global_batch_size=13, precision="float64", learning_rate=0.05)
    pack = replace(tiny_pack(tradeoff_members(MEMBERS), settings), ranks=ranks)
    task = JeiDnnTask(pack, JeiDnnSettings(max_warm_up_epochs=2, bilevel_batch_count=4))
    step = task.train_step

    def train_step(batch, share):  # type: ignore[no-untyped-def]
        here = (task.step_number, ranks.global_rank) == (DISTURBED_STEP, DISTURBED_RANK)
        if here and disturbance == "signal":
            os.kill(os.getpid(), signal.SIGUSR2)
        if here and disturbance == "nan":
            task.tradeoff_M[2] = task.gates.bias.new_tensor(float("nan"))
            task.stack("gates")["bias"][2] = float("nan")
            task.stack("heads")["0.linear.0.weight"][2] = float("nan")
        return step(batch, share)

    task.train_step = train_step  # type: ignore[method-assign]
    if disturbance == "full":
        (folder / "checkpoint-0000000011.safetensors").mkdir(exist_ok=True)
    progress = Progress("train", folder, 1e9, quiet=not ranks.is_main)
    if disturbance in ("clock", "full"):
        checkpoint.time = SimpleNamespace(monotonic=itertools.count().__next__, perf_counter=lambda: 0.0)  # type: ignore[assignment]
    checkpoints = Checkpoints(folder, 10 if disturbance in ("clock", "full") else 1e9)
    saved, save = [], checkpoints.save
    checkpoints.save = lambda step, *state: [saved.append(step), save(step, *state)]  # type: ignore[assignment]
    split = tiny_split()
    try:
        fit(
            task,
            split,
            num_epochs=settings.num_epochs,
            global_batch_size=settings.global_batch_size,
            seed=7,
            ranks=ranks,
            checkpoints=checkpoints,
            progress=progress,
        )
    except (Interrupted, Failure) as stop:
        (folder / f"rank{ranks.global_rank}.txt").write_text(str(stop), encoding="utf-8")
    members = {f"{i}.{name}": value for i in range(len(MEMBERS)) for name, value in task.member_state(i).items()}
    save_file(members, folder / f"rank{ranks.global_rank}.safetensors")
    if ranks.is_main:
        (folder / "saved.txt").write_text(" ".join(map(str, saved)), encoding="utf-8")
        (folder / "stopped.txt").write_text("\n".join(task.stopped.values()), encoding="utf-8")
    stop_ranks()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), os.environ.get("DISTURBANCE", ""))
