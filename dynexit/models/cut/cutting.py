"""Cuts any module that classifies images into stages between which exits can sit: `dynexit.cut`."""

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynexit.errors import UserError
from dynexit.models.cut.backbone import GraphCut, OwnBackbone, StageCut
from dynexit.models.cut.features import FEATURES, Features, infer_features
from dynexit.models.cut.graph import export
from dynexit.models.cut.parts import Parts
from dynexit.models.cut.places import Place, Places

_TOLERANCE = 1e-5
"""How far logits of the stages, and of images alone, may lie from the module's, relative to the largest or 1."""
_NUM_IMAGES = 3
_LITTLE = 0.02
"""An exit that leaves no more than this share of the MACs to come is none that is taken by itself."""

At = Literal["auto"] | Sequence[str]


def cut(
    model: nn.Module,
    example: Tensor,
    at: At = "auto",
    *,
    stages: Sequence[nn.Module] | None = None,
    tail: nn.Module | None = None,
    feature: str | None = None,
) -> OwnBackbone:
    """Returns the module as a backbone of stages, in eval mode, for images like `example` (B, C, H, W) in any number.

    `at` names the modules at whose ends exits may sit (`layer1.0`), in order; "auto" takes the ends of the blocks that
    repeat. A place is legal where a single tensor that depends on the images is alive. `feature` says what exits read:
    channels_first or channels_last of maps, tokens or class_token; None infers it from the shapes.

    A module that torch cannot export is cut into given `stages`, the stem first, and a `tail`: modules that use its
    sub-modules and give its logits one after another.

    The module's logits are (B, K), or the attribute `logits` of what it returns, as Hugging Face's models do. The
    stages are compared with it on images. Raises UserError if it has no such answer, if the answer changes or depends
    on the other images, and for places that are not legal or stages that are not its own.
    """
    name = type(model).__name__
    if feature is not None and feature not in FEATURES:
        raise UserError(f"feature is {feature!r}, allowed are {', '.join(FEATURES)}; name one of them, or give None")
    images = _images_like(example)
    if model.training and (norm := _batch_norm_in_train_mode(model)):
        raise UserError(
            f"{name} has batch norms in train mode (first: {norm}), so that an image's logits depend on the others of "
            "its batch; call eval() on it first"
        )
    if stages is None:
        return cut_graph(model, images, at, name=name, feature=feature)
    if at != "auto":
        raise UserError(f"at is {at!r} and stages are given; give one of the two")
    return _cut_stages(model, images, stages, tail, feature)


