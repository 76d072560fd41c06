"""The train job: exit heads and gates of the points of a pack, of any method."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dynexit.core.cost import ExitCosts
from dynexit.errors import Failure
from dynexit.jobs.finished import set_aside_stale
from dynexit.jobs.load import begin, ranks_of, write_lines
from dynexit.progress import Progress
from dynexit.run_dir import (
    BEGUN,
    CONFIG,
    COSTS,
    FAILED,
    HEADS,
    MEMBERS,
    METRICS,
    is_done,
    job_dir,
    mark_done,
    save_tensors,
    write_json,
)
from dynexit.study.grid import Point, digest, method_settings
from dynexit.train.boosted import BoostedTask
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.dyce import DyceTask
from dynexit.train.independent import IndependentTask
from dynexit.train.jei_dnn import JeiDnnTask
from dynexit.train.loop import fit
from dynexit.train.pack import Member, Pack, PackTask
from dynexit.train.weighted import WeightedTask

TASK_BY_METHOD: dict[str, Callable[[Pack, Any], PackTask]] = {
    "jei_dnn": JeiDnnTask,
    "independent": IndependentTask,
    "boosted": BoostedTask,
    "weighted": WeightedTask,
    "dyce": DyceTask,
}


def run_train(points: Sequence[Point], study_dir: Path) -> None:
    """See jobs.train."""
    points = ranks_of(points[0].config).broadcast(_members(points, study_dir))
    if not points:
        return
    config = points[0].config
    ranks, data, model, costs = begin(points[0], study_dir)
    members = [Member(p.config.seed, p.label, method_settings(p.config)) for p in points]
    together = Pack(model, costs, members, config.train, data.validation, ranks, len(data.train), config.data.seed)
    task = TASK_BY_METHOD[config.train.method](together, method_settings(config))
    pack = pack_dir(study_dir, points)
    checkpoints = Checkpoints(pack, config.dist.checkpoint_seconds)
    with ranks.failing_together():
        if ranks.is_main:
            write_json(pack / MEMBERS, [point.id for point in points])
    progress = Progress(f"train {len(points)} points", pack, config.dist.log_seconds, quiet=not ranks.is_main)
    fit(
        task,
        data.train,
        num_epochs=config.train.num_epochs,
        global_batch_size=config.train.global_batch_size,
        seed=config.data.seed,
        ranks=ranks,
        checkpoints=checkpoints,
        progress=progress,
    )
    with ranks.failing_together():
        if ranks.is_main:
            _finish(points, study_dir, task, costs)
            checkpoints.clear()
        if task.stopped:
            raise Failure("; ".join(task.stopped.values()))


def _is_trained(point: Point, study_dir: Path) -> bool:
    return is_done(job_dir(study_dir, "train", point.id), point.id)


def _members(points: Sequence[Point], study_dir: Path) -> list[Point]:
    """The points that are not trained; all of a pack that was killed while it wrote its results, as it trained all."""
    left = [point for point in points if not _is_trained(point, study_dir)]
    return list(points) if left and (pack_dir(study_dir, points) / BEGUN).exists() else left


def pack_dir(study_dir: Path, points: Sequence[Point]) -> Path:
    """Where these points, trained together, keep log and checkpoints."""
    return job_dir(study_dir, "pack", digest([point.id for point in points]))


def _rows_of(rows: Sequence[Mapping[str, Any]], member: int) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "member"} for row in rows if row["member"] == member]


def _finish(points: Sequence[Point], study_dir: Path, task: PackTask, costs: ExitCosts) -> None:
    """Leaves the results of every point that has none yet; one that cannot be written stops no other."""
    failures: list[str] = []
    for i, point in enumerate(points):
        if not _is_trained(point, study_dir):
            try:
                rows = _rows_of(task.rows, i)
                _finish_point(point, study_dir, task.member_state(i), costs, rows, task.stopped.get(i))
            except Failure as failure:
                failures.append(str(failure))
    if failures:
        raise Failure("; ".join(failures))


def _finish_point(
    point: Point,
    study_dir: Path,
    state: Mapping[str, Tensor],
    costs: ExitCosts,
    rows: Sequence[Mapping[str, Any]],
    stopped: str | None,
) -> None:
    directory = job_dir(study_dir, "train", point.id)
    write_lines(directory / METRICS, rows)
    if stopped is not None:
        save_tensors(directory / "last_good.safetensors", state)
        write_json(directory / FAILED, {"id": point.id, "reason": stopped})
        return
    for moved in set_aside_stale(point, study_dir, save_tensors(directory / HEADS, state)):
        print(f"{point.label} was trained again; what was made of its earlier weights is now {moved}", flush=True)
    write_json(directory / COSTS, costs.to_json())
    write_json(directory / CONFIG, point.config.model_dump(mode="json"))
    mark_done(directory, point.id, [HEADS, COSTS, CONFIG, METRICS])
