"""How each family of models is cut into stem, blocks and tail. The table at the end is all that a family needs.

The state `h` that passes between blocks is a tensor with the batch first, or a tuple whose first entry is that tensor
and whose other entries are shared by the whole batch (EVA's rotary embedding).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

State = Any  # Tensor | tuple[Tensor, ...]; see above


@dataclass(frozen=True)
class Cut:
    """A model as functions that, run one after another, are its own forward: stem, every block, tail.

    `feature` is what a linear exit reads; `pooled` what an MLP exit reads where that is something else: `feature` is
    the class token then. `places` is the state as a map (B, C, H, W), or its normalised patch tokens (B, N, D).
    `whole` is the forward as one function, for a compiled model.
    """

    stem: Callable[[Tensor], State]
    blocks: Sequence[Callable[[State], State]]
    tail: Callable[[State], Tensor]
    feature: Callable[[State], Tensor]
    places: Callable[[State], Tensor]
    pooled: Callable[[State], Tensor] | None = None
    whole: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Family:
    """`cut` splits a model; `takes_image_size` tells that the image size must be known when the model is built."""

    title: str
    cut: Callable[[Any], Cut]
    takes_image_size: bool = False


def _chain(functions: Sequence[Callable[[Any], Any]], h: Any) -> Any:
    for function in functions:
        h = function(h)
    return h


def _units(stage: nn.Module) -> Iterator[list[nn.Module]]:
    """The blocks of a stage; what a stage does before its first block is counted to that block."""
    before = [stage.get_submodule("downsample")] if hasattr(stage, "downsample") else []
    for block in getattr(stage, "blocks", stage).children():
        yield [*before, block]
        before = []


def _staged(stem: str, stages: str, end: str = "", *, channels_last: bool = False) -> Callable[[Any], Cut]:
    """A model of modules in a row: names in `stem`, stages (names, or one name of a list of stages), names in `end`."""

    def cut(model: Any) -> Cut:
        names = stages.split()
        parts = [model.get_submodule(name) for name in names]
        parts = list(parts[0].children()) if len(names) == 1 else parts
        return Cut(
            stem=partial(_chain, [model.get_submodule(name) for name in stem.split()]),
            blocks=[partial(_chain, unit) for part in parts for unit in _units(part)],
            tail=partial(_chain, [*(model.get_submodule(name) for name in end.split()), model.forward_head]),
            feature=lambda h: h.mean((1, 2) if channels_last else (2, 3)),
            places=lambda h: h.permute(0, 3, 1, 2) if channels_last else h,
        )

    return cut


def _token_feature(model: Any, tokens: Tensor) -> Tensor:
    """What the model's classifier would read: the normalised class token, or the mean of the patch tokens."""
    if model.global_pool != "token":
        return _mean_token(model, tokens)
    feature: Tensor = model.fc_norm(model.norm(tokens[:, 0]))
    return feature


def _mean_token(model: Any, tokens: Tensor) -> Tensor:
    """The mean of the patch tokens, normalised as the classifier's input is."""
    feature: Tensor = model.fc_norm(model.norm(tokens)[:, model.num_prefix_tokens :].mean(1))
    return feature


def _patch_tokens(model: Any, tokens: Tensor) -> Tensor:
    """The patch tokens, each normalised as the classifier's input is."""
    patches: Tensor = model.fc_norm(model.norm(tokens)[:, model.num_prefix_tokens :])
    return patches


def _vit(model: Any) -> Cut:
    return Cut(
        stem=partial(_chain, [model.patch_embed, model._pos_embed, model.patch_drop, model.norm_pre]),
        blocks=list(model.blocks),
        tail=partial(_chain, [model.norm, model.forward_head]),
        feature=partial(_token_feature, model),
        places=partial(_patch_tokens, model),
        pooled=partial(_mean_token, model) if model.global_pool == "token" else None,
    )


def _eva(model: Any) -> Cut:
    """As `_vit`, with the rotary embedding carried along (one for all blocks, or one a block)."""

    def stem(x: Tensor) -> State:
        tokens, rope = model._pos_embed(model.patch_embed(x))
        return model.norm_pre(tokens), rope

    def run(i: int, h: State) -> State:
        tokens, rope = h
        per_block = getattr(model, "rope_mixed", False) and rope is not None
        return model.blocks[i](tokens, rope=rope[i] if per_block else rope), rope

    return Cut(
        stem=stem,
        blocks=[partial(run, i) for i in range(len(model.blocks))],
        tail=lambda h: model.forward_head(model.norm(h[0])),
        feature=lambda h: _token_feature(model, h[0]),
        places=lambda h: _patch_tokens(model, h[0]),
        pooled=(lambda h: _mean_token(model, h[0])) if model.global_pool == "token" else None,
    )


def _t2t_vit(model: Any) -> Cut:
    return Cut(
        stem=model.embed,
        blocks=list(model.blocks),
        tail=model.forward_head,
        feature=model.feature,
        places=lambda tokens: model.norm(tokens[:, 1:]),
        pooled=lambda tokens: model.norm(tokens[:, 1:]).mean(1),
    )


T2T_FAMILY = Family("T2T-ViT", _t2t_vit, takes_image_size=True)

# by the file of timm that defines the model
TIMM_FAMILIES: dict[str, Family] = {
    "vision_transformer": Family("ViT (DINOv2, CLIP, SigLIP, ...)", _vit, takes_image_size=True),
    "deit": Family("DeiT", _vit, takes_image_size=True),
    "eva": Family("EVA (DINOv3, RoPE-ViT, ...)", _eva, takes_image_size=True),
    "swin_transformer": Family(
        "Swin", _staged("patch_embed", "layers", "norm", channels_last=True), takes_image_size=True
    ),
    "swin_transformer_v2": Family(
        "SwinV2", _staged("patch_embed", "layers", "norm", channels_last=True), takes_image_size=True
    ),
    "convnext": Family("ConvNeXt, ConvNeXtV2", _staged("stem", "stages", "norm_pre")),
    "resnet": Family("ResNet, ResNeXt", _staged("conv1 bn1 act1 maxpool", "layer1 layer2 layer3 layer4")),
    "regnet": Family("RegNet", _staged("stem", "s1 s2 s3 s4", "final_conv")),
    "davit": Family("DaViT", _staged("stem", "stages", "norm_pre")),
    "maxxvit": Family("MaxViT", _staged("stem", "stages", "norm"), takes_image_size=True),
    "mobilenetv3": Family("MobileNetV3", _staged("conv_stem bn1", "blocks")),
    "efficientnet": Family("EfficientNet", _staged("conv_stem bn1", "blocks", "conv_head bn2")),
    "efficientvit_mit": Family("EfficientViT", _staged("stem", "stages")),
    "efficientvit_msra": Family("EfficientViT", _staged("patch_embed", "stages"), takes_image_size=True),
    "efficientformer_v2": Family("EfficientFormerV2", _staged("stem", "stages", "norm"), takes_image_size=True),
}
