"""Early exit that really stops early: samples that leave are dropped from the batch, the others continue.

An Engine makes routers (see engine.py).

Shapes: B batch, b samples still in it, P positions, K classes, D features.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dynexit.core.confidence import gate_features
from dynexit.models.families import State
from dynexit.models.multi_exit import MultiExit
from dynexit.models.products import PlainHead

NEAR = 1e-5
"""Batching changes the last bits of a confidence in float32 on a CPU; this close to a threshold they may decide."""
_SMALL_IMAGES = 256
"""From this tile on (activations of at most 128 KiB an image) oneDNN takes as long to prepare a convolution for a new
batch size as to compute tens of images. Batches then shrink to a few sizes only, with rows that nobody looks at."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the engine says of a batch: class and exit (0..P) of each sample, and the logits of that exit in float32.

    `near_B` marks samples that passed or took an exit with a confidence within the router's tolerance of its threshold.
    """

    prediction_B: np.ndarray
    exit_index_B: np.ndarray
    near_B: np.ndarray
    logits_BK: np.ndarray


def join(parts: Sequence[Answers]) -> Answers:
    """Returns the answers of consecutive batches as those of one."""
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in dataclasses.fields(Answers)]
    return Answers(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def even_parts(images: Tensor, most: int | None) -> Sequence[Tensor]:
    """Returns the images in as few parts as possible of at most `most`, of nearly the same size."""
    return [images] if most is None else images.tensor_split(-(-len(images) // most))


@dataclasses.dataclass(frozen=True)
class Stop:
    """An exit on the way: its position number, that of the exit before (-1: none), and how it decides."""

    p: int
    before_p: int
    head: PlainHead
    threshold: float | None  # None: JEI-DNN's rule on the gates' outputs
    gate: tuple[Tensor, Tensor] | None  # weight (4,), bias ()
    sure_limit: float | None  # with no probability of the head above it a sample passes; None: something else decides


@dataclasses.dataclass(slots=True)
class InFlight:
    """Samples on their way between two exits, b of them. Router.advance takes them on, in place.

    `ids_b` are their places in what was asked for, `near_b` as in Answers, `used_b` what the exits passed used of the
    exit probability (gates), `before_bK` the logits of the exit before (additive heads), `feature_cD` what the last
    position read (concatenated features). `state` and `feature_cD` may have further rows, which nobody looks at.
    """

    state: State
    ids_b: np.ndarray
    near_b: np.ndarray
    used_b: np.ndarray | None = None
    before_bK: Tensor | None = None
    feature_cD: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids_b)

    def drop(self, leaves_b: np.ndarray, num_kept: int, num_rows: int) -> None:
        """Drops those that leave. The last that stay move to the places of the others, so that few are copied.

        Of the others as many rows stay as make it `num_rows`.
        """
        tensor = _tensor_of(self.state)
        holes = leaves_b[:num_kept].nonzero()[0]
        places = np.arange(num_rows)
        if len(holes):
            movers = num_kept + (~leaves_b[num_kept:]).nonzero()[0]
            places[holes] = movers
            _move_rows(tensor, movers, holes)
        self.state = _with_tensor(self.state, tensor[:num_rows])
        kept = places[:num_kept]
        self.ids_b, self.near_b = self.ids_b[kept], self.near_b[kept]
        if self.used_b is not None:
            self.used_b = self.used_b[kept]
        rows = torch.from_numpy(places).to(tensor.device)
        if self.before_bK is not None:
            self.before_bK = self.before_bK[rows[:num_kept]]
        if self.feature_cD is not None:
            self.feature_cD = self.feature_cD[rows]

    def split(self, size: int) -> tuple["InFlight", "InFlight"]:
        """Returns the first `size` of them and the others."""
        return self._part(slice(size)), self._part(slice(size, len(self)))

    def without_rows(self) -> "InFlight":
        """Returns them without further rows."""
        return self._part(slice(len(self)))

    def _part(self, chosen: slice) -> "InFlight":
        return InFlight(
            _with_tensor(self.state, _tensor_of(self.state)[chosen]),
            self.ids_b[chosen],
            self.near_b[chosen],
            None if self.used_b is None else self.used_b[chosen],
            None if self.before_bK is None else self.before_bK[chosen],
            None if self.feature_cD is None else self.feature_cD[chosen],
        )


@dataclasses.dataclass(frozen=True)
class Leaving:
    """Samples that left at one exit: their ids, `near` as in Answers, and the exit's logits (b, K)."""

    exit_index: int
    ids_b: np.ndarray
    near_b: np.ndarray
    logits_bK: np.ndarray