def _images_like(example: Tensor) -> Tensor:
    """Three images in the example's range that differ, since equal ones would hide much."""
    if not isinstance(example, Tensor) or example.dim() != 4 or not len(example) or not example.is_floating_point():
        found = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise UserError(f"example is {found}; give images as a tensor of floating point (B, C, H, W)")
    noise = torch.randn(_NUM_IMAGES, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    rows = torch.arange(_NUM_IMAGES) % len(example)
    return example[rows] + (0.1 * noise).to(example)


def _batch_norm_in_train_mode(model: nn.Module) -> str:
    norms = (n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training)
    return next(norms, "")


def _unwrapped(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def plain(model: nn.Module, images: Tensor, name: str) -> tuple[nn.Module, Tensor]:
    """Returns the module in eval mode, giving plain logits, and its logits (B, K) of the images.

    It shares everything with `model` but a hook, if that gives its logits as an attribute. Raises UserError for other
    answers, and for those that change from call to call or with the other images of the batch.
    """
    model.eval()
    with torch.no_grad():
        try:
            first = model(images)
        except Exception as error:  # of whatever kind in code of somebody else
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UserError(f"{name} takes no images of {_size(images)} ({reason})") from error
        if not isinstance(first, Tensor) and isinstance(getattr(first, "logits", None), Tensor):
            model = copy.copy(model)
            model._forward_hooks = OrderedDict(model._forward_hooks)
            model.register_forward_hook(_unwrapped)
            first = model(images)
        if not isinstance(first, Tensor) or first.dim() != 2 or len(first) != len(images):
            raise UserError(
                f"{name} returns {_in_words(first)} for {len(images)} images; return their logits alone, a tensor "
                f"({len(images)}, K), as in a module around it"
            )
        if (most := _difference(model(images), first)) > 0:
            raise UserError(
                f"{name} gives other logits when it is called again with the same images (by up to {most:.2g}); remove "
                "what is random or counts calls, such as a dropout that is always on"
            )
        alone = torch.cat([model(images[i : i + 1]) for i in range(len(images))])
        if (most := _difference(alone, first)) > _TOLERANCE:
            raise UserError(
                f"{name} gives other logits for an image alone than in a batch (by up to {most:.2g}), also in eval "
                "mode; let its norms keep running statistics (track_running_stats=True)"
            )
    return model, first


def _in_words(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, dict):
        return f"a dict of {', '.join(map(str, output))}"
    return f"a {type(output).__name__}" + (f" of {len(output)}" if isinstance(output, (tuple, list)) else "")


def _size(images: Tensor) -> str:
    return "x".join(map(str, images.shape[1:]))


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value or 1."""
    difference = (found - expected).abs().max().nan_to_num(float("inf"))
    return float(difference) / max(1.0, float(expected.abs().max()))


def cut_graph(
    model: nn.Module, images: Tensor, at: At = "auto", *, name: str, feature: str | None = None
) -> OwnBackbone:
    """As `cut` without stages, of a module that `name` stands for in messages, whatever its mode; three `images`."""
    model, logits = plain(model, images, name)
    exported = export(model, images[:2], name)
    places = Places(exported, name)
    chosen = places.automatic() if at == "auto" else places.named(at)
    stem = places.before(chosen[0])
    ends = [place.index for place in chosen]
    end = places.last_after(ends[-1])
    starts = [] if stem is None else [stem]
    found = GraphCut(Parts.of(exported, [*starts, *ends]), stem is not None, True, Features())
    if at != "auto" or len(ends) < 2 or _share_of_tail(found, model, images) > _LITTLE:
        more = [] if end is None else [end]  # exits after all places: another block follows the last
        found = GraphCut(Parts.of(exported, [*starts, *ends, *more]), stem is not None, end is not None, Features())
    states, cut_ = _run(found(model), images)
    features = infer_features(states, cut_.tail, (images.shape[2], images.shape[3]), feature)
    found = dataclasses.replace(found, features=features)
    _compare(found(model), images, logits, f"{name}: its graph gives", "report this as a bug")
    exits = [place.name for place in chosen][: len(cut_.blocks) - 1]
    return _backbone(name, model, found, logits, images, exits)


def recut(model: nn.Module, images: Tensor, how: GraphCut, places: Sequence[str], name: str) -> OwnBackbone:
    """Returns another module of the same code, cut in the same way; three `images`. Raises UserError as `cut` does."""
    model, logits = plain(model, images, name)
    _compare(how(model), images, logits, f"{name}: its graph gives", "let its function return the same model each time")
    return _backbone(name, model, how, logits, images, places)


def _backbone(
    name: str, model: nn.Module, how: GraphCut | StageCut, logits: Tensor, images: Tensor, places: Sequence[str]
) -> OwnBackbone:
    channels, height, width = images.shape[1:]
    return OwnBackbone(name, model, how, logits.shape[1], (channels, height, width), places)


@torch.no_grad()
def _share_of_tail(how: GraphCut, model: nn.Module, images: Tensor) -> float:
    cut_ = how(model)
    with FlopCounterMode(display=False) as whole:
        states, _ = _run(cut_, images[:1])
    with FlopCounterMode(display=False) as rest:
        cut_.tail(states[-1])
    return float(rest.get_total_flops() / max(whole.get_total_flops() + rest.get_total_flops(), 1))


@torch.no_grad()
def _run(cut_: Any, images: Tensor) -> tuple[list[Any], Any]:
    """The states after the stem and every block, and the cut."""
    states = [cut_.stem(images)]
    for block in cut_.blocks:
        states.append(block(states[-1]))
    return states, cut_


@torch.no_grad()
def _compare(cut_: Any, images: Tensor, logits: Tensor, what: str, remedy: str) -> None:
    """Raises UserError unless the parts one after another give the logits, of all images and of one alone."""
    for some, expected in ((images, logits), (images[:1], logits[:1])):
        found = cut_.tail(_run(cut_, some)[0][-1])
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"{what} {shape} instead of logits {tuple(expected.shape)}; {remedy}")
        if (most := _difference(found, expected)) > _TOLERANCE:
            raise UserError(f"{what} other logits than the module (by up to {most:.2g}); {remedy}")


def _cut_stages(
    model: nn.Module, images: Tensor, stages: Sequence[nn.Module], tail: nn.Module | None, feature: str | None
) -> OwnBackbone:
    name = type(model).__name__
    wrong = next((stage for stage in (*stages, tail) if stage is not None and not isinstance(stage, nn.Module)), None)
    if wrong is not None or len(stages) < 3:
        what = f"{len(stages)} of them" if wrong is None else f"a {type(wrong).__name__} among them"
        raise UserError(f"stages: {what}; give a stem and at least two blocks, all of them modules (nn.Module)")
    model, logits = plain(model, images, name)
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for i, stage in enumerate((*stages, *([] if tail is None else [tail]))):
        stage.eval()
        foreign = next((n for n, t in (*stage.named_parameters(), *stage.named_buffers()) if id(t) not in own), None)
        if foreign is not None:
            where = "tail" if i == len(stages) else f"stages[{i}]"
            raise UserError(f"{where} has a weight of its own, {foreign}; build it from sub-modules of {name}")
    how = StageCut(model, tuple(stages), tail or nn.Identity(), Features())
    remedy = "give stages that are its own forward one after another"
    try:
        _compare(how(model), images, logits, f"the stages of {name} give", remedy)
    except UserError:
        raise
    except Exception as error:  # of whatever kind in code of somebody else
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"the stages of {name} cannot be run one after another ({reason}); {remedy}") from error
    states, cut_ = _run(how(model), images)
    features = infer_features(states, cut_.tail, (images.shape[2], images.shape[3]), feature)
    how = StageCut(model, how.stages, how.tail, features)
    return _backbone(name, model, how, logits, images, [f"stage {i}" for i in range(1, len(stages) - 1)])


def legal_places(model: nn.Module, images: Tensor, name: str) -> tuple[OwnBackbone, list[Place]]:
    """Returns the module cut at every legal place that has a name, and these places; three `images`."""
    model, _ = plain(model, images, name)
    places = Places(export(model, images[:2], name), name).all
    if not places:
        raise UserError(f"{name} has no place where one tensor alone is alive")
    return cut_graph(model, images, [place.name for place in places], name=name), places
