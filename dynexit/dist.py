"""Ranks: who computes what share, and sums over all of them.

Gradients of what trains are summed here, each rank's weighted by its count, so a batch means the same at any world
size. The frozen backbone is wrapped in nothing.
"""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dynexit.errors import Failure, UserError, is_transient

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among all that do the same job."""

    global_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.global_rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of `items`: disjoint over ranks, complete together, possibly empty."""
        return items[self.global_rank :: self.world_size]

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over ranks, in one message per dtype. No rank may leave a tensor out."""
        if self.world_size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for same in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            torch.distributed.all_reduce(flat)
            for tensor, part in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Whether each of `flags` holds on any rank, in one message; the same answers everywhere."""
        if self.world_size == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(counts)
        return [bool(count) for count in counts.tolist()]

    def broadcast(self, value: T) -> T:
        """The main rank's `value`, on every rank."""
        if self.world_size == 1:
            return value
        values = [value if self.is_main else None]
        torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Work that each rank does by itself: where one meets a Failure or a UserError, all raise its sentence.

        Otherwise the others would wait for it, and its sentence would be taken for a crash.
        """
        if self.world_size == 1:
            yield
            return
        own = None
        try:
            yield
        except (Failure, UserError) as error:
            # of a subclass not each comes through a pickle
            own = (isinstance(error, UserError), str(error), is_transient(error))
        errors: list[tuple[bool, str, bool] | None] = [None] * self.world_size
        torch.distributed.all_gather_object(errors, own)
        for is_users, text, may_succeed in filter(None, errors):
            shared = UserError(text) if is_users else Failure(text)
            shared.on_all_ranks, shared.is_transient = True, may_succeed
            raise shared

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.world_size > 1:
            torch.distributed.barrier()


def start_ranks(device: str = "auto", num_threads: int | None = None, timeout_seconds: float | None = None) -> Ranks:
    """Joins the process group that torchrun, accelerate or SLURM announced in the environment, if any.

    `device` is auto, cpu or cuda; auto takes a GPU where there is one. A rank that waits for the others for longer than
    `timeout_seconds` raises; what the first call of a process says of it holds.
    """
    from accelerate import PartialState

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    use_cpu = device == "cpu" or not torch.cuda.is_available()
    announced = int(os.environ.get("WORLD_SIZE", "1")) > 1 and timeout_seconds is not None
    options = {"timeout": datetime.timedelta(seconds=timeout_seconds or 0)} if announced else {}
    state = PartialState(cpu=use_cpu, **options)
    return Ranks(state.process_index, state.num_processes, state.device)


def stop_ranks() -> None:
    """Leaves the process group; without this an interpreter may abort at exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
