"""Ranks: who computes what share, and sums over all of them.

Gradients of what trains are summed here, each rank's weighted by its count, so a batch means the same at any world
size. The frozen backbone is wrapped in nothing.

Tensors are summed in the main process group (NCCL on GPUs). Objects and waiting go through a second one over gloo,
where ranks may work for hours before they meet. It finds out at once if another rank has died.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dynexit.errors import Failure, UserError, is_transient
from dynexit.gpus import Gpus, choose_device, find_gpus, local_rank, own_gpu

T = TypeVar("T")

_TIMEOUT_SECONDS = 1800.0  # torch's own default
_LONGEST_WAIT = datetime.timedelta(days=7)
_FLIGHT_RECORDER = {  # of NCCL's collectives, by each name that torch reads
    ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",
    ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
}
_DUMP_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among all that do the same job."""

    global_rank: int
    world_size: int
    device: torch.device
    side_group: Any = None  # a torch.distributed.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.global_rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of `items`: disjoint over ranks, complete together, possibly empty."""
        return items[self.global_rank :: self.world_size]

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over ranks, in one message per dtype. No rank may leave a tensor out."""
        self.start_all_reduce(tensors)()

    def start_all_reduce(self, tensors: Iterable[Tensor]) -> Callable[[], None]:
        """Sends the tensors as `all_reduce` does; the function that it returns replaces them by their sums."""
        if self.world_size == 1:
            return lambda: None
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        under_way = []
        for same in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            under_way.append((same, flat, torch.distributed.all_reduce(flat, async_op=True)))

        def receive() -> None:
            for same, flat, work in under_way:
                work.wait()
                for tensor, part in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
                    tensor.copy_(part.view_as(tensor))

        return receive

    def to_device(self, tensor: Tensor) -> Tensor:
        """The tensor on this rank's device. Copies to a GPU go through pinned memory, so the host does not wait."""
        if self.device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def images_to_device(self, images: Tensor) -> Tensor:
        """As `to_device`, for what is large: a GPU copies it while it computes what it was given before."""
        if self.device.type != "cuda":
            return self.to_device(images)
        computing, copying = torch.cuda.current_stream(), _copying_stream(self.device)
        with torch.cuda.stream(copying):
            copied = self.to_device(images)
        computing.wait_stream(copying)
        copied.record_stream(computing)  # which reads it: its memory is not given away before
        return copied

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Whether each of `flags` holds on any rank, in one message; the same answers everywhere."""
        return self.start_any(flags)()

    def start_any(self, flags: Sequence[bool]) -> Callable[[], list[bool]]:
        """Sends `flags` as `any` does, and returns a function that waits for the answers; no GPU is waited for."""
        if self.world_size == 1:
            return lambda: list(flags)
        counts = torch.tensor(flags, dtype=torch.int32)
        group = self.side_group if self.device.type == "cuda" else None
        work = torch.distributed.all_reduce(counts, group=group, async_op=True)

        def answers() -> list[bool]:
            work.wait()
            return [bool(count) for count in counts.tolist()]

        return answers

    def broadcast(self, value: T) -> T:
        """The main rank's `value`, on every rank; waits for it as long as it takes."""
        if self.world_size == 1:
            return value
        values = [value if self.is_main else None]
        torch.distributed.broadcast_object_list(values, src=0, group=self.side_group)
        return values[0]  # type: ignore[return-value]

    def broadcast_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The main rank's tensors (on the CPU), on every rank; one at a time, so that each needs room for them once."""
        if self.world_size == 1:
            return dict(tensors)
        described = self.broadcast({name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()})
        received = {}
        for name, (dtype, shape) in described.items():
            value = tensors[name].contiguous() if self.is_main else torch.empty(shape, dtype=dtype)
            if value.numel():
                torch.distributed.broadcast(value.reshape(-1).view(torch.uint8), src=0, group=self.side_group)
            received[name] = value
        return received

    def check_same(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Raises Failure, on all ranks, if one has other bytes in `tensors` than the main rank has."""
        if self.world_size == 1:
            return
        digest = hashlib.sha256()
        for name, value in sorted(tensors.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        own = f"{socket.gethostname()}", digest.hexdigest()
        found = self.gather(own)
        others = [f"{rank} ({host})" for rank, (host, one) in enumerate(found) if one != found[0][1]]
        if others:
            failure = Failure(
                f"{what} of rank {', '.join(others)} differ from those of rank 0 ({found[0][0]}): the nodes read other "
                "files or run other software; compare the shared folder and the versions of Python's packages on them"
            )
            failure.on_all_ranks = True
            raise failure

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order of the ranks, on every rank; waits for them as long as it takes."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value, group=self.side_group)
        return values

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
            # not every subclass can be pickled
            own = (isinstance(error, UserError), str(error), is_transient(error))
        for is_users, text, may_succeed in filter(None, self.gather(own)):
            shared = UserError(text) if is_users else Failure(text)
            shared.on_all_ranks, shared.is_transient = True, may_succeed
            raise shared

    def once(self, compute: Callable[[], T]) -> T:
        """What `compute` returns on the main rank, on every rank. Its Failure or UserError is raised on all."""
        with self.failing_together():
            computed = [compute()] if self.is_main else []
        return self.broadcast(computed)[0]

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        if self.world_size > 1:
            torch.distributed.barrier(group=self.side_group)


@functools.cache
def _copying_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU's copies from the host."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def start_ranks(
    device: str = "auto",
    num_threads: int | None = None,
    timeout_seconds: float | None = None,
    probe: Callable[[], Gpus] | None = None,
) -> Ranks:
    """Joins the process group that torchrun, accelerate or SLURM announced in the environment, if any.

    `device` is auto, cpu or cuda; auto takes a GPU if there is one. All ranks have one device type before the group
    starts. In `Ranks.all_reduce` and `Ranks.any` a rank raises that waits for the others for longer than
    `timeout_seconds`; the first call of a process sets it. `probe` returns this machine's GPUs (default: `find_gpus`).
    Raises UserError, on all ranks, as choose_device, and where some ranks would use a GPU and others the CPU, or two of
    them the same GPU.
    """
    from accelerate import PartialState

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    gpus = probe() if probe else find_gpus(visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        chosen = _join(device, gpus, datetime.timedelta(seconds=timeout_seconds or _TIMEOUT_SECONDS))
    else:
        chosen = choose_device(device, gpus)
    state = PartialState(cpu=chosen == "cpu")
    return Ranks(state.process_index, state.num_processes, state.device, _side_group())


def _join(device: str, gpus: Gpus, timeout: datetime.timedelta) -> str:
    """Starts the process group once all ranks have the same device type, which it returns."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    problem = chosen = own = ""
    uuids: Sequence[str] = ()
    try:
        chosen = choose_device(device, gpus)
        uuids = gpus.uuids or (_uuids() if chosen == "cuda" else ())
        own = uuids[local_rank() % len(uuids)] if uuids else ""
    except UserError as error:
        problem = str(error)
    store.set(
        f"device/{rank}", json.dumps([chosen, problem, f"rank {rank} on {socket.gethostname()}", own, len(uuids)])
    )
    found = [json.loads(store.get(f"device/{other}")) for other in range(world_size)]
    problems = [f"{where}: {text}" for _, text, where, *_ in found if text]
    if not problems and len({kind for kind, *_ in found}) > 1:
        with_gpu, without = (next(where for k, _, where, *_ in found if k == kind) for kind in ("cuda", "cpu"))
        problems = [
            f"dist.device = {device!r}: {with_gpu} has a GPU and {without} has none; ask for nodes of one kind, or set "
            "dist.device=cpu"
        ]
    problems = problems or _sharing([(where, own, num_seen) for _, _, where, own, num_seen in found])
    if problems:
        store.set(f"device/read/{rank}", "")
        if rank == 0:  # the store ends with this process
            store.wait([f"device/read/{other}" for other in range(world_size)])
        shared = UserError(problems[0])
        shared.on_all_ranks = True
        raise shared
    record_flights()
    torch.distributed.init_process_group(
        "nccl" if chosen == "cuda" else "gloo",
        store=torch.distributed.distributed_c10d.PrefixStore("ranks", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=own_gpu() if chosen == "cuda" else None,
    )
    return chosen


def record_flights(dump_prefix: Path | None = None) -> None:
    """Has NCCL's process groups keep their last collectives, and dump them on a time-out. The user's variables stay.

    `dump_prefix` begins the name of each rank's file; torch takes a folder of its cache if it is None.
    """
    values = _FLIGHT_RECORDER | ({_DUMP_FILE: f"{dump_prefix}"} if dump_prefix is not None else {})
    for names, value in values.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def _uuids() -> tuple[str, ...]:
    return tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count()))


def _sharing(found: Iterable[tuple[str, str, int]]) -> list[str]:
    """A message if two ranks would use one GPU; of each rank: its name, its GPU's UUID or '', how many GPUs it sees."""
    users: dict[str, str] = {}
    for where, gpu, num_seen in found:
        if gpu in users:
            return [
                f"{users[gpu]} and {where} would share a GPU: the node shows {num_seen} to a rank, fewer than it has "
                "ranks; ask for nodes with as many GPUs as the others, or start at most one rank per GPU "
                "(dist.tasks_per_node, torchrun --nproc-per-node)"
            ]
        users |= {gpu: where} if gpu else {}
    return []


_side_groups: list[Any] = []


def _side_group() -> Any:
    """The group for objects and for waiting: over gloo, and with a time-out of its own. None for a single process."""
    if not _side_groups and torch.distributed.is_available() and torch.distributed.is_initialized():
        _side_groups.append(torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT))
    return next(iter(_side_groups), None)


def stop_ranks() -> None:
    """Leaves the process group; without this an interpreter may abort at exit."""
    _side_groups.clear()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
