"""Splits of a data set, and how their batches are loaded.

A split is asked for batches by index, so that batch i of an epoch is the same whatever the number of ranks or of
loading processes, and a run can start again in the middle of an epoch.
"""

import dataclasses
import hashlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dynexit.data.memory.intensities import GivesIntensities, Intensities
from dynexit.dist import Ranks
from dynexit.errors import UserError
from dynexit.study.dist import DistSettings

Batch = tuple[Tensor, Tensor, Tensor]  # index (B,) int64, images (B, C, H, W) float32, labels (B,) int64
_Loaded = tuple[Tensor, Tensor | Intensities, Tensor]
_Request = tuple[int, Sequence[int], bool]  # epoch, indices, whether the images may come as intensities


class Images(Protocol):
    """Images that are made when they are asked for."""

    def file_names(self) -> list[str] | None:
        """The file of each image, relative to data.dir; None if they are in no files of their own."""

    def share(self) -> None:
        """Makes room in memory for what is kept of the images, before processes start that share it."""

    def load(self, indices: Sequence[int], epoch: int) -> Tensor:
        """The images (B, C, H, W) of these samples in this epoch, the same in any process. UserError for damage."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """How batches are loaded, which is no part of what is in them."""

    num_workers: int = 0  # processes; 0 loads in this one
    persistent: bool = True  # whether the processes live on from one epoch to the next
    pin_memory: bool = False
    prefetch_batches: int = 2  # per process


def workers_of(dist: DistSettings, device: torch.device) -> Workers:
    """What the section `dist` asks for; memory is pinned only where it serves a GPU."""
    pin = dist.pin_memory and device.type == "cuda"
    return Workers(dist.num_workers, dist.persistent_workers, pin, dist.prefetch_batches)


class Split:
    """Samples: `images` (N, C, H, W) float32 in memory, or what makes them; `labels` (N,) int64; `origin` (N,).

    `origin` holds the original image of each sample: its row in the file or folder that the split was made from.
    """

    def __init__(self, images: Tensor | Images, labels: Tensor, origin: Tensor, workers: Workers | None = None) -> None:
        self.images, self.labels, self.origin = images, labels, origin
        self.workers = Workers() if workers is None else workers
        self._loader: _BatchLoader | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int], epoch: int = 0) -> Batch:
        """(index, images, labels) of these samples, loaded in this process."""
        index, images, labels = _batch(self.images, self.labels, (epoch, indices, False))
        return index, _on_device(images, None), labels

    def file_names(self) -> list[str] | None:
        """The file of each sample, relative to data.dir; None if the samples are in no files of their own."""
        return None if isinstance(self.images, Tensor) else self.images.file_names()

    def describe(self) -> tuple[int, str]:
        """The number of samples, and a SHA-256 of their labels and files; pixels are not read."""
        found = hashlib.sha256(self.labels.numpy().tobytes())
        found.update("\0".join(self.file_names() or ()).encode(errors="surrogateescape"))
        return len(self), found.hexdigest()

    def loader(self) -> "_BatchLoader":
        """The processes that load this split."""
        if self._loader is None or not self.workers.persistent:
            if not isinstance(self.images, Tensor):
                self.images.share()
            self._loader = _BatchLoader(_Requests(self.images, self.labels), self.workers)
        return self._loader


@dataclasses.dataclass(frozen=True)
class DataSets:
    """Train, validation and test split of a data set, and what a model must know of it.

    `plain_train` is the training split under the test's transform, for records. `class_names` are in the order of the
    labels. `remarks` are lines for the log on what was found and what was skipped.
    """

    train: Split
    plain_train: Split
    validation: Split
    test: Split
    num_classes: int
    in_channels: int
    image_size: int
    class_names: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def split(self, name: str) -> Split:
        """The split called `train`, `validation` or `test`, its images not augmented."""
        split: Split = getattr(self, "plain_train" if name == "train" else name)
        return split


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Returns a random order (N,) int64 of the samples of which every part has the classes in their shares.

    A class's count in a part differs from its share by less than two. The last sample of each class comes at the
    end, so that a class with few images stays in training. `labels` (N,) int64 are not negative.
    """
    order = np.random.default_rng([seed, 0]).permutation(len(labels))
    label_N = labels.numpy()[order]
    count_N = np.bincount(label_N)[label_N]
    by_class = np.argsort(label_N, kind="stable")
    rank_N = np.empty_like(order)  # of each sample among those of its class
    rank_N[by_class] = np.arange(len(order)) - np.searchsorted(label_N[by_class], label_N[by_class])
    place_N = np.where(rank_N == count_N - 1, 1.0, (rank_N + 0.5) / count_N)
    return torch.from_numpy(order[np.argsort(place_N, kind="stable")])


