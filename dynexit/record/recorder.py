"""One rank's share of recording: logits in, shards out, written by a thread while the next batch is computed.

Shapes: M members, R rows (exits, then the backbone), G gates, B batch, K classes; x any leading axes.
"""

import math
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from dynexit.errors import Failure, UserError
from dynexit.record.manifest import ExitRow, Shard
from dynexit.record.plan import Plan
from dynexit.record.shard_file import member_arrays
from dynexit.record.shards import ShardWriter
from dynexit.run_dir import move_aside

_QUEUED_BATCHES = 4


class Recorder:
    """Records one rank's share of a plan, for all members of a pack from one stream of batches.

        plan = make_plan(directories, headers, layout, shards_dir=...)
        with Recorder(plan) as recorder:
            for batch in recorder.missing_batches():
                recorder.add(batch, index_B, label_B, logits_MRBK, gate_MGB)
        finish(plan, recorder.shards)

    An error of the writing thread (disk full, NaN, a wrong sample) is raised by the next `add` or by `close`.
    Leaving the block by an exception keeps the complete shards and drops the rest.
    """

    def __init__(self, plan: Plan, rank: int = 0) -> None:
        if not all("checkpoint_sha256" in header for header in plan.manifest.headers):
            raise ValueError("every header needs a checkpoint_sha256")
        self.layout = plan.manifest.layout
        self._directories = plan.directories
        self._writer = ShardWriter(plan, rank)
        self._missing = self._writer.missing_batches
        self._to_add = set(self._missing)
        self._queue: queue.Queue[_Outputs | None] = queue.Queue(_QUEUED_BATCHES)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="recorder", daemon=True)
        self._thread.start()

    @property
    def shards(self) -> list[Shard]:
        """The shards that were written here."""
        return self._writer.shards

    def missing_batches(self) -> list[int]:
        """This rank's batches that were in no complete shard at the start, in order."""
        return list(self._missing)

    def add(
        self,
        batch: int,
        index_B: Tensor,
        label_B: Tensor,
        logits_MRBK: Tensor,
        gate_MGB: Tensor | None = None,
        *,
        backbone_logits_BK: Tensor | None = None,
    ) -> None:
        """Takes the outputs of one missing batch, on any device, and returns while they are still being written.

        `index_B` must be the samples layout.sample_range(batch) in order. With `backbone_logits_BK` the last row of
        `logits_MRBK` is left out and taken from there, the same for all members. Raises ValueError for a batch that is
        not missing or for wrong shapes, UserError where there are fewer classes than topk, and whatever went wrong in
        the writing thread.
        """
        self._raise_error()
        if batch not in self._to_add:
            raise ValueError(f"batch {batch} is not missing here, or was already added")
        self._check_shapes(batch, index_B, label_B, logits_MRBK, gate_MGB, backbone_logits_BK)
        with torch.no_grad():
            arrays = self._arrays(label_B, logits_MRBK, backbone_logits_BK)
            if gate_MGB is not None:
                arrays["gate"] = gate_MGB.detach().float()
            host = {name: _to_host(array) for name, array in arrays.items()}
            index, label = _to_host(index_B.long()), _to_host(label_B.int())
        arrived = None
        if logits_MRBK.is_cuda:
            arrived = torch.cuda.current_stream(logits_MRBK.device).record_event()
        self._to_add.discard(batch)
        self._queue.put(_Outputs(batch, index, label, host, logits_MRBK.shape[-1], arrived))

    def _arrays(self, label_B: Tensor, logits_MRBK: Tensor, backbone_logits_BK: Tensor | None) -> dict[str, Tensor]:
        if logits_MRBK.is_cuda:
            arrays = statistics(logits_MRBK, label_B, self.layout.topk)
        else:  # member by member: twice as fast, as a member's logits stay in the cache
            members = [statistics(logits_RBK, label_B, self.layout.topk) for logits_RBK in logits_MRBK]
            arrays = {name: torch.stack([member[name] for member in members]) for name in members[0]}
        if backbone_logits_BK is None:
            return arrays
        last = statistics(backbone_logits_BK[None], label_B, self.layout.topk)
        return {name: torch.cat((a, last[name].expand(len(a), *last[name].shape)), 1) for name, a in arrays.items()}

    def close(self) -> None:
        """Waits until everything is written."""
        self._end()
        self._raise_error()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._error = self._error or error
            self._end()

    def _end(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _check_shapes(
        self,
        batch: int,
        index_B: Tensor,
        label_B: Tensor,
        logits_MRBK: Tensor,
        gate_MGB: Tensor | None,
        backbone_logits_BK: Tensor | None,
    ) -> None:
        first, stop = self.layout.sample_range(batch)
        members, size, classes = len(self._directories), stop - first, logits_MRBK.shape[-1]
        rows = len(self.layout.rows) - (backbone_logits_BK is not None)
        expected = {
            "index": (index_B, (size,)),
            "label": (label_B, (size,)),
            "logits": (logits_MRBK, (members, rows, size, classes)),
            "gate": (gate_MGB, (members, self.layout.num_gates, size) if self.layout.num_gates else None),
            "backbone_logits": (backbone_logits_BK, None if backbone_logits_BK is None else (size, classes)),
        }
        for name, (tensor, shape) in expected.items():
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape:
                raise ValueError(f"{name} of batch {batch} has shape {found}, expected {shape}")
        if self.layout.topk > classes:
            raise UserError(f"topk is {self.layout.topk}, must be at most the number of classes, {classes}")

    def _write(self) -> None:
        while (outputs := self._queue.get()) is not None:
            if self._error is not None:
                continue  # keeps taking, so that add() never waits for a queue that nobody empties
            try:
                self._write_batch(outputs)
            except (Failure, UserError) as error:
                self._error = error
            except Exception as error:
                self._error = Failure(f"recording into {self._directories[0]} failed: {error!r}")
                self._error.__cause__ = error

    def _write_batch(self, outputs: "_Outputs") -> None:
        if outputs.arrived is not None:
            outputs.arrived.synchronize()
        first, stop = self.layout.sample_range(outputs.batch)
        arrays = {name: array.numpy() for name, array in outputs.arrays.items()}
        index, label = outputs.index.numpy(), outputs.label.numpy()
        wrong = np.flatnonzero(index != np.arange(first, stop))
        if len(wrong):
            raise Failure(
                f"batch {outputs.batch} brought sample {index[wrong[0]]} where sample {first + wrong[0]} belongs; the "
                "loader must give the samples of a batch in the order of their index"
            )
        wrong = np.flatnonzero((label < 0) | (label >= outputs.num_classes))
        if len(wrong):
            raise Failure(
                f"sample {index[wrong[0]]} has label {label[wrong[0]]}, outside 0 to {outputs.num_classes - 1}; fix "
                "the data set or the number of classes"
            )
        for member, directory in enumerate(self._directories):
            _check_finite(member_arrays(arrays, member), index, self.layout.rows, directory)
        self._writer.add(outputs.batch, {"index": index, "label": label, **arrays})


@dataclass(frozen=True)
class _Outputs:
    """One batch on the host (for CUDA: once `arrived`)."""

    batch: int
    index: Tensor
    label: Tensor
    arrays: dict[str, Tensor]
    num_classes: int
    arrived: torch.cuda.Event | None


def statistics(logits_xBK: Tensor, label_B: Tensor, topk: int) -> dict[str, Tensor]:
    """What a record keeps of logits: `prediction` int32 and `probability` (x, topk, B); `margin`, `entropy` and
    `label_probability` (x, B), all float32.

    Computed in float32 whatever the logits' type. The confidences are bit for bit those of core.confidence, from one
    softmax instead of one each. Where classes tie, the lower one is predicted first. A label outside the classes gets
    the nearest class's probability: the caller checks.
    """
    logits_xBK = logits_xBK.detach().float()
    num_classes = logits_xBK.shape[-1]
    prediction_xBk = top_classes(logits_xBK, topk)
    first_xB1 = prediction_xBk[..., :1]
    label_B = label_B.to(logits_xBK.device, torch.int64, non_blocking=True)
    label_xB1 = label_B.clamp(0, num_classes - 1)[:, None].expand(first_xB1.shape)
    z_xBK = logits_xBK - logits_xBK.gather(-1, first_xB1)
    e_xBK = z_xBK.exp()
    sum_xB1 = e_xBK.sum(-1, keepdim=True)
    probability_xBk = e_xBK.gather(-1, prediction_xBk) / sum_xB1
    label_probability_xB1 = e_xBK.gather(-1, label_xB1) / sum_xB1
    entropy_xB1 = sum_xB1.log() - e_xBK.mul_(z_xBK).sum(-1, keepdim=True) / sum_xB1
    second_xB1 = z_xBK.scatter_(-1, first_xB1, -torch.inf).amax(-1, keepdim=True)
    return {
        "prediction": prediction_xBk.int().transpose(-1, -2),
        "probability": probability_xBk.transpose(-1, -2),
        "margin": (-second_xB1.expm1() / sum_xB1).squeeze(-1),
        "entropy": (1 - entropy_xB1 / math.log(num_classes)).clamp(0, 1).squeeze(-1),
        "label_probability": label_probability_xB1.squeeze(-1),
    }


def top_classes(logits_xK: Tensor, topk: int) -> Tensor:
    """(x, topk) int64: the most probable classes in order, the lower first where they tie."""
    if topk == 1:
        return _first_largest(logits_xK)
    rest_xK = logits_xK.clamp(min=torch.finfo(logits_xK.dtype).min)  # a copy, above the -inf of classes taken
    places = []
    for _ in range(topk):
        places.append(_first_largest(rest_xK))
        rest_xK.scatter_(-1, places[-1], -torch.inf)
    return torch.cat(places, -1)


def _first_largest(values_xK: Tensor) -> Tensor:
    # both promise the first of equals (torch.topk does not); on CPU numpy's is ten times as fast
    if values_xK.device.type == "cpu":
        return torch.from_numpy(values_xK.numpy().argmax(-1, keepdims=True))
    return values_xK.argmax(-1, keepdim=True)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy on the host; from CUDA through pinned memory, without waiting for it."""
    if not tensor.is_cuda:
        return tensor.cpu().clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _check_finite(
    arrays: Mapping[str, np.ndarray], index: np.ndarray, rows: Sequence[ExitRow], directory: Path
) -> None:
    for name in ("probability", "entropy", "gate"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            row, *_, column = np.argwhere(~np.isfinite(arrays[name]))[0]
            where = f"gate {row}" if name == "gate" else f"exit {rows[row]}"
            raise Failure(
                f"{where} of {directory} gave NaN or infinity for sample {index[column]}; its checkpoint is unsound: "
                f"{move_aside(directory)} after training it again"
            )
