"""Streaming with refill: samples of several batches run each stage together, so that deep stages run full."""

import collections
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynexit.arguments import number, shown, whole_number
from dynexit.deploy.router import Answers, InFlight, Leaving, Router, even_parts, join_in_flight
from dynexit.errors import UserError


class _Pending:
    """The answers of batches until they are complete. Samples are numbered in the order in which they enter."""

    _logits_NK: np.ndarray
    _exit_N: np.ndarray
    _near_N: np.ndarray
    _batch_N: np.ndarray

    def __init__(self, num_classes: int) -> None:
        self._num_classes, self._first, self._num_batches_done = num_classes, 0, 0  # _first: that of row 0
        self._size, self._end = 0, 0  # rows there are; number of the next sample
        self._batches = collections.deque[_PendingBatch]()
        self._make_room(0)

    def __len__(self) -> int:
        return len(self._batches)

    def enter(self, size: int) -> int:
        """Takes a batch. Returns the number of its first sample."""
        start = self._end
        if start + size - self._first > self._size:
            self._make_room(size)
        self._batch_N[start - self._first : start + size - self._first] = self._num_batches_done + len(self._batches)
        self._batches.append(_PendingBatch(start, size, size, time.monotonic()))
        self._end += size
        return start

    def _make_room(self, more: int) -> None:
        """Makes rows for twice as many samples as there are; batches that were given out keep the old ones."""
        first = self._batches[0].start if self._batches else self._end
        kept = slice(first - self._first, self._end - self._first)
        before = (
            (self._logits_NK[kept], self._exit_N[kept], self._near_N[kept], self._batch_N[kept]) if self._end else ()
        )
        self._first, self._size = first, max(2 * (self._end - first + more), 256)
        self._logits_NK = np.empty((self._size, self._num_classes), np.float32)
        self._exit_N, self._near_N = np.empty(self._size, np.int64), np.empty(self._size, bool)
        self._batch_N = np.empty(self._size, np.int64)
        for old, new in zip(before, (self._logits_NK, self._exit_N, self._near_N, self._batch_N), strict=False):
            new[: len(old)] = old

    def collect(self, left: Leaving) -> None:
        """Notes the answers of samples that left."""
        row_b = left.ids_b - self._first
        self._logits_NK[row_b], self._near_N[row_b], self._exit_N[row_b] = left.logits_bK, left.near_b, left.exit_index
        counts = np.bincount(self._batch_N[row_b] - self._num_batches_done)
        for place in counts.nonzero()[0].tolist():
            self._batches[place].num_missing -= int(counts[place])

    def seconds_left(self, max_delay_ms: float | None) -> float | None:
        """Returns how long the oldest batch may still wait, 0 if it is late; None for any time."""
        if max_delay_ms is None or not self._batches:
            return None
        return max(self._batches[0].since + max_delay_ms / 1000 - time.monotonic(), 0)

    def complete(self) -> Iterator[Answers]:
        """Gives out the oldest batches as far as they are complete."""
        while self._batches and not self._batches[0].num_missing:
            batch = self._batches.popleft()
            self._num_batches_done += 1
            rows = slice(batch.start - self._first, batch.start - self._first + batch.size)
            logits_BK = self._logits_NK[rows]
            yield Answers(logits_BK.argmax(1), self._exit_N[rows], self._near_N[rows], logits_BK)


@dataclasses.dataclass(slots=True)
class _PendingBatch:
    start: int
    size: int
    num_missing: int
    since: float


class _Stages:
    """A queue of samples before every stage. Samples are numbered in the order in which they enter."""

    def __init__(self, router: Router, max_batch: int) -> None:
        self.router, self.max_batch = router, min(max_batch, router.tile or max_batch)
        self.entering = collections.deque[tuple[Tensor, np.ndarray]]()
        self.queues: list[collections.deque[InFlight]] = [collections.deque() for _ in range(router.num_stages)]
        self.waiting = [0] * router.num_stages

    def enter(self, images: Tensor, first: int) -> None:
        """Takes images, numbered from `first` on, in parts that `admit` then runs."""
        for part in even_parts(images, self.max_batch):
            self.entering.append((part, np.arange(first, first + len(part))))
            first += len(part)

    def admit(self) -> bool:
        """Runs the start of the next part that entered. Returns whether there was one."""
        if self.entering:
            self._put(0, self.router.admit(*self.entering.popleft()))
            return True
        return False

    def full(self) -> int | None:
        """Returns the deepest stage with a full batch, None if there is none."""
        stages = reversed(range(len(self.waiting)))
        return next((stage for stage in stages if self.waiting[stage] >= self.max_batch), None)

    def shallowest(self) -> int | None:
        """Returns the first stage with any sample, None if all are done."""
        return next((stage for stage, count in enumerate(self.waiting) if count), None)

    def run(self, stage: int) -> Leaving | None:
        """Runs up to `max_batch` samples through a stage. Returns those that left."""
        flight = self._take(stage)
        left = self.router.advance(stage, flight)
        if len(flight):
            self._put(stage + 1, flight)
        return left

    def _put(self, stage: int, flight: InFlight) -> None:
        self.queues[stage].append(flight)
        self.waiting[stage] += len(flight)

    def _take(self, stage: int) -> InFlight:
        parts, room = [], self.max_batch
        while self.queues[stage] and room:
            part = self.queues[stage].popleft()
            if len(part) > room:
                part, rest = part.split(room)
                self.queues[stage].appendleft(rest)
            parts.append(part)
            room -= len(part)
        size = self.max_batch - room
        self.waiting[stage] -= size
        return join_in_flight(parts, self.router.num_rows(size))


