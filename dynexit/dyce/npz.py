"""DyCE's recorder and its `.npz` files (Wang et al., DyCE, arXiv 2403.01695), and their conversion from and to shards.

Its files hold `label` (N, 1), `confs` and `preds` (R, N, k): the softmax probabilities of the top-k classes and the
classes, rows position-major with the backbone last. Ours hold int32, and also everything else that shards hold.

Shapes: E exits, R rows (exits, then the backbone), N samples, B batch, C classes.
"""

import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from dynexit.errors import UserError
from dynexit.files import regular
from dynexit.record.manifest import MANIFEST, SHARED, STATISTICS, Layout
from dynexit.record.plan import finish, make_plan
from dynexit.record.shards import Record, ShardWriter
from dynexit.run_dir import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

_LAYOUTS = ("NBC", "BNC")
_OURS = "dynexit_record"  # the key of meta_info that makes a round trip exact
_BATCH_SIZE = 4096
_MOST_CLASSES = 2**31 - 1  # int32, as shards hold
_ARRAYS = ("label", "confs", "preds", *STATISTICS[1:], "gate")
"""The arrays that are read; others are left alone."""
_UNREADABLE = (OSError, ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What zipfile and numpy raise for damaged, encrypted (RuntimeError) or unknown (NotImplementedError) contents."""


class OutputRecorder:
    """Collects the top-k predictions and confidences of all exits, with the interface that DyCE published.

    `layout` says what the axes of `ee_out` are where its shape cannot tell: "NBC" (exits, batch, classes), as DyCE
    documents, or "BNC" (batch, exits, classes), as DyCE's code needs. Where classes tie, the lower one comes first.
    """

    def __init__(self, topk: int = 5, layout: str | None = None) -> None:
        if layout not in (None, *_LAYOUTS):
            raise UserError(f"layout is {layout!r}, must be one of {', '.join(_LAYOUTS)}")
        self.topk = topk
        self._layout = layout
        self.initilize()

    def initilize(self) -> None:
        """Forgets all that was added (DyCE's spelling)."""
        self.records: dict[str, list[np.ndarray]] = {"label": [], "preds": [], "confs": []}

    def add_pred(self, model_out: "Tensor", ee_out: "Tensor | None" = None, layout: str | None = None) -> None:
        """Takes the logits of one batch: the backbone's (B, C), and the exits' (N, B, C) or (B, N, C).

        A layout that was given or recognised once holds for the batches that follow. Raises UserError where the shapes
        do not fit each other, or fit both layouts and none is given, or where there are fewer than topk classes.
        """
        import torch  # here: who only reads or converts files need not wait for it

        from dynexit.record.recorder import top_classes

        if model_out.ndim != 2 or model_out.shape[1] < self.topk:
            raise UserError(f"model_out has shape {tuple(model_out.shape)}, must be (B, C) with C at least {self.topk}")
        rows = [model_out.detach()[None]]
        if ee_out is not None:
            self._layout = self._recognised(tuple(model_out.shape), tuple(ee_out.shape), layout or self._layout)
            exits = ee_out.detach()
            rows.insert(0, exits if self._layout == "NBC" else exits.transpose(0, 1))
        logits_RBC = torch.cat(rows).float()
        prediction_RBk = top_classes(logits_RBC, self.topk)
        self.records["preds"].append(prediction_RBk.int().cpu().numpy())
        self.records["confs"].append(logits_RBC.softmax(-1).gather(-1, prediction_RBk).cpu().numpy())

    def add_label(self, label: "Tensor") -> None:
        """Takes the labels of one batch, (B,) or (B, 1)."""
        self.records["label"].append(label.detach().reshape(-1, 1).int().cpu().numpy())

    def save(self, path: str | Path, meta_info: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
        """Writes all that was added to `path` (`.npz` is appended where it lacks) and returns the arrays written.

        `meta_info` is kept as a JSON string. Raises UserError where it is not JSON, where nothing was added, or where
        predictions and labels differ in number.
        """
        counts = [sum(array.shape[axis] for array in self.records[name]) for name, axis in (("preds", 1), ("label", 0))]
        if counts[0] != counts[1] or not counts[0]:
            raise UserError(
                f"predictions of {counts[0]} samples and labels of {counts[1]} were added, must be as many and at "
                "least one; call add_pred and add_label for every batch"
            )
        arrays = {
            "label": np.concatenate(self.records["label"]),
            "confs": np.concatenate(self.records["confs"], axis=1),
            "preds": np.concatenate(self.records["preds"], axis=1),
        }
        if meta_info is not None:
            try:
                arrays["meta_info"] = np.array(json.dumps(meta_info))
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"meta_info cannot be written as JSON ({error}); keep to numbers, text, lists"
                ) from error
        path = Path(path)
        _save(path if path.suffix == ".npz" else path.with_name(f"{path.name}.npz"), arrays)
        return arrays

    @staticmethod
    def _recognised(model_shape: tuple[int, ...], exits_shape: tuple[int, ...], layout: str | None) -> str:
        batch, classes = model_shape
        fits = [
            name
            for name, axis in (("NBC", 1), ("BNC", 0))
            if len(exits_shape) == 3 and exits_shape[axis] == batch and exits_shape[2] == classes
        ]
        if not fits or (layout is not None and layout not in fits):
            wanted = f"(N, {batch}, {classes})" if layout == "NBC" else f"({batch}, N, {classes})"
            allowed = wanted if layout else f"(N, {batch}, {classes}) or ({batch}, N, {classes})"
            raise UserError(f"ee_out has shape {exits_shape}, must be {allowed} as model_out is {model_shape}")
        if len(fits) == 2 and layout is None:
            raise UserError(
                f"ee_out has shape {exits_shape}, as many exits as samples, so that (N, B, C) and (B, N, C) cannot be "
                'distinguished; say which with layout="NBC" or layout="BNC"'
            )
        return layout or fits[0]


@dataclass
class _Arrays:
    """A record's only part, in memory."""

    num_samples: int
    content: dict[str, np.ndarray]

    def arrays(self) -> Mapping[str, np.ndarray]:
        return self.content


def read_npz(path: Path | str, head_types: Sequence[str] | None = None, num_positions: int | None = None) -> Record:
    """The record in DyCE's `.npz` file, in memory.

    It has margins where k >= 2; entropies, label probabilities and gates only where write_npz made it. `head_types`
    names the head types at every position, in the order of the rows; without it there is one, "exit", at as many
    positions as there are exits. `num_positions` is the number that the exits should have, if it is known. A pickled
    `meta_info` is skipped with a warning. Raises UserError, naming the array, where the file is no such record, lengths
    differ, a confidence is NaN or outside [0, 1], a class is negative, or the rows do not fit head types and positions.
    """
    path = Path(path)
    arrays, meta = _load(path)
    label, confs, preds = (arrays[name] for name in ("label", "confs", "preds"))
    if confs.ndim != 3 or preds.shape != confs.shape or label.size != confs.shape[1] or not confs.size:
        raise UserError(
            f"{path} holds label {label.shape}, confs {confs.shape} and preds {preds.shape}, must be (N, 1), (R, N, k) "
            "and (R, N, k)"
        )
    for name in ("label", "preds"):
        if arrays[name].dtype.kind not in "iu":
            raise UserError(f"{path}: {name} must hold whole numbers from 0 up, not {arrays[name].dtype}")
        if (arrays[name] < 0).any():
            raise UserError(f"{path}: {name} must hold whole numbers from 0 up, its smallest is {arrays[name].min()}")
        if (arrays[name] > _MOST_CLASSES).any():
            raise UserError(f"{path}: {name} holds {arrays[name].max()}; the largest class is {_MOST_CLASSES}")
    for name in ("confs", *STATISTICS[1:], "gate"):
        if name in arrays and arrays[name].dtype.kind != "f":
            raise UserError(f"{path}: {name} must hold floating-point numbers, not {arrays[name].dtype}")
    content: dict[str, np.ndarray] = {
        "index": np.arange(label.size),
        "label": label.reshape(-1).astype(np.int32),
        "prediction": preds.transpose(0, 2, 1).astype(np.int32, order="C"),
        "probability": confs.transpose(0, 2, 1).astype(np.float32, order="C"),
    }
    if confs.shape[2] >= 2:
        content["margin"] = content["probability"][:, 0] - content["probability"][:, 1]
    content |= {name: arrays[name].astype(np.float32) for name in (*STATISTICS[1:], "gate") if name in arrays}
    layout, header = _layout_of(path, content, meta, head_types, num_positions)
    _check(path, layout, content)
    return Record(layout, header, [_Arrays(label.size, content)], path)


def write_npz(record: Record, path: Path | str) -> None:
    """Writes a record as DyCE's `.npz`, with all else that it holds beside, so that read_npz gives it back whole."""
    places = range(record.layout.topk)
    arrays = {
        "label": record.label[:, None],
        "confs": np.stack([record.probability(k) for k in places], -1),
        "preds": np.stack([record.prediction(k) for k in places], -1),
        **{name: record.confidence(name) for name in record.layout.statistics[1:]},
        "meta_info": np.array(json.dumps({_OURS: {"layout": record.layout.to_json(), "header": record.header}})),
    }
    if record.gate is not None:
        arrays["gate"] = record.gate
    _save(Path(path), arrays)


def convert(source: Path | str, destination: Path | str, head_types: Sequence[str] | None = None) -> None:
    """Turns DyCE's `.npz` into a directory of shards, or a directory of shards into a `.npz`: the suffix says which.

    `head_types` as in read_npz. Raises UserError where source and destination are of one kind, where the source is not
    there, or where the destination exists already.
    """
    source, destination = Path(source), Path(destination)
    if (source.suffix == ".npz") == (destination.suffix == ".npz"):
        raise UserError(f"cannot convert {source} to {destination}: one must end in .npz, the other be a directory")
    if destination.is_file() or (destination / MANIFEST).exists():
        raise UserError(f"{destination} exists already; give another destination, or remove it first")
    if source.suffix == ".npz":
        _write_shards(read_npz(source, head_types), destination)
    else:
        write_npz(Record.open(source), destination)


def _write_shards(record: Record, directory: Path) -> None:
    plan = make_plan([directory], [record.header], record.layout)
    writer = ShardWriter(plan)
    (arrays,) = record.parts()
    of_one_member = {name: array if name in SHARED else array[None] for name, array in arrays.items()}
    for batch in writer.missing_batches:
        samples = slice(*record.layout.sample_range(batch))
        writer.add(batch, {name: array[..., samples] for name, array in of_one_member.items()})
    finish(plan, writer.shards)


def _check(path: Path, layout: Layout, content: Mapping[str, np.ndarray]) -> None:
    for name, (_, shape) in layout.arrays(layout.num_samples).items():
        values = content.get(name, np.empty(0))
        if values.shape != shape:
            raise UserError(f"{path}: {name} has shape {values.shape}, must be {shape}; record it again")
        if values.dtype == np.float32 and not ((values >= 0) & (values <= 1)).all():
            wrong = values[~((values >= 0) & (values <= 1))][0]
            raise UserError(f"{path}: {name} holds {wrong}, must be between 0 and 1; record it again")


def _layout_of(
    path: Path,
    content: Mapping[str, np.ndarray],
    meta: Any,
    head_types: Sequence[str] | None,
    num_positions: int | None,
) -> tuple[Layout, dict[str, Any]]:
    if isinstance(meta, dict) and _OURS in meta:
        try:
            return Layout.from_json(meta[_OURS]["layout"]), dict(meta[_OURS]["header"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: meta_info is not what write_npz makes ({error}); convert it again") from error
    head_types = ("exit",) if head_types is None else tuple(head_types)
    rows, topk, num_samples = content["prediction"].shape
    positions, rest = divmod(rows - 1, len(head_types))
    if num_positions is not None and rows - 1 != num_positions * len(head_types):
        raise UserError(
            f"{path} has {rows} rows; {num_positions} positions x {len(head_types)} head types need "
            f"{num_positions * len(head_types)} and the backbone 1; give the costs of the exits that were recorded"
        )
    if rest:
        raise UserError(
            f"{path} has {rows - 1} exits and the backbone, which {len(head_types)} head types "
            f"({', '.join(head_types)}) at every position cannot make; give the head types that were recorded"
        )
    try:
        layout = Layout(
            exits=tuple((position, head_type) for position in range(positions) for head_type in head_types),
            topk=topk,
            num_gates=0,
            num_samples=num_samples,
            batch_size=_BATCH_SIZE,
            statistics=tuple(name for name in STATISTICS if name == STATISTICS[0] or name in content),
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return layout, {"checkpoint_sha256": None, "source": path.name, "meta_info": meta}


def _load(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays of an `.npz`, and what its meta_info says (None where it has none, or a pickled one)."""
    if not path.is_file():
        raise UserError(f"there is no record {path}; give the .npz that was recorded")
    try:
        with regular(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            known = [name for name in _ARRAYS if name in file.files]
            _check_sizes(path, [*known, *(["meta_info"] if "meta_info" in file.files else [])])
            arrays = {name: file[name] for name in known}
            meta = _read_meta(path, file) if "meta_info" in file.files else None
            names = [name for name in file.files if name != "meta_info"]
    except _UNREADABLE as error:
        raise UserError(f"{path} cannot be read as a .npz file without pickles ({error}); record it again") from error
    missing = [name for name in ("label", "confs", "preds") if name not in arrays]
    if missing:
        raise UserError(f"{path} is not a DyCE record: it lacks {', '.join(missing)}; it has {', '.join(names)}")
    return arrays, meta


def _check_sizes(path: Path, names: Sequence[str]) -> None:
    """Raises ValueError, before anything is allocated, for arrays that need more than the free memory."""
    total = 0
    with zipfile.ZipFile(path) as archive:
        for name in names:
            with archive.open(f"{name}.npy") as member:
                version = np.lib.format.read_magic(member)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(member)
            num_bytes = math.prod(shape) * dtype.itemsize
            total += num_bytes
    free = psutil.virtual_memory().available
    if total > free:
        raise ValueError(f"its arrays need {total / 1e9:.1f} GB, {free / 1e9:.1f} GB of memory are free")


def _read_meta(path: Path, file: Any) -> Any:
    try:
        return json.loads(str(file["meta_info"]))
    except (ValueError, RecursionError):
        warnings.warn(f"{path}: meta_info is pickled or not JSON and was skipped", stacklevel=4)
        return None


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
