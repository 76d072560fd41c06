"""Backbones: any model of a supported family, by name, in eval mode and cut into stem, blocks and tail."""

import copy
import difflib
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules
from torch import Tensor, nn

from dynexit.errors import Failure, UserError, shorten
from dynexit.models.families import T2T_FAMILY, TIMM_FAMILIES, Cut, Family, State
from dynexit.models.t2t_vit import VARIANTS as T2T_VIT
from dynexit.models.t2t_vit import T2TViT
from dynexit.models.weights import load_weights

ImageSize = int | tuple[int, int]


class Backbone(nn.Module):
    """A classifier that can be run block by block. `forward` equals the wrapped `model`'s own, bit for bit.

    What passes between blocks (`h`) is the model's own state with the batch first (see `families.py`); `select` takes
    some samples out of it. `feature_dims[i]` is the width of what an exit after block i reads.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        cut: Callable[[Any], Cut],
        num_classes: int,
        input_size: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model
        self.num_classes = num_classes
        self.input_size = input_size
        self.precision = "float32"  # see precision.py
        self._cut_function = cut
        self.cut = cut(model)
        self.num_blocks = len(self.cut.blocks)
        self.eval()
        self.feature_dims = self._measure_feature_dims()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cut"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.cut = self._cut_function(self.model)  # a copy runs its own modules, not the original's

    shape_device = "meta"
    """The device of `shapes_only`."""

    def shapes_only(self) -> Cut:
        """A copy on `shape_device`: on "meta" it computes shapes without values, at next to no cost."""
        return self._cut_function(self._shape_model())

    def blank(self, image_size: ImageSize | None = None) -> Tensor:
        """One image for `shapes_only`, of `image_size` (the backbone's own if None)."""
        channels, height, width = self.input_size
        if image_size is not None:
            height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        return torch.zeros(1, channels, height, width, device=self.shape_device)

    def _shape_model(self) -> nn.Module:
        parameters = self.model.parameters()
        memo: dict[int, Any] = {id(p): nn.Parameter(_meta(p), requires_grad=False) for p in parameters}
        memo |= {id(b): _meta(b) for b in self.model.buffers()}
        return copy.deepcopy(self.model, memo)

    @torch.no_grad()
    def layers(self) -> dict[str, int]:
        """By a weight's name the layer it is in: 0 the stem, 1..num_blocks the blocks, num_blocks + 1 the tail.

        What belongs to the model itself and to none of its modules (class token, positions) counts to the stem.
        """
        model, ran = self._shape_model(), {"": 0}
        cut, layer = self._cut_function(model), 0

        def note(name: str, *_: Any) -> None:
            ran.setdefault(name, layer)

        for name, module in model.named_modules():
            module.register_forward_pre_hook(functools.partial(note, name))
        h = cut.stem(self.blank())
        for layer, run in enumerate([*cut.blocks, cut.tail], 1):  # noqa: B007  the hooks read it
            h = run(h)

        def layer_of(name: str) -> int:
            owner = name.rpartition(".")[0]
            return ran[owner] if owner in ran else layer_of(owner)  # some modules only lend their weights to one above

        return {name: layer_of(name) for name, _ in model.named_parameters()}

    @torch.no_grad()
    def _measure_feature_dims(self) -> tuple[int, ...]:
        cut, dims = self.shapes_only(), []
        h = cut.stem(self.blank())
        for block in cut.blocks:
            h = block(h)
            dims.append(cut.feature(h).shape[1])
        if (shape := tuple(cut.tail(h).shape)) != (1, self.num_classes):
            raise ValueError(f"its logits have shape {shape} for one image and {self.num_classes} classes")
        return tuple(dims)

    def stem(self, x: Tensor) -> State:
        """The state before block 0, from images (B, C, H, W)."""
        return self.cut.stem(x.to(torch.bfloat16) if self.precision == "bf16" else x)

    def run_block(self, i: int, h: State) -> State:
        """The state after block i."""
        return self.cut.blocks[i](h)

    def tail(self, h: State) -> Tensor:
        """The backbone's own logits (B, K), from the state after the last block."""
        return self.cut.tail(h)

    def feature(self, i: int, h: State) -> Tensor:
        """What an exit after block i reads, (B, D_i), from the state after that block.

        The class token through the final norm where the model classifies by it (JEI-DNN, section 3), else the mean
        over space or patch tokens (DyCE), through the final norm where tokens have one.
        """
        return self.cut.feature(h)

    @property
    def has_class_token(self) -> bool:
        """Whether the model classifies by a class token, so that its pooled features are something else."""
        return self.cut.pooled is not None

    def pooled_feature(self, i: int, h: State) -> Tensor:
        """As `feature`, but always the mean over space or patch tokens (DyCE), (B, D_i)."""
        return (self.cut.pooled or self.cut.feature)(h)

    def forward(self, x: Tensor) -> Tensor:
        """The backbone's own logits (B, K)."""
        return self.run_all(x) if self.cut.whole is None else self.cut.whole(x)

    def run_all(self, x: Tensor) -> Tensor:
        """As `forward`, part by part."""
        h = self.stem(x)
        for i in range(self.num_blocks):
            h = self.run_block(i, h)
        return self.tail(h)


def _meta(tensor: Tensor) -> Tensor:
    """On meta, where images are float32 whatever the backbone's precision."""
    return tensor.to("meta", torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype)


def select(h: State, index: Tensor) -> State:
    """The state of the samples in `index` (int64 positions or a boolean mask over the batch)."""
    return (h[0][index], *h[1:]) if isinstance(h, tuple) else h[index]


_RESERVED = (
    *("checkpoint_path", "features_only", "in_chans", "num_classes", "out_indices", "cache_dir", "scriptable"),
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
)
_RESERVED_WHY = "weights come from backbone.weights, classes and colours from the data set"


def build_backbone(
    name: str,
    *,
    arguments: dict[str, Any] | None = None,
    num_classes: int,
    image_size: ImageSize | None = None,
    in_channels: int = 3,
    weights: str | None = None,
    classifier_is_trained: bool = True,
) -> Backbone:
    """The model of that name in eval mode, cut into blocks.

    `arguments` are handed to the model's constructor; `image_size` is in pixels (an int, or height and width; the
    model's own if None); `weights` is None (random), "pretrained" (timm's hub) or a local file. Of weights of other
    classes the classifier is left out, where it `is_trained` afterwards.
    Raises UserError for a name of no supported family and for arguments, sizes or weights that do not fit, Failure if
    the hub cannot be reached.
    """
    family = _family(name)
    for key in set(_RESERVED).intersection(arguments or {}):
        raise UserError(f"backbone.arguments.{key} is not for the study to set: {_RESERVED_WHY}; remove it")
    given = arguments
    arguments = dict(arguments or {})
    if image_size is not None and family.takes_image_size:
        arguments.setdefault("img_size", image_size)
    arguments |= {"num_classes": num_classes, "in_chans": in_channels}
    if weights == "pretrained":
        model = _pretrained(name, arguments, classifier_is_trained=classifier_is_trained)
    else:
        model = _create(name, arguments)
        if weights is not None:
            load_weights(model, Path(weights), name, classifier_is_trained=classifier_is_trained)
    size = image_size or arguments.get("img_size") or model.default_cfg["input_size"][-2:]
    height, width = (size, size) if isinstance(size, int) else size
    try:
        return Backbone(name, model, family.cut, num_classes, (in_channels, height, width))
    except Exception as error:  # of whatever kind in a model that its arguments made another one
        reason = (str(error) or repr(error)).splitlines()[0]
        what = f" with {given}" if given else ""
        raise UserError(f"backbone {name!r}{what} takes no images of {height}x{width} pixels ({reason})") from error


def _create(name: str, arguments: dict[str, Any], **options: Any) -> Any:
    """The model with random weights."""
    try:
        if name in T2T_VIT:
            return T2TViT(**{**T2T_VIT[name], **arguments})
        return timm.create_model(name, **arguments, **options)
    except Exception as error:  # a constructor may stumble over a wrong argument in any way
        if options and isinstance(error, (OSError, RuntimeError)):
            raise  # the weights could not be fetched
        reason = " ".join((str(error) or repr(error)).split())
        raise UserError(f"backbone {name!r} cannot be built with {arguments}: {reason}") from error


def _pretrained(name: str, arguments: dict[str, Any], *, classifier_is_trained: bool) -> Any:
    """The model with the weights of timm's hub."""
    published = None if name in T2T_VIT else timm.get_pretrained_cfg(name)
    if published is None or not published.has_weights:
        raise UserError(f"backbone {name!r} has no weights on timm's hub: give a local file as backbone.weights")
    if not classifier_is_trained and published.num_classes != arguments["num_classes"]:
        raise UserError(
            f"backbone {name!r} has {published.num_classes} classes on timm's hub and the data set "
            f"{arguments['num_classes']}: set prepare.num_epochs to train a classifier"
        )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings of every attempt; the sentence is below
    try:
        return _create(name, arguments, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise Failure(
            f"the weights of backbone {name!r} could not be fetched ({str(error).splitlines()[0]}): try again with a "
            "network, or give a local file as backbone.weights"
        ) from error


def _family(name: str) -> Family:
    if name in T2T_VIT:
        return T2T_FAMILY
    for module, family in TIMM_FAMILIES.items():
        if is_model_in_modules(name, module):
            try:
                timm.get_pretrained_cfg(name)
            except RuntimeError as error:  # no such tag
                tagged = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or name.split(".")[0]
                raise UserError(f"unknown backbone {name!r}: {error}; use one of {tagged}") from error
            return family
    titles = ", ".join(dict.fromkeys(family.title for family in (T2T_FAMILY, *TIMM_FAMILIES.values())))
    known = [*T2T_VIT, *timm.list_models(module=list(TIMM_FAMILIES))]
    near = difflib.get_close_matches(name.split(".")[0], known, n=1)
    hint = f" (nearest name: {near[0]!r})" if near else ""
    raise UserError(f"unknown backbone {shorten(repr(name))}{hint}: use a model of one of the families {titles}")