def epoch_batches(num_samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches as lists of indices: a permutation that depends on (seed, epoch) alone; the last is short."""
    order = np.random.default_rng([seed, epoch]).permutation(num_samples).tolist()
    return [order[i : i + batch_size] for i in range(0, num_samples, batch_size)]


def load_batches(
    split: Split, batches: Sequence[Sequence[int]], epoch: int = 0, ranks: Ranks | None = None
) -> Iterator[Batch]:
    """Yields (index, images, labels) of each of `batches`, in order, as the split's `workers` say.

    Images that are augmented depend on `epoch`; others do not. A batch may be empty. With `ranks`, images lie on
    their device; a GPU gets those that are held as uint8 in that form, and finishes them. Persistent workers serve one
    iterator of a split at a time. Raises UserError, naming it, for an image that does not decode.
    """
    is_finished_there = ranks is not None and ranks.device.type == "cuda"
    requests = [(epoch, list(indices), is_finished_there) for indices in batches]
    here = (_batch(split.images, split.labels, request) for request in requests)
    loaded = split.loader().load(requests) if split.workers.num_workers else here
    for index, images, labels in loaded:
        yield index, _on_device(images, ranks), labels


def _batch(images: Tensor | Images, labels: Tensor, request: _Request) -> _Loaded:
    epoch, indices, is_finished_there = request
    index = torch.as_tensor(indices, dtype=torch.int64)
    found: Tensor | Intensities | None = None
    if is_finished_there and isinstance(images, GivesIntensities):
        found = images.intensities(indices, epoch)
    if found is None:
        found = images[index] if isinstance(images, Tensor) else images.load(indices, epoch)
    return index, found, labels[index]


def _on_device(images: Tensor | Intensities, ranks: Ranks | None) -> Tensor:
    move = (lambda tensor: tensor) if ranks is None else ranks.images_to_device
    return images.images(move) if isinstance(images, Intensities) else move(images)


class _Requests(Dataset[_Loaded]):
    """What a loading process holds: it is sent a request and sends back a batch, or the mistake it met."""

    def __init__(self, images: Tensor | Images, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __getitems__(self, request: _Request) -> _Loaded | UserError:
        try:
            return _batch(self.images, self.labels, request)
        except UserError as mistake:  # raised there, it would come here as the text of a traceback
            return mistake


class _BatchLoader:
    """Loading processes, and the queue of their requests."""

    def __init__(self, requests: _Requests, workers: Workers) -> None:
        self.queue: list[_Request] = []
        self.turn = 0
        self.loader: DataLoader[Any] = DataLoader(
            requests,
            batch_sampler=self.queue,  # type: ignore[arg-type]
            collate_fn=_as_is,  # type: ignore[arg-type]
            num_workers=workers.num_workers,
            persistent_workers=workers.persistent,
            pin_memory=workers.pin_memory,
            prefetch_factor=workers.prefetch_batches,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # else every epoch would draw from the generator that training uses
        )

    def load(self, requests: Sequence[_Request]) -> Iterator[_Loaded]:
        """Yields the batches that `requests` ask for, unless another call takes the processes meanwhile."""
        self.turn += 1
        turn, self.queue[:], num_left = self.turn, requests, len(requests)
        for batch in self.loader:
            if turn != self.turn:
                break
            if isinstance(batch, UserError):
                try:
                    raise batch
                finally:
                    del batch  # a cycle through its traceback would hold the processes, and ending them would take long
            num_left -= 1
            yield batch
        if num_left:
            raise RuntimeError("the workers of a split were given other batches while these were being read")


def _as_is(batch: _Loaded | UserError) -> _Loaded | UserError:
    return batch


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C and SLURM's warning reach every process of a job; the main one saves, and needs its batch for that."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
