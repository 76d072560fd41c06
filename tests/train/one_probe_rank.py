"""One rank of a fit of probes over gloo, as a process: saves what its heads have become. A folder is its argument."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from dynexit.dist import start_ranks, stop_ranks
from dynexit.progress import Progress
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.schema import TrainSettings
from dynexit.train import pack as pack_module
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.probe import ProbeTask
from tests.train.test_probe import SETTINGS, TRAIN, probe_pack
from tests.train.tiny import tiny_split


def main(folder: Path) -> None:
    """Fits probes, then trains JEI-DNN from converged heads on standardised features, as one of the ranks."""
    ranks = start_ranks("cpu", 1)
    pack_module._PLAIN_BATCH_SIZE = 16  # so that every rank has some
    progress = Progress("train", folder, 1e9, quiet=True)
    pack = replace(probe_pack(("linear", "mlp2x8"), whiten=True), ranks=ranks)
    probes = ProbeTask(pack, SETTINGS)
    probes.train(tiny_split(), Checkpoints(folder / "probes"), progress)
    settings = TrainSettings(num_epochs=2, global_batch_size=13, precision="float64")
    members = [replace(member, settings=JeiDnnSettings()) for member in pack.members]
    one_type = replace(probe_pack(("linear",), standardise=True), ranks=ranks, members=members, settings=settings)
    joint = JeiDnnTask(one_type, JeiDnnSettings(warm_up="convex", bilevel_batch_count=4))
    joint.train(tiny_split(), Checkpoints(folder / "joint"), progress)
    states = {"probe": probes.member_state(1), "joint": joint.member_state(1)}
    state = {f"{kind}.{name}": value for kind, values in states.items() for name, value in values.items()}
    save_file(state, folder / f"rank{ranks.global_rank}.safetensors")
    stop_ranks()


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert TRAIN.precision == "float64"
    main(Path(sys.argv[1]))
