"""One rank of fittings over gloo, as a process: its arguments are a folder and, as JSON, what is fitted how.

Each of the fittings has a name, a backbone and settings; with `stop_at` it is killed there first and then goes on.
Saved are, for each, this rank's whole weights, where it has them, and its batch norms' statistics.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dynexit.dist import start_ranks, stop_ranks
from tests.train.fitted import fitted, small_backbone
from tests.train.tiny import KilledError


def main(folder: Path, fittings: list[dict]) -> None:  # type: ignore[type-arg]
    """Fits as one of the ranks that the environment announces."""
    ranks = start_ranks("cpu", 1)
    for fitting in fittings:
        name, stop_at = fitting.pop("name"), fitting.pop("stop_at", None)
        model, arguments = fitting.pop("model"), fitting.pop("arguments", {})
        if stop_at is not None:
            try:
                fitted(folder / name, small_backbone(model, **arguments), ranks=ranks, stop_at=stop_at, **fitting)
            except KilledError:
                ranks.barrier()
        task = fitted(folder / name, small_backbone(model, **arguments), ranks=ranks, **fitting)
        statistics = {key: value for key, value in task.backbone.model.named_buffers() if "running" in key}
        save_file(statistics, folder / f"{name}.statistics{ranks.global_rank}.safetensors")
        weights = task.weights()
        if ranks.is_main:
            save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps([task.updates.layout, task.rows]))
    stop_ranks()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