def _move_rows(tensor: Tensor, source_k: np.ndarray, to_k: np.ndarray) -> None:
    """Copies rows within a tensor; numpy takes a fifth of torch's time for the few rows of small images."""
    last = tensor.dim() == 4 and not tensor.is_contiguous()  # channels
    laid_out = tensor.permute(0, 2, 3, 1) if last else tensor
    if tensor.dtype == torch.float32 and tensor.device.type == "cpu" and laid_out.is_contiguous():
        rows = laid_out.numpy()
        rows[to_k] = rows[source_k]
    else:
        to, source = torch.from_numpy(to_k).to(tensor.device), torch.from_numpy(source_k).to(tensor.device)
        tensor.index_copy_(0, to, tensor.index_select(0, source))


def _tensor_of(state: State) -> Tensor:
    tensor: Tensor = state[0] if isinstance(state, tuple) else state
    return tensor


def _with_tensor(state: State, tensor: Tensor) -> State:
    return (tensor, *state[1:]) if isinstance(state, tuple) else tensor


def join_in_flight(parts: Sequence[InFlight], num_rows: int) -> InFlight:
    """Returns samples that passed the same exits as one batch, of `num_rows` rows if there are several parts."""
    if len(parts) == 1:
        return parts[0]
    parts = [part.without_rows() for part in parts]
    first, num_more = parts[0], num_rows - sum(map(len, parts))
    return InFlight(
        _with_tensor(first.state, _in_a_row([_tensor_of(part.state) for part in parts], num_more)),
        np.concatenate([part.ids_b for part in parts]),
        np.concatenate([part.near_b for part in parts]),
        None if first.used_b is None else np.concatenate([part.used_b for part in parts if part.used_b is not None]),
        _joined([part.before_bK for part in parts]),
        _joined([part.feature_cD for part in parts], num_more),
    )


def _joined(tensors: Sequence[Tensor | None], num_more: int = 0) -> Tensor | None:
    """The tensors of all parts in a row and as many further rows; None if they have none."""
    given = [tensor for tensor in tensors if tensor is not None]
    return _in_a_row(given, num_more) if given else None


def _in_a_row(tensors: Sequence[Tensor], num_more: int) -> Tensor:
    return torch.cat([*tensors, *[tensors[0][:1]] * num_more])  # with zeros, channels would not stay last


Walk = Sequence[tuple[Sequence[Callable[[State], State]], Callable[[State], Tensor]]]
"""Blocks to run and what reads at the position then, as often as needed."""


