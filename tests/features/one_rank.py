"""One rank of a training on kept features over gloo, as a process: saves its heads. A folder is its argument."""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from dynexit.dist import start_ranks, stop_ranks
from dynexit.features import keep_features_of, store
from dynexit.progress import Progress
from dynexit.study.methods import JeiDnnSettings
from dynexit.study.schema import TrainSettings
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.jei_dnn import JeiDnnTask
from tests.features.test_kept import COSTS, MODEL, NUM_TRAIN, point_at, tiny_data
from tests.train.tiny import tiny_pack, tradeoff_members


def main(folder: Path) -> None:
    """Keeps the features of the tiny data set, then trains JEI-DNN on them, as one of the ranks."""
    store._BATCH_SIZE, store._MIN_SHARD_ROWS = 8, 16
    ranks = start_ranks("cpu", 1)
    data, model = keep_features_of(point_at(folder), ranks, tiny_data(), MODEL)
    settings = TrainSettings(num_epochs=3, global_batch_size=13, precision="float64")
    pack = replace(
        tiny_pack(tradeoff_members([(0, 0.1), (1, 0.3)]), settings),
        model=model,
        costs=COSTS,
        ranks=ranks,
        validation=data.validation,
        num_train=NUM_TRAIN,
    )
    task = JeiDnnTask(pack, JeiDnnSettings(max_warm_up_epochs=1, bilevel_batch_count=4))
    task.train(data.train, Checkpoints(folder / "pack", 1e9), Progress("train", folder, 1e9, quiet=not ranks.is_main))
    save_file(task.member_state(1), folder / f"rank{ranks.global_rank}.safetensors")
    stop_ranks()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
