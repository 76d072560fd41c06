"""Features that are kept in place of images: the backbone runs once for each image and view, whoever trains on them.

A row has what each exit reads itself, pooled as `exits.reader` says, and the backbone's logits. Concatenation,
standardisation, head types, methods and seeds all work on that. The maps that are pooled would serve every reader, and
take fifty to a thousand times the room: 1,000 to 4,000 numbers stand for each exit's map of 10^5 to 10^6.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynexit.data import DataSets, Split
from dynexit.dist import Ranks
from dynexit.errors import UserError
from dynexit.features.store import FeatureFolder, check_room, fill, read, rows_of_stored
from dynexit.models.multi_exit import MultiExit
from dynexit.progress import Progress
from dynexit.run_dir import BACKBONE, RunDir
from dynexit.study.grid import Point
from dynexit.study.methods import METHODS

FEATURES_DIR = "features"  # in runs_dir, next to the studies, which share it


class KeptExits(MultiExit):
    """The model whose rows were kept: takes them (B, D) where a MultiExit takes images."""

    def __init__(self, model: MultiExit) -> None:
        super().__init__(model.backbone, model.positions, model.head_types, model.reading)

    @torch.no_grad()
    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """What `MultiExit.features` gives for the images that the rows were made of."""
        *reads, final_BK = torch.split(x, row_parts(self), 1)
        features: list[Tensor] = []
        for read_BD in reads:
            own = read_BD.view(len(x), 2, -1) if self.reads_two else read_BD
            features.append(torch.cat((features[-1], own), -1) if self.reading.concatenate and features else own)
        return features, final_BK


def row_parts(model: MultiExit) -> list[int]:
    """The numbers of a row by part: what is read at each exit, then the backbone's logits."""
    reads = 2 if model.reads_two else 1
    return [*(reads * width for width in model.own_dims), model.backbone.num_classes]


def rows_of(model: MultiExit, images: Tensor) -> Tensor:
    """The rows (B, D) float32 of images (B, C, H, W)."""
    features, final_BK = model.features(images)
    own = [
        feature[..., feature.shape[-1] - width :].flatten(1)
        for feature, width in zip(features, model.own_dims, strict=True)
    ]
    return torch.cat((*own, final_BK), 1).float()


class KeptRows:
    """Rows in place of a split's images, as stored, by view and shard; epoch e has view e modulo their number."""

    def __init__(self, views: Sequence[Sequence[np.ndarray]]) -> None:
        self.views = views

    def file_names(self) -> None:
        return None

    def share(self) -> None:
        """The rows are mapped."""

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        shards = self.views[epoch % len(self.views)]
        rows_per_shard, width = shards[0].shape
        rows = np.empty((len(indices), width), shards[0].dtype)
        for i, index in enumerate(indices):
            shard, row = divmod(index, rows_per_shard)
            rows[i] = shards[shard][row]
        return rows_of_stored(rows)


def keep_features_of(point: Point, ranks: Ranks, data: DataSets, model: MultiExit) -> tuple[DataSets, MultiExit]:
    """Data and model of a training on kept features; computes those that no job has kept, and announces their size.

    Raises UserError, before anything is computed, where they are larger than train.max_feature_gb; Failure where they
    do not fit on the disk, or where kept ones are damaged.
    """
    settings = point.config.train
    num_views = 0 if data.train is data.plain_train else settings.kept_views
    if not METHODS[settings.method].is_augmented:
        num_views = 0
    wanted: list[tuple[str, Split, int | None]] = [("train", data.plain_train, None)]
    wanted += [("validation", data.validation, None)]
    wanted += [("train", data.train, view) for view in range(num_views)]
    with ranks.failing_together():
        folders = [_folder(point, model, split, name, view) for name, split, view in wanted]
        size = sum(folder.num_bytes for folder in folders)
        views = f", plain and in {num_views} augmented views," if num_views else ""
        what = f"{len(data.train)} training images{views} and {len(data.validation)} of validation"
        if size > settings.max_feature_gb * 1e9:
            raise UserError(
                f"train.max_feature_gb = {settings.max_feature_gb:g}: the features of {what} take {size / 1e9:.3g} GB; "
                "raise it, keep fewer views (train.kept_views) or exits, or set train.features=fresh"
            )
        if ranks.is_main:
            check_room(folders)
    log_seconds = point.config.dist.log_seconds
    Progress("features", folders[0].path, log_seconds, quiet=not ranks.is_main).say(
        f"{what}: {size / 1e9:.3g} GB in {folders[0].parent}"
    )
    shards = []
    for folder, (name, split, view) in zip(folders, wanted, strict=True):
        text = f"features {name}" + ("" if view is None else f" view {view}")
        progress = Progress(text, folder.path, log_seconds, quiet=not ranks.is_main)
        fill(folder, split, view or 0, lambda images: rows_of(model, images), ranks, progress)
        shards.append(read(folder, split.labels, ranks))

    def kept(split: Split, views: Sequence[Sequence[np.ndarray]]) -> Split:
        return Split(KeptRows(views), split.labels, split.origin)

    plain = kept(data.plain_train, shards[:1])
    train = kept(data.train, shards[2:]) if num_views else plain
    kept_data = dataclasses.replace(data, train=train, plain_train=plain, validation=kept(data.validation, shards[1:2]))
    return kept_data, KeptExits(model).to(ranks.device)


def _folder(point: Point, model: MultiExit, split: Split, name: str, view: int | None) -> FeatureFolder:
    header = {
        "prepare_id": point.ids["prepare"],
        "backbone_sha256": RunDir(point, "prepare").digest(BACKBONE),
        "split": name,
        "view": view,
        "positions": list(model.positions),
        "reads": list(model.reads),
        "num_rows": len(split),
        "width": sum(row_parts(model)),
    }
    if point.config.train.kept_precision != "float32":
        header["precision"] = point.config.train.kept_precision
    return FeatureFolder(Path(point.config.runs_dir) / FEATURES_DIR, header)