class Router:
    """A backbone with one way to leave early: a configuration, or the gates. Immutable; threads may share it.

    `exit_index` counts all positions of the model, P is the backbone's own classifier.
    """

    def __init__(
        self,
        model: MultiExit,
        stops: Sequence[Stop],
        confidence: Callable[[Tensor], Tensor] | None,
        shrinkage: float,
        tile: int | None,
        tolerance: float,
    ) -> None:
        """`confidence` None stands for the gates' outputs; stops without a threshold leave it all to the gates."""
        self._model, self._stops, self._shrinkage = model, tuple(stops), shrinkage
        self._confidence, self.tolerance = confidence, tolerance
        self._concatenates = model.reading.concatenate
        self._by_gates = any(stop.threshold is None for stop in stops)
        parameter = next(model.parameters())
        self.device, self._dtype = parameter.device, parameter.dtype
        self.tile = tile
        """The most images that run together; None for any number."""
        self._few_sizes = self.tile is not None and self.tile >= _SMALL_IMAGES
        self.num_classes, self.num_stages = model.backbone.num_classes, len(self._stops) + 1
        self._walks = [self._walk(stop) for stop in stops]

    @torch.inference_mode()
    def classify(self, images: Tensor) -> Answers:
        """Class, exit and logits of every image (B, C, H, W), of any floating type; B is at least 1."""
        if len(images) == 1:
            return self._classify_one(images)
        return join([self._classify(tile) for tile in even_parts(images, self.tile)])

    def _classify_one(self, image: Tensor) -> Answers:
        state, near, used = self._model.start(image.to(self._dtype)), False, 0.0
        before: Tensor | None = None
        feature: Tensor | None = None
        for stop, walk in zip(self._stops, self._walks, strict=True):
            state, feature = self._reach(walk, state, feature)
            hidden = stop.head.hidden(feature)
            if stop.sure_limit is not None and stop.head.stays_below(stop.sure_limit, hidden):
                continue
            logits = self._logits(stop, hidden, before)
            value, before = self._measure(stop, logits).item(), logits
            if stop.threshold is None:
                left = 1 - used
                gap, used = max(min(value, left), 0.0) / left - 0.5, used + value
                leaves = gap >= 0
            else:
                gap = value - stop.threshold
                leaves = gap > 0
            near = near or abs(gap) <= self.tolerance
            if leaves:
                return _one_answer(logits, stop.p, near)
        return _one_answer(self._model.tail(state, self._last_p), len(self._model.positions), near)

    def _classify(self, images: Tensor) -> Answers:
        size = len(images)
        logits_BK = np.empty((size, self.num_classes), np.float32)
        exit_B, near_B = np.empty(size, np.int64), np.empty(size, bool)
        flight = self.admit(images, np.arange(size))
        for stage in range(self.num_stages):
            left = self.advance(stage, flight)
            if left is not None:
                logits_BK[left.ids_b], near_B[left.ids_b] = left.logits_bK, left.near_b
                exit_B[left.ids_b] = left.exit_index
                if not len(flight):
                    break
        return Answers(logits_BK.argmax(1), exit_B, near_B, logits_BK)

    def admit(self, images: Tensor, ids_b: np.ndarray) -> InFlight:
        """Returns images (b, C, H, W) as samples before the first stage. `ids_b` is theirs to name them by."""
        state = self._model.start(images.to(self._dtype))
        if _tensor_of(state).data_ptr() == images.data_ptr():  # samples are moved within it later
            state = _with_tensor(state, _tensor_of(state).clone())
        used_b = np.zeros(len(images), np.float32) if self._by_gates else None
        return InFlight(state, ids_b, np.zeros(len(images), bool), used_b)

    def advance(self, stage: int, flight: InFlight) -> Leaving | None:
        """Takes samples through one stage, in place. Returns those that left at its end, None if nobody did.

        Stages are 0..num_stages-1; the last one ends with the backbone's own classifier, where all leave.
        """
        if stage == len(self._stops):
            logits_bK = self._model.tail(flight.state, self._last_p)[: len(flight)].float().cpu().numpy()
            left = Leaving(len(self._model.positions), flight.ids_b, flight.near_b, logits_bK)
            flight.ids_b = flight.ids_b[:0]
            return left
        stop = self._stops[stage]
        flight.state, feature = self._reach(self._walks[stage], flight.state, flight.feature_cD)
        flight.feature_cD = feature if self._concatenates else None
        logits = self._logits(stop, stop.head.hidden(feature[: len(flight)]), flight.before_bK)
        value_b = self._measure(stop, logits).cpu().numpy()
        if stop.threshold is None:
            assert flight.used_b is not None
            # the conditional probability of stopping, P_l over what is left, is at least a half
            left_b = 1 - flight.used_b
            gap_b = np.maximum(np.minimum(value_b, left_b), 0) / left_b - np.float32(0.5)
            leaves_b = gap_b >= 0
            flight.used_b = flight.used_b + value_b
        else:
            gap_b = value_b - np.float32(stop.threshold)
            leaves_b = gap_b > 0
        flight.near_b = flight.near_b | (np.abs(gap_b) <= self.tolerance)
        if self._shrinkage:
            flight.before_bK = logits
        num_left = int(np.count_nonzero(leaves_b))
        if not num_left:
            return None
        logits_bK = logits.float().cpu().numpy()
        left = Leaving(stop.p, flight.ids_b[leaves_b], flight.near_b[leaves_b], logits_bK[leaves_b])
        num_kept = len(leaves_b) - num_left
        flight.drop(leaves_b, num_kept, min(self.num_rows(num_kept), len(_tensor_of(flight.state))))
        return left

    def num_rows(self, size: int) -> int:
        """Returns the rows to run for so many samples: for small images the next of 0, 1, 2, 4, 8, 16, 24, 32, ..."""
        if not self._few_sizes or size <= 1:
            return size
        return -(-size // 8) * 8 if size > 8 else 1 << (size - 1).bit_length()

    def _walk(self, stop: Stop) -> Walk:
        """The way to an exit from the one before. Concatenated features are read at every position on it."""
        first = stop.before_p + 1 if self._model.reading.concatenate else stop.p
        reads = range(first, stop.p + 1)
        return [
            (self._model.blocks_between(from_p, p), self._model.reader_at(p))
            for from_p, p in zip([stop.before_p, *reads], reads, strict=False)
        ]

    def _reach(self, walk: Walk, state: State, feature: Tensor | None) -> tuple[State, Tensor]:
        """The state at an exit and what it reads, from those at the exit before."""
        for blocks, read in walk:
            for block in blocks:
                state = block(state)
            own = read(state)
            feature = torch.cat((feature, own), -1) if self._concatenates and feature is not None else own
        assert feature is not None
        return state, feature

    @property
    def _last_p(self) -> int:
        return self._stops[-1].p if self._stops else -1

    def _logits(self, stop: Stop, hidden: Tensor, before: Tensor | None) -> Tensor:
        logits = stop.head.last_layer(hidden)
        return logits if before is None or not self._shrinkage else logits + self._shrinkage * before

    def _measure(self, stop: Stop, logits: Tensor) -> Tensor:
        """The number (b,) that decides, in float32: a confidence or the gate's output."""
        if stop.gate is None:
            assert self._confidence is not None
            return self._confidence(logits.float())
        weight, bias = stop.gate
        return (gate_features(logits) @ weight + bias).sigmoid().float()


def _one_answer(logits: Tensor, exit_index: int, near: bool) -> Answers:
    logits_1K = logits.float().cpu().numpy()
    return Answers(logits_1K.argmax(1), np.array([exit_index]), np.array([near]), logits_1K)
