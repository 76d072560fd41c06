"""The bench job: the times of the stages, heads and gates that points share, measured on this machine's device."""

import os
from collections.abc import Sequence

import torch

from dynexit.bench.machine import describe_machine
from dynexit.bench.measure import measure_times, timing_engine
from dynexit.bench.shrinking import with_shrinking
from dynexit.core.latency import LatencyTable, sizes_to_measure
from dynexit.deploy.assembly import HeadStack
from dynexit.dist import Ranks
from dynexit.errors import UserError, counted, end_if_stopped
from dynexit.gpus import choose_device, find_gpus
from dynexit.jobs.load import load_model, quickened
from dynexit.progress import Progress
from dynexit.run_dir import LATENCY, RunDir
from dynexit.study.grid import Point

PRECISION = "float32"


def _device(name: str) -> torch.device:
    try:
        return torch.device(choose_device(name, find_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))))
    except UserError as error:
        raise UserError(str(error).replace("dist.device", "bench.device")) from None


def run_bench(points: Sequence[Point]) -> None:
    """Measures every batch size of bench.batch_sizes and leaves latency.json, unless it is there.

    The points share backbone and exits. Raises UserError for a device that is not there and for a batch size that its
    memory cannot hold.
    """
    point = points[0]
    config, directory = point.config, RunDir(point, "bench")
    if directory.is_done():
        return
    if config.dist.num_threads is not None:
        torch.set_num_threads(config.dist.num_threads)
    device = _device(config.bench.device)
    model, costs = load_model(point, Ranks(0, 1, device))  # by one process, whatever the number of ranks
    engine = timing_engine(quickened(model, config.exits), HeadStack(costs.head_types, PRECISION, 0.0, True))
    progress = Progress("bench", directory.path, config.dist.log_seconds)
    sizes = sizes_to_measure(config.bench.batch_sizes)
    progress.start(len(sizes))
    times = {}
    for batch in sizes:
        try:
            times[batch] = measure_times(engine, batch, config.bench.num_warm_up, config.bench.num_repeats)
        except torch.OutOfMemoryError:
            raise UserError(
                f"bench.batch_sizes = {config.bench.batch_sizes}: {batch} images do not fit the memory of {device}; "
                "leave out this batch size"
            ) from None
        exits = 1000 * sum(row[0] for row in times[batch].heads)
        progress.advance(batch, {})
        progress.say(
            f"batch size {batch}: backbone {1000 * times[batch].backbone:.3f} ms, all "
            f"{counted(len(costs.positions), 'exit')} {exits:.3f} ms more"
        )
        end_if_stopped()
    machine = {"backbone": config.backbone.name, **describe_machine(device, PRECISION)}
    wanted = tuple(sorted(config.bench.batch_sizes))
    table = LatencyTable(costs.positions, costs.head_types, times, machine, wanted)
    table = with_shrinking(engine, table, config.bench.num_warm_up, config.bench.num_repeats)
    progress.finish()
    directory.write_json(LATENCY, table.to_json())
    directory.mark_done([LATENCY])
