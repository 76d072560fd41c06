"""A pretend CUDA device: arithmetic on the CPU, and a tag on each storage that "lies on" cuda:0.

FakeTensorMode cannot run a backward pass of fake CUDA tensors on a wheel without a GPU, and stops at every item().
Here a tensor is an ordinary CPU tensor. A TorchFunctionMode answers .device and .is_cuda and does the moves (to, cpu,
device=); a TorchDispatchMode sees every aten operation, also those of the backward pass. It raises where CUDA would
(two devices, .numpy() of a device tensor) and where a tensor is read that another stream may not have copied yet, and
counts kernels, bytes, and the places where the host would wait.
"""

import collections
import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_ROOT = Path(__file__).parent.parent
_PER_FOREACH = 30  # tensors that one kernel of a _foreach operation takes, about

_READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__nonzero__", "__format__"}
_WAITING = {"aten.nonzero", "aten.masked_select", "aten.equal", "aten._unique2"}
_INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}
_NO_KERNEL = {
    *("aten._unsafe_view", "aten.detach", "aten.alias", "aten.lift_fresh", "aten.empty", "aten.empty_like"),
    *("aten.new_empty", "aten.new_empty_strided", "aten.empty_strided", "aten.set_", "aten._local_scalar_dense"),
}


class MixedDevicesError(RuntimeError):
    """An operation on tensors of two devices."""


class RaceError(RuntimeError):
    """An operation on a tensor that another stream copies: not waited for, or its memory not kept for this one."""


class World:
    """What lies on the pretend device, and what was counted since `reset`."""

    def __init__(self) -> None:
        self._tagged: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self._under_way: dict[int, StorageWeakRef] = {}
        self._not_kept: dict[int, StorageWeakRef] = {}
        self.stream: object = None  # the one that is chosen by torch.cuda.stream
        self.inside = False  # a call on device tensors: what C++ creates lies there too
        self.reset()

    def reset(self) -> None:
        """Starts counting again."""
        self.waits: collections.Counter[str] = collections.Counter()
        """Times that the host waits for the device, by what waits and where."""
        self.kernels: collections.Counter[str] = collections.Counter()
        """Kernels by operation."""
        self.num_bytes = 0
        """Bytes that kernels read and write."""
        self.copied: collections.Counter[torch.dtype] = collections.Counter()
        """Bytes that were copied from the host to the device."""

    @property
    def num_waits(self) -> int:
        return self.waits.total()

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()

    def has(self, tensor: Tensor) -> bool:
        """Whether the tensor lies on the device."""
        return self._is_in(self._tagged, tensor)

    def has_pinned(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in pinned memory."""
        return self._is_in(self._pinned, tensor)

    def copies(self, tensor: Tensor) -> None:
        """Notes that the chosen stream copies the tensor."""
        if self.stream is not None:
            storage = tensor.untyped_storage()
            for known in (self._under_way, self._not_kept):
                known[storage._cdata] = StorageWeakRef(storage)

    def wait(self) -> None:
        """The computing stream waits for the copies."""
        self._under_way.clear()

    def keep(self, tensor: Tensor) -> None:
        """The memory is kept until the computing stream has read it."""
        self._not_kept.pop(tensor.untyped_storage()._cdata, None)

    def check_races(self, name: str, tensors: Iterable[Tensor]) -> None:
        """Raises RaceError if another stream's copy is not waited for, or not kept."""
        for tensor in tensors:
            if self._is_in(self._under_way, tensor) or self._is_in(self._not_kept, tensor):
                raise RaceError(f"{name} reads what another stream copies; call wait_stream and record_stream")

    @staticmethod
    def _is_in(known: dict[int, StorageWeakRef], tensor: Tensor) -> bool:
        if tensor.is_meta or tensor.layout != torch.strided:
            return False
        key = tensor.untyped_storage()._cdata
        if key in known and known[key].expired():  # another storage took its address
            del known[key]
        return key in known

    def put(self, values: Any, *, pinned: bool = False) -> Any:
        """Tags every tensor in `values`, and returns them."""
        for tensor in _tensors(values):
            storage = tensor.untyped_storage()
            (self._pinned if pinned else self._tagged)[storage._cdata] = StorageWeakRef(storage)
        return values

    def note_wait(self, what: str) -> None:
        """Counts a wait at the innermost line of the project (but not of this file)."""
        frame = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(_ROOT) and path != Path(__file__) and ".venv" not in path.parts:
                self.waits[f"{what} at {path.relative_to(_ROOT)}:{frame.f_lineno}"] += 1
                return
            frame = frame.f_back  # type: ignore[assignment]
        self.waits[what] += 1


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_meta]


