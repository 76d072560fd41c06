"""Backbones from functions that a study names, and from saved folders."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynexit.errors import UserError
from dynexit.models.cut.backbone import GraphCut, OwnBackbone, Weights
from dynexit.models.cut.cutting import At, cut_graph, recut
from dynexit.models.cut.features import Features
from dynexit.models.cut.parts import PartError, Parts
from dynexit.models.weights import load_weights
from dynexit.study.own_code import call_function

_NUM_IMAGES = 3
_MOST_KNOWN = 8
_known: dict[str, tuple[GraphCut, tuple[str, ...]]] = {}
"""Cuts of this process, by what they were made of: a job asks for the same one several times."""


@dataclasses.dataclass(frozen=True)
class OwnModule:
    """A function `package.module:function` that returns a module, its keyword arguments, and how that is cut."""

    module: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    at: At = "auto"
    feature: str | None = None

    def build(
        self, input_size: tuple[int, int, int], num_classes: int | None = None, weights: str | None = None
    ) -> OwnBackbone:
        """Returns the module as a backbone for images (channels, height, width), with the `weights` of a file, if any.

        Imports the function's module, which must be allowed (see `allowing_code`). Raises UserError if it is not, if
        the function fails or returns no module, and if the module cannot be cut or has other classes.
        """
        made = self.make()
        if isinstance(made, OwnBackbone):
            if self.at != "auto" or self.feature is not None:
                raise UserError(f"backbone.at and backbone.feature: {self.module} cuts its module itself; remove them")
            if made.input_size != input_size:
                raise UserError(
                    f"{self.module} cuts its module for images of {_size(made.input_size)}, and those of the data set "
                    f"have {_size(input_size)}; set data.image_size, or change the example"
                )
            backbone = made
        else:
            backbone = self._cut(made, random_images(input_size))
        if num_classes is not None and backbone.num_classes != num_classes:
            raise UserError(
                f"{self.module} gives {backbone.num_classes} classes, and the data set has {num_classes}; build the "
                "module for as many, as through backbone.arguments"
            )
        if weights is not None:
            load_weights(backbone.model, Path(weights), self.module)
        backbone.name, backbone.origin = self.module, dataclasses.asdict(self)
        return backbone

    def make(self) -> Any:
        """Returns what the function returns: a module, or a backbone that it cut. Raises UserError if it is neither."""
        made = call_function(self.module, self.arguments)
        if not isinstance(made, nn.Module):
            raise UserError(
                f"backbone.module: {self.module} returned a {type(made).__name__}; return an nn.Module, or what "
                "dynexit.cut returns"
            )
        return made

    def _cut(self, model: nn.Module, images: Tensor) -> OwnBackbone:
        key = json.dumps([dataclasses.asdict(self), list(images.shape)], sort_keys=True, default=str)
        if key in _known:
            how, places = _known[key]
            return recut(model, images, how, places, self.module)
        backbone = cut_graph(model, images, self.at, name=self.module, feature=self.feature)
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        if isinstance(backbone.how, GraphCut):
            _known[key] = (backbone.how, backbone.places)
        return backbone


def random_images(input_size: tuple[int, int, int]) -> Tensor:
    """Returns a few images on which a module is tried."""
    return torch.randn(_NUM_IMAGES, *input_size, generator=torch.Generator().manual_seed(0))


def _size(input_size: tuple[int, int, int]) -> str:
    return "x".join(map(str, input_size))


def stages_of(backbone: OwnBackbone) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Returns the stages as JSON and the tensors that they need beyond the weights, None if they cannot be written."""
    how = backbone.how
    if not isinstance(how, GraphCut) or not how.parts.are_portable:
        return None
    state, buffers = backbone.model.state_dict(), dict(backbone.model.named_buffers(remove_duplicate=False))
    names = {name for names in how.parts.weights() for name in names}
    tensors = {f"constants.{name}": tensor for name, tensor in how.parts.constants.items()}
    tensors |= {f"model.{name}": buffers[name] for name in names if name not in state}
    content = {
        "has_stem": how.has_stem,
        "has_tail": how.has_tail,
        "features": dataclasses.asdict(how.features),
        "places": list(backbone.places),
        "parts": how.parts.to_json(),
    }
    return content, tensors


def read_stages(
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    *,
    name: str,
    num_classes: int,
    input_size: tuple[int, int, int],
) -> OwnBackbone:
    """Returns the backbone of `stages_of`'s result and the weights in `state`; no code of the module's is needed.

    Raises ValueError or KeyError for other content. Only operations of torch's own run, and none that opens files.
    """
    kinds: dict[str, dict[str, Tensor]] = {"constants": {}, "model": {}}
    for path, tensor in tensors.items():
        kind, _, rest = path.partition(".")
        kinds[kind][rest] = tensor
    parts = Parts.from_json(content["parts"], kinds["constants"])
    model = Weights({**state, **kinds["model"]}, temporary=kinds["model"])
    missing = {one for names in parts.weights() for one in names} - {*state, *kinds["model"]}
    if missing:
        raise PartError(f"the weight {min(missing)} is missing")
    how = GraphCut(parts, bool(content["has_stem"]), bool(content["has_tail"]), Features(**content["features"]))
    return OwnBackbone(name, model, how, num_classes, input_size, content["places"])
