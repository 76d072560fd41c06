"""The train job: exit heads and gates of the points of a pack, of any method."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from dynexit.core.cost import ExitCosts
from dynexit.errors import Failure, UserError, counted
from dynexit.features import keep_features_of
from dynexit.jobs.finished import set_aside_stale
from dynexit.jobs.load import begin, ranks_of
from dynexit.models.passes import quicken
from dynexit.progress import Progress
from dynexit.run_dir import BEGUN, CONFIG, COSTS, FAILED, HEADS, MEMBERS, METRICS, RunDir
from dynexit.study.grid import Point, digest
from dynexit.study.methods import METHODS
from dynexit.study.schema import method_settings
from dynexit.study.validation import too_many_ranks
from dynexit.train.checkpoint import Checkpoints
from dynexit.train.pack import Member, Pack, PackTask


def run_train(points: Sequence[Point]) -> None:
    """Trains exit heads and gates of all `points` as one pack, and leaves heads.safetensors in a folder per point.

    A member whose loss is not finite is stopped; its folder gets FAILED.json and what was last good of it. The others
    are finished, then Failure is raised, naming it.
    """
    points = ranks_of(points[0].config).broadcast(_members(points))
    if not points:
        return
    config = points[0].config
    ranks, data, model, costs = begin(points[0])
    with ranks.failing_together():
        for mistake in too_many_ranks(config, ranks.world_size):
            raise UserError(mistake)
        at_once = config.train.micro_batch_size or -(-config.train.global_batch_size // ranks.world_size)
        quicken(model, config.backbone, ranks.device, at_once)
    if config.train.features == "kept":
        data, model = keep_features_of(points[0], ranks, data, model)
    members = [Member(p.config.seed, p.label, method_settings(p.config)) for p in points]
    together = Pack(
        model,
        costs,
        members,
        config.train,
        data.validation,
        ranks,
        len(data.train),
        config.data.seed,
        data.plain_train,
        config.exits,
    )
    task = METHODS[config.train.method].task_class()(together, method_settings(config))
    pack = pack_dir(points)
    checkpoints = Checkpoints(pack.path, config.dist.checkpoint_seconds)
    with ranks.failing_together():
        if ranks.is_main:
            pack.write_json(MEMBERS, [point.id for point in points])
    progress = Progress(
        f"train {counted(len(points), 'point')}",
        pack.path,
        config.dist.log_seconds,
        quiet=not ranks.is_main,
        num_ranks=ranks.world_size,
    )
    ranks.check_same("weights at the start", {**model.state_dict(), **task.heads.state_dict(prefix="heads.")})
    is_live = config.report.mlflow == "live" and ranks.is_main
    with _live(points, task) if is_live else nullcontext():
        task.train(data.train, checkpoints, progress)
    own = ranks.share(list(enumerate(points)))
    failures = [text for texts in ranks.gather(_finish(own, task, costs)) for text in texts]
    with ranks.failing_together():
        if failures:
            raise Failure("; ".join(failures))
        if ranks.is_main:
            checkpoints.clear()
        if task.stopped:
            raise Failure("; ".join(task.stopped.values()))


def _live(points: Sequence[Point], task: PackTask) -> AbstractContextManager[None]:
    from dynexit.jobs.reporting.live import followed

    return followed(points, lambda: task.rows)


def _is_trained(point: Point) -> bool:
    return RunDir(point, "train").is_done()


def _members(points: Sequence[Point]) -> list[Point]:
    """The points that are not trained; all of a pack that was killed while it wrote its results, as it trained all."""
    left = [point for point in points if not _is_trained(point)]
    return list(points) if left and (pack_dir(points) / BEGUN).exists() else left


def pack_dir(points: Sequence[Point]) -> RunDir:
    """Where these points, trained together, keep log and checkpoints."""
    return RunDir(points[0], "pack", digest([point.id for point in points]))


def _rows_of(rows: Sequence[Mapping[str, Any]], member: int) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "member"} for row in rows if row["member"] == member]


def _finish(points: Sequence[tuple[int, Point]], task: PackTask, costs: ExitCosts) -> list[str]:
    """Leaves the results of every point, given with its member's number, that has none yet. Returns what failed.

    A point that cannot be written stops no other.
    """
    failures: list[str] = []
    for i, point in points:
        try:
            if not _is_trained(point):
                rows = _rows_of(task.rows, i)
                _finish_point(point, task.member_state(i), costs, rows, task.stopped.get(i))
        except Failure as failure:
            failures.append(str(failure))
    return failures


def _finish_point(
    point: Point,
    state: Mapping[str, Tensor],
    costs: ExitCosts,
    rows: Sequence[Mapping[str, Any]],
    stopped: str | None,
) -> None:
    directory = RunDir(point, "train")
    directory.write_lines(METRICS, rows)
    if stopped is not None:
        directory.save_tensors("last_good.safetensors", state)
        directory.write_json(FAILED, {"id": point.id, "reason": stopped})
        return
    for moved in set_aside_stale(point, directory.save_tensors(HEADS, state)):
        print(f"{point.label} was trained again; what was made of its earlier weights is now {moved}", flush=True)
    directory.write_json(COSTS, costs.to_json())
    directory.write_json(CONFIG, point.config.model_dump(mode="json"))
    directory.mark_done([HEADS, COSTS, CONFIG, METRICS])