class _Functions(TorchFunctionMode):
    """Python's view of the device: attributes, moves and creation."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, world = dict(kwargs or {}), self.world
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], Tensor) and not args[0].is_meta else None
        if name == "__get__":
            return self._attribute(func, args, first)
        if name == "_parse_to":
            return func(*args, **kwargs)
        if first is not None and name in ("to", "cpu", "cuda"):
            return self._move(func, name, first, args[1:], kwargs)
        if first is not None and name == "pin_memory":
            return world.put(first.clone(), pinned=True)
        if first is not None and name == "is_pinned":
            return world.has_pinned(first)
        if first is not None and world.has(first):
            if name in ("numpy", "__array__"):
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
            if name in _READS:
                world.note_wait(name)
            elif name == "new_tensor":
                world.note_wait(name)
                return world.put(func(*args, **kwargs))
        return self._call(func, name, args, kwargs)

    def _attribute(self, func: Any, args: Any, first: Tensor | None) -> Any:
        owner = getattr(func, "__self__", None)
        on = first is not None and self.world.has(first)
        if owner is torch.Tensor.device and on:  # type: ignore[comparison-overlap]
            return CUDA
        if owner is torch.Tensor.is_cuda:  # type: ignore[comparison-overlap]
            return on
        if owner is torch.Tensor.is_cpu and on:  # type: ignore[comparison-overlap]
            return False
        return func(*args)

    def _call(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        world, pinned = self.world, name in ("empty", "zeros", "tensor") and kwargs.pop("pin_memory", False)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            if name in ("tensor", "as_tensor"):
                world.note_wait(f"torch.{name}")
            return world.put(func(*args, **{**kwargs, "device": CPU}))
        before, world.inside = world.inside, any(world.has(tensor) for tensor in _tensors((args, kwargs)))
        try:
            out = func(*args, **kwargs)
        finally:
            world.inside = before
        return world.put(out, pinned=True) if pinned else out

    def _move(self, func: Any, name: str, tensor: Tensor, rest: Any, kwargs: dict[str, Any]) -> Tensor:
        world, on = self.world, self.world.has(tensor)
        device: torch.device | None
        dtype, non_blocking, layout = None, kwargs.get("non_blocking", False), kwargs.get("memory_format")
        if name != "to":
            device = CPU if name == "cpu" else CUDA
        elif rest and isinstance(rest[0], Tensor):
            device, dtype = (CUDA if world.has(rest[0]) else CPU), rest[0].dtype
        else:
            options = {key: value for key, value in kwargs.items() if key != "copy"}
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*rest, **options)
        if device is not None and device.type == "meta":
            return func(tensor, *rest, **kwargs)  # type: ignore[no-any-return]
        onto = on if device is None else device.type == "cuda"
        formatted = {} if layout is None else {"memory_format": layout}
        if onto == on:
            copied = kwargs.get("copy", False)
            return torch.Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=copied, **formatted)
        with torch._C.DisableTorchFunction(), _without_dispatch():
            out = torch.Tensor.to(tensor, dtype=dtype or tensor.dtype, copy=True, **formatted)
        if onto:
            if not (non_blocking and world.has_pinned(tensor)):
                world.note_wait("copy to the device from " + ("pinned" if world.has_pinned(tensor) else "pageable"))
            world.copied[tensor.dtype] += tensor.nbytes
            world.copies(out)
            return world.put(out)  # type: ignore[no-any-return]
        world.note_wait("copy to the host")
        return out


@contextlib.contextmanager
def _without_dispatch() -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


class _Operations(TorchDispatchMode):
    """What runs: every aten operation, of forward and backward passes."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, world, name = kwargs or {}, self.world, str(func).rpartition(".")[0]
        given = _tensors((args, kwargs))
        on = [tensor for tensor in given if world.has(tensor)]
        if on and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        if on and len(on) < len(given):
            if name == "aten.copy_":
                return self._copy(func, args, kwargs)
            self._check_devices(name, args, [tensor for tensor in given if not world.has(tensor)])
        if on:
            world.check_races(name, on)
            self._note_waits(name, args)
        out = func(*args, **kwargs)
        if on or (not given and world.inside):
            world.put(out)
        if on and name not in _NO_KERNEL and not _is_view(func):
            outputs = _tensors(out)
            num = max(1, len(outputs or on) // _PER_FOREACH) if name.startswith("aten._foreach") else 1
            world.kernels[name] += num
            world.num_bytes += sum(tensor.nbytes for tensor in (*on, *outputs))
        return out

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source = args[:2]
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        to_device = self.world.has(target)
        if not (non_blocking and self.world.has_pinned(source if to_device else target)):
            self.world.note_wait("copy_ to the " + ("device" if to_device else "host"))
        return func(*args, **kwargs)

    def _check_devices(self, name: str, args: Any, strange: Iterable[Tensor]) -> None:
        indices: list[Tensor] = []
        if name in _INDEXING and self.world.has(args[0]):
            indices = [index for index in args[1] if index is not None and not self.world.has(index)]
        if indices or name == "aten.index_fill_":
            self.world.note_wait("index from the host")
        if name == "aten.where":  # CUDA copies a scalar of the host
            self.world.note_wait("scalar from the host")
        for tensor in strange:
            if tensor.dim() and name != "aten.index_fill_" and not any(tensor is index for index in indices):
                raise MixedDevicesError(f"{name} on cuda:0 and a CPU tensor of shape {tuple(tensor.shape)}")

    def _note_waits(self, name: str, args: Any) -> None:
        if name in _WAITING:
            self.world.note_wait(name)
        if name in _INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.world.note_wait("index by a mask")


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


class _Event:
    def synchronize(self) -> None:
        """Nothing is under way."""


class _Stream:
    def __init__(self, world: World | None = None) -> None:
        self.world = world

    def record_event(self) -> _Event:
        return _Event()

    def wait_stream(self, other: "_Stream") -> None:
        """Has the computing stream wait for `other`."""
        assert self.world is not None
        self.world.wait()


class _AnyGenerator(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, type(torch.default_generator))


class _Generator(metaclass=_AnyGenerator):
    """timm's moving average makes one on the device of its weights."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _real_generator("cpu")


_real_generator = torch.Generator


@contextlib.contextmanager
def pretend_cuda() -> Iterator[World]:
    """Within, cuda:0 can be used; yields what is counted."""
    world = World()

    @contextlib.contextmanager
    def choose(stream: object) -> Iterator[None]:
        world.stream = stream
        yield
        world.stream = None

    with (
        mock.patch.object(torch, "Generator", _Generator),
        mock.patch.object(torch.cuda, "Stream", return_value=_Stream()),
        mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: world.keep(tensor)),
        mock.patch.object(torch.cuda, "stream", choose),
        mock.patch.object(torch.cuda, "current_stream", return_value=_Stream(world)),
        mock.patch.object(torch.cuda, "synchronize", side_effect=lambda *_: world.note_wait("torch.cuda.synchronize")),
        _Functions(world),
        _Operations(world),
    ):
        yield world
