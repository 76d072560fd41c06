"""Streaming with refill: samples of several batches run each stage together, so that deep stages run full."""

import collections
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from dynexit.deploy.router import Answers, InFlight, Leaving, Router, even_parts, join_in_flight
from dynexit.errors import UserError


class _Pending:
    """A batch whose answers are collected."""

    def __init__(self, size: int, num_classes: int) -> None:
        self.num_missing, self.since = size, time.monotonic()
        self.logits_BK = np.empty((size, num_classes), np.float32)
        self.exit_B, self.near_B = np.empty(size, np.int64), np.empty(size, bool)

    def answers(self) -> Answers:
        return Answers(self.logits_BK.argmax(1), self.exit_B, self.near_B, self.logits_BK)


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
        self.waiting[stage] -= self.max_batch - room
        return join_in_flight(parts)


def stream(
    router: Router, batches: Iterable[Tensor], max_batch: int, max_delay_ms: float | None = None
) -> Iterator[Answers]:
    """Yields the answers for every batch of images (B, C, H, W), in order; they are those of Router.classify.

    Runs the deepest stage that has `max_batch` samples waiting, else admits a batch. All queues are emptied, from the
    first stage on, at the end and when a batch has waited for `max_delay_ms`. Raises UserError unless `max_batch` is at
    least 1 and the delay, if there is one, at least 0.
    """
    if max_batch < 1:
        raise UserError(f"max_batch is {max_batch}; give at least 1")
    if max_delay_ms is not None and not max_delay_ms >= 0:
        raise UserError(f"max_delay_ms is {max_delay_ms}; give at least 0, or None to wait for full batches")
    return _stream(router, iter(batches), max_batch, max_delay_ms)


def _stream(router: Router, batches: Iterator[Tensor], max_batch: int, max_delay_ms: float | None) -> Iterator[Answers]:
    stages, pending = _Stages(router, max_batch), collections.deque[_Pending]()
    starts = collections.deque[int]()  # number of the first sample of each pending batch
    num_admitted, more = 0, True
    while more or pending:
        stage = stages.full()
        with torch.inference_mode():
            if stage is None and stages.admit():
                continue
        if stage is None and (not more or _is_late(pending, max_delay_ms)):
            stage = stages.shallowest()
        if stage is None:
            images = next(batches, None) if more else None
            more = images is not None
            if images is not None:
                pending.append(_Pending(len(images), router.num_classes))
                starts.append(num_admitted)
                stages.enter(images, num_admitted)
                num_admitted += len(images)
            continue
        with torch.inference_mode():
            left = stages.run(stage)
        if left is not None:
            _collect(left, pending, starts)
        while pending and not pending[0].num_missing:
            starts.popleft()
            yield pending.popleft().answers()


def _is_late(pending: "collections.deque[_Pending]", max_delay_ms: float | None) -> bool:
    if max_delay_ms is None or not pending:
        return False
    return 1000 * (time.monotonic() - pending[0].since) >= max_delay_ms


def _collect(left: Leaving, pending: "collections.deque[_Pending]", starts: "collections.deque[int]") -> None:
    first_b = np.searchsorted(np.array(starts), left.ids_b, side="right") - 1
    for place in np.unique(first_b):
        of_it, batch = first_b == place, pending[place]
        rows = left.ids_b[of_it] - starts[place]
        batch.logits_BK[rows], batch.near_B[rows] = left.logits_bK[of_it], left.near_b[of_it]
        batch.exit_B[rows] = left.exit_index
        batch.num_missing -= int(np.count_nonzero(of_it))
