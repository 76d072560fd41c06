"""A frozen backbone's passes made faster: maps channels last in memory, torch.compile. Answers differ by rounding."""

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from dynexit.errors import Failure, UserError
from dynexit.models.backbones import Backbone
from dynexit.models.cut.backbone import OwnBackbone
from dynexit.models.families import State
from dynexit.models.multi_exit import MultiExit
from dynexit.study.schema import BackboneSettings


@contextlib.contextmanager
def compiling(key: str) -> Iterator[None]:
    """Turns what torch.compile raises, a hundred lines, into a Failure of one sentence that names the key."""
    try:
        yield
    except RuntimeError as error:  # looked at by name: importing the class takes seconds
        if not any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):
            raise
        lines = [line.strip() for line in str(error).splitlines()]  # the first may be "backend='inductor' raised:"
        reason = next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
        raise Failure(
            f"{key} = true: torch.compile failed ({reason}); fix its compiler, empty its cache "
            f"(TORCHINDUCTOR_CACHE_DIR), or set {key}=false"
        ) from error


def quicken(model: MultiExit, settings: BackboneSettings, device: torch.device, batch_size: int) -> None:
    """Makes `MultiExit.features` faster, in place, as backbone.channels_last and backbone.compile say.

    If either is so, runs it once on a blank batch of that size: what fails does so here. Raises UserError for a
    backbone that takes no maps with their channels last, Failure where torch.compile fails.
    """
    backbone, asked = model.backbone, settings.channels_last
    channels_last = _gains(backbone, device) if asked == "auto" else asked
    if channels_last:
        backbone.to(memory_format=torch.channels_last)
        model.memory_format = torch.channels_last
    if settings.compile:
        model.compile_features()
    if not (channels_last or settings.compile):
        return
    blank = torch.zeros(max(batch_size, 2), *backbone.input_size, device=device)
    try:
        with compiling("backbone.compile"):
            model.features(blank)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a module may look at strides
        if not channels_last:
            raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"backbone.channels_last = {json.dumps(asked)}: {backbone.name} takes no maps with their channels last "
            f"({reason}); set backbone.channels_last=false"
        ) from error


def compile_stages(backbone: Backbone) -> None:
    """Has torch.compile run the stem, the blocks from one exit to the next and the tail from now on, in place.

    Each is compiled at its first call with one image, and once or twice for several; ways to leave early share them.
    So is `Backbone.forward`, as one function. Copies of the backbone are not compiled.
    """
    cut = backbone.cut
    stem = _compiled(cut.stem)
    backbone.cut = dataclasses.replace(
        cut,
        stem=lambda images: stem(images.contiguous()),  # each order in memory would have graphs of its own
        blocks=_CompiledBlocks(cut.blocks),
        tail=_compiled(cut.tail),
        whole=_compiled(backbone.run_all),
    )


class _CompiledBlocks(Sequence[Any]):
    """Blocks of which every slice is one compiled function. A call costs 10 µs, as much as two operations."""

    def __init__(self, blocks: Sequence[Callable[[State], State]]) -> None:
        self._blocks = blocks
        self._stage = functools.cache(lambda start, stop: _compiled(lambda h: _run(blocks[start:stop], h)))

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self._blocks[index]
        start, stop, _ = index.indices(len(self))
        return [lambda h: self._stage(start, stop)(h)] if start < stop else []


def _run(blocks: Iterable[Callable[[State], State]], h: State) -> State:
    for block in blocks:
        h = block(h)
    return h


_NUMBERS = itertools.count()


def _compiled(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function, whose graphs stay valid: it reads nothing that changes but its argument."""

    def run(h: State) -> State:
        return function(h)

    # torch finds graphs by this object and limits their number, and remembers by its name which sizes have changed
    run.__code__ = run.__code__.replace(co_name=f"run_{next(_NUMBERS)}")
    # to check what all modules hold at every call takes a tenth of a small net's time
    options: Any = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    graphs = torch.compile(run, fullgraph=True, options=options)

    def call(h: State) -> State:
        if torch.compiler.is_compiling():  # as a part of the whole
            return function(h)
        torch._dynamo.maybe_mark_dynamic(h[0] if isinstance(h, tuple) else h, 0)
        try:
            return graphs(h)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            return function(h)

    return call


def _gains(backbone: Backbone, device: torch.device) -> bool:
    """Whether channels last is known to be faster: for tensor cores, to which cuDNN else copies maps in that order.

    Modules of the user's own are left as they are: they may look at strides.
    """
    return device.type == "cuda" and backbone.precision != "float32" and not isinstance(backbone, OwnBackbone)