class _Awaited(Iterator[Any]):
    """Items that a thread pulls, each when it is asked for, so that they can be awaited with a time limit.

    The thread is a daemon: neither `close` nor the end of the program waits for a slow loader.
    """

    def __init__(self, items: Iterator[Any]) -> None:
        self._items, self._is_asked = items, False
        self._asks = queue.SimpleQueue[bool]()
        self._found = queue.SimpleQueue[tuple[Any, BaseException | None]]()
        self._next: tuple[Any, BaseException | None] = None, None
        threading.Thread(target=self._pull, daemon=True).start()

    def comes_within(self, seconds: float | None) -> bool:
        """Whether `next` has an answer within that time, which may be the end or an error; None waits for it."""
        if not self._is_asked:
            self._asks.put(True)
            self._is_asked = True
        try:
            self._next = self._found.get(timeout=None if seconds is None else min(seconds, threading.TIMEOUT_MAX))
        except queue.Empty:
            return False
        self._is_asked = False
        return True

    def __next__(self) -> Any:
        """Returns the item that `comes_within` has waited for, or raises what the loader raised."""
        item, error = self._next
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Ends the thread as soon as it is out of the loader."""
        self._asks.put(False)

    def _pull(self) -> None:
        while self._asks.get():
            try:
                self._found.put((next(self._items), None))
            except BaseException as error:  # StopIteration too
                self._found.put((None, error))


def stream(
    router: Router,
    batches: Iterable[Any],
    max_batch: int,
    max_delay_ms: float | None = None,
    take: Callable[[Any], Tensor] = lambda images: images,
) -> Iterator[Answers]:
    """Yields the answers for every batch, in order; they are those of Router.classify.

    `take` makes images (B, C, H, W) of a batch when it enters. Runs the deepest stage that has `max_batch` samples
    waiting, else admits a batch. All queues are emptied, from the first stage on, at the end and when a batch has
    waited for `max_delay_ms`; with a delay a thread pulls the batches, so that a slow loader delays no answers. An
    error of `batches` or `take` is raised after the answers for all batches before it. Raises UserError unless
    `max_batch` is at least 1 and the delay, if there is one, at least 0, and for batches that are not iterable.
    """
    max_batch = whole_number("max_batch", max_batch)
    if max_delay_ms is not None:
        max_delay_ms = number("max_delay_ms", max_delay_ms)
    if not (hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")):
        raise UserError(f"a stream takes batches, and got {shown(batches)}; give a list or a loader of them")
    return _stream(router, iter(batches), max_batch, max_delay_ms, take)


def _stream(
    router: Router,
    batches: Iterator[Any],
    max_batch: int,
    max_delay_ms: float | None,
    take: Callable[[Any], Tensor],
) -> Iterator[Answers]:
    stages, pending = _Stages(router, max_batch), _Pending(router.num_classes)
    awaited = None if max_delay_ms is None else _Awaited(batches)
    entering = map(take, batches if awaited is None else awaited)
    more, fault = True, None
    try:
        while more or pending:
            stage = stages.full()
            with torch.inference_mode():
                if stage is None and stages.admit():
                    continue
            if stage is None and (not more or pending.seconds_left(max_delay_ms) == 0):
                stage = stages.shallowest()
            if stage is None:
                if awaited is None or awaited.comes_within(pending.seconds_left(max_delay_ms)):
                    try:
                        images = next(entering, None)
                    except Exception as error:
                        images, fault = None, error
                    more = images is not None
                    if images is not None:
                        stages.enter(images, pending.enter(len(images)))
                continue
            with torch.inference_mode():
                left = stages.run(stage)
            if left is not None:
                pending.collect(left)
                yield from pending.complete()
        if fault is not None:
            raise fault
    finally:
        if awaited is not None:
            awaited.close()
