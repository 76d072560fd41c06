"""Somebody else's module as a backbone, cut along its graph or into the stages that its owner gave."""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dynexit.errors import UserError
from dynexit.models.backbones import Backbone
from dynexit.models.cut.features import Features
from dynexit.models.cut.parts import Parts
from dynexit.models.families import Cut


class Weights(nn.Module):
    """Weights and buffers by the names that a module gave them, without its code."""

    def __init__(self, state: Mapping[str, Tensor], temporary: Iterable[str] = ()) -> None:
        """The tensors in `state`; those named in `temporary` are no part of its state dict."""
        super().__init__()
        for name, tensor in state.items():
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if tensor.is_floating_point() and name not in temporary:
                owner.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
            else:
                owner.register_buffer(last, tensor, persistent=name not in temporary)


@dataclasses.dataclass(frozen=True, eq=False)
class GraphCut:
    """How a module is cut along its graph; called with the module, or any that has its weights, it gives the Cut."""

    parts: Parts
    has_stem: bool
    """Whether the first part is a stem; else blocks read the images."""
    has_tail: bool
    """Whether the last part is a tail; else the last block gives the logits."""
    features: Features

    def __call__(self, model: nn.Module) -> Cut:
        functions = self.parts.bind(model)
        stem = functions.pop(0) if self.has_stem else _as_it_is
        tail = functions.pop() if self.has_tail else _as_it_is
        return self.features.cut(stem, functions, tail)

    def layers(self, model: nn.Module) -> dict[str, int]:
        """By a weight's name the layer that reads it first: 0 the stem, from 1 the blocks, then the tail."""
        found: dict[str, int] = {}
        for layer, names in enumerate(self.parts.weights(), 0 if self.has_stem else 1):
            for name in names:
                found.setdefault(name, layer)
        return {name: found.get(name, 0) for name, _ in model.named_parameters()}


@dataclasses.dataclass(frozen=True, eq=False)
class StageCut:
    """How a module is cut into stages that its owner gave: modules that use its sub-modules."""

    model: nn.Module
    stages: tuple[nn.Module, ...]
    tail: nn.Module
    features: Features

    def __deepcopy__(self, memo: object) -> "StageCut":
        return self

    def __call__(self, model: nn.Module) -> Cut:
        stages, tail = self.stages, self.tail
        if model is not self.model:  # a copy, whose stages must use its own sub-modules
            others = dict(model.named_modules())
            memo: dict[int, Any] = {id(m): others[name] for name, m in self.model.named_modules() if name in others}
            for mine, theirs in ((self.model.named_parameters(), model), (self.model.named_buffers(), model)):
                found = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
                memo |= {id(tensor): found[name] for name, tensor in mine if name in found}
            stages, tail = copy.deepcopy((stages, tail), memo)
        return self.features.cut(stages[0], stages[1:], tail)


class _LargestOutput(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the most bytes that an operation's output takes, but of views, which take none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and not func.is_view:
            self.num_bytes = max(self.num_bytes, output.numel() * output.element_size())
        return output


class OwnBackbone(Backbone):
    """A module of somebody else's code. `places` names by position where its exits may sit.

    It takes images of `input_size` only. `origin` is the function that made it and how that was cut (`OwnModule`); None
    for a module that was given as an object.
    """

    how: GraphCut | StageCut
    places: tuple[str, ...]
    origin: dict[str, Any] | None

    def __init__(
        self,
        name: str,
        model: nn.Module,
        cut: GraphCut | StageCut,
        num_classes: int,
        input_size: tuple[int, int, int],
        places: Sequence[str],
    ) -> None:
        self.shape_device = "meta" if isinstance(cut, GraphCut) else "cpu"
        self.how, self.places, self.origin = cut, tuple(places), None
        super().__init__(name, model, cut, num_classes, input_size)

    @property
    def is_graph(self) -> bool:
        """Whether it runs the operations of a graph, and not the module's own code."""
        return isinstance(self.how, GraphCut)

    def stem(self, x: Tensor) -> Any:
        """The state before block 0, from images (B, C, H, W). Raises UserError for another size than its own."""
        if tuple(map(int, x.shape[1:])) != self.input_size:
            own, found = ("x".join(map(str, size)) for size in (self.input_size, x.shape[1:]))
            raise UserError(
                f"{self.name} was cut for images of {own}, and these are {found}; give such images, or cut it again "
                "with an example of that size"
            )
        return super().stem(x)

    def _shape_model(self) -> nn.Module:
        if isinstance(self.how, StageCut):
            return copy.deepcopy(self.model).cpu()
        state = {name: p.to("meta") for name, p in self.model.named_parameters(remove_duplicate=False)}
        return Weights(state | {name: b.to("meta") for name, b in self.model.named_buffers(remove_duplicate=False)})

    def layers(self) -> dict[str, int]:
        return self.how.layers(self.model) if isinstance(self.how, GraphCut) else super().layers()

    @torch.no_grad()
    def largest_activation(self) -> int:
        """Returns the bytes of the largest output of an operation, for one image."""
        cut = self.shapes_only()
        with _LargestOutput() as largest:
            h = cut.stem(self.blank())
            for run in (*cut.blocks, cut.tail):
                h = run(h)
        num_bytes: int = largest.num_bytes
        return num_bytes


def _as_it_is(h: Any) -> Any:
    return h
