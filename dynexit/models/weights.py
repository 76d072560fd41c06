"""Weights from a local file into a model, or one sentence on why they do not fit. Nothing in a file is executed."""

import argparse
import errno
import importlib
import logging
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dynexit.errors import UserError, counted
from dynexit.files import check_weights_file
from dynexit.models.t2t_vit import T2TViT, resize_positions

logger = logging.getLogger(__name__)

# where a checkpoint may keep the weights, best first ("net": JEI-DNN's fine-tuned backbones)
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "net", "weights")
_MOST_CONTAINERS = 4  # one inside the other; a hostile file has endless ones
# of DistributedDataParallel and AveragedModel, torch.compile, and modules that hold the backbone (Lightning's)
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
# buffers of AveragedModel, and of thop in every module
_NOT_WEIGHTS = ("n_averaged", "total_ops", "total_params")
# what JEI-DNN's checkpoints hold beside the backbone
_NOT_BACKBONE = ("intermediate_heads.", "gates.")


def load_weights(model: Any, path: Path, backbone_name: str, *, classifier_is_trained: bool = True) -> None:
    """Fills the model from a `.safetensors` file, or from one that torch reads with weights_only.

    The file holds the state, or a dict with it under one of several usual names, also nested. Prefixes that all names
    have are removed as far as the model needs it (`module.`, `_orig_mod.`, `model.`, `backbone.`, also nested). The
    classifier stays as it is where the file's has another number of classes; position embeddings are resized.
    Raises UserError, naming the file, where anything else does not fit, and where a classifier that is not trained
    afterwards does not.
    """
    for whole in _without_prefixes(read_state(path)):
        state = _without_classifier_of_other_size(whole, model)
        if not _fits(state, model):
            state = _converted(state, model)
        if _fits(state, model):
            break
    _refuse_misfit(state, model, path, backbone_name)
    for name in () if classifier_is_trained else _classifier_names(model):
        if f"{name}.weight" not in state:
            wanted, found = len(model.get_submodule(name).weight), whole.get(f"{name}.weight")
            has = "no classifier" if found is None or not found.dim() else f"{len(found)} classes"
            raise UserError(
                f"weights file {str(path)!r} has {has} and the data set {wanted}: set "
                "prepare.num_epochs to train a classifier, or give weights of these classes"
            )
    model.load_state_dict(state, strict=False)  # what may be missing was settled above


def read_state(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a weights file by name, out of whatever dicts they are wrapped in.

    Raises UserError, naming the file, if it cannot be read as plain weights, holds no state dict, or a tensor is not
    dense, real and finite.
    """
    check_weights_file(path)
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"weights file {str(path)!r} cannot be read as plain weights ({_reason(error)}): give a complete "
            ".safetensors file, or a .pth file that torch.load reads with weights_only=True"
        ) from error
    state = {
        name: value
        for name, value in _contained(content, _MOST_CONTAINERS).items()
        if name.rpartition(".")[2] not in _NOT_WEIGHTS
    }
    for name, value in state.items():
        fault = _fault(value)
        if fault:
            raise UserError(f"weights file {str(path)!r}: {name} {fault}; give a file of whole, plain weights")
    if not state:
        places = [repr(str(name)) for name, value in _items(content) if _has_tensors(value)]
        holds = "no tensors" if not _has_tensors(content) else f"no state dict, but a {type(content).__name__}"
        if places:
            holds = f"tensors under {_first(places)}, where no state dict is expected"
        raise UserError(
            f"weights file {str(path)!r} holds {holds}: give a file with a state dict, bare or under "
            f"{', '.join(map(repr, _CONTAINERS))}"
        )
    return state


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without the numbers and advice of the libraries."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to read it without weights_only
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        return f"it holds a {foreign[1]}" if foreign else "it holds something else than tensors, or is no checkpoint"
    is_denied = isinstance(error, OSError) and error.errno != errno.EINVAL
    if not (is_denied or isinstance(error, SafetensorError | RuntimeError)):  # whose words are a number
        return "it is cut short, or is no checkpoint"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _contained(content: Any, most: int) -> dict[str, Tensor]:
    """The tensors of the best container that has any, which may be inside others; else those of `content` itself."""
    if not isinstance(content, Mapping) or not most:
        return {}
    for key in _CONTAINERS:
        found = _contained(content.get(key), most - 1)
        if found:
            return found
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _items(content: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(content, Mapping):
        return content.items()
    return enumerate(content) if isinstance(content, list | tuple) else ()


def _has_tensors(content: Any) -> bool:
    """Whether a tensor is anywhere in nested dicts and lists, which may contain themselves."""
    left, seen = [content], set[int]()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            return True
        if id(value) not in seen:
            seen.add(id(value))
            left += [item for _, item in _items(value)]
    return False


def _without_prefixes(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The backbone's part of the state as it is, then without one more prefix that all names have, each time."""
    while state:
        own = {name: value for name, value in state.items() if not name.startswith(_NOT_BACKBONE)}
        yield own
        prefix = next((one for one in _PREFIXES if all(name.startswith(one) for name in state)), None)
        if prefix is None:
            return
        state = {name.removeprefix(prefix): value for name, value in state.items()}


def _fault(value: Tensor) -> str:
    """Why a tensor cannot be a weight; '' where it can."""
    if value.layout != torch.strided or value.is_quantized or value.is_complex():
        return f"is {'complex' if value.is_complex() else 'not dense'}"
    return "holds values that are not finite" if not value.isfinite().all() else ""


def _read_torch(path: Path) -> Any:
    with warnings.catch_warnings():
        for remark in ("Detected pickle protocol", "Validating sparse tensor"):  # refused below if it matters
            warnings.filterwarnings("ignore", message=remark)
        # timm's training checkpoints keep the command line in one, which is data alone
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)


def _classifier_names(model: Any) -> tuple[str, ...]:
    names = getattr(model, "default_cfg", {}).get("classifier", ())  # of somebody else's module it is unknown
    return (names,) if isinstance(names, str) else tuple(names)


def _without_classifier_of_other_size(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    own = model.state_dict()
    for name in _classifier_names(model):
        weight, in_file = own[f"{name}.weight"], state.get(f"{name}.weight")
        if in_file is not None and in_file.shape[:1] != weight.shape[:1]:
            logger.info("the file's classifier is %s, not %s: left out", tuple(in_file.shape), tuple(weight.shape))
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
    return state


def _optional(name: str, model: Any, state: Mapping[str, Tensor]) -> bool:
    """What a file may lack: a whole classifier (no class scores, or others), and old files' batch counts."""
    lacking = tuple(f"{c}." for c in _classifier_names(model) if f"{c}.weight" not in state)
    return name.endswith(".num_batches_tracked") or name.startswith(lacking)


def _misfits(state: Mapping[str, Tensor], model: Any) -> tuple[list[str], list[str], list[str], list[str]]:
    """(missing names, names the model does not know, names of other shapes, and of other types, with both)."""
    own = model.state_dict()
    given = {own[name].data_ptr() for name in state if name in own} - {0}  # files may have tied weights once
    missing = [name for name in own if name not in state and own[name].data_ptr() not in given]
    missing = [name for name in missing if not _optional(name, model, state)]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    types = [
        f"{name} of {state[name].dtype} instead of {own[name].dtype}"
        for name in own
        if name in state and state[name].is_floating_point() != own[name].is_floating_point()
    ]
    return missing, unknown, shapes, types


def _fits(state: Mapping[str, Tensor], model: Any) -> bool:
    return not any(_misfits(state, model))


def _converted(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The state in the model's own terms: positions resized, and names of the models' authors translated by timm."""
    if isinstance(model, T2TViT):
        positions = state.get("pos_embed")
        return state if positions is None else {**state, "pos_embed": resize_positions(positions, model.grid)}
    convert = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        with warnings.catch_warnings():
            # timm's resizing of Swin's position biases: a remark on speed, and a way of indexing that will go
            warnings.filterwarnings("ignore", message="torch.searchsorted")
            warnings.filterwarnings("ignore", message="Using a non-tuple sequence for multidimensional indexing")
            return dict(convert(dict(state), model))
    except (KeyError, RuntimeError, ValueError, AttributeError, IndexError, TypeError, AssertionError):
        return state  # of another model altogether; the misfit is reported in the file's own names


def _refuse_misfit(state: Mapping[str, Tensor], model: Any, path: Path, backbone_name: str) -> None:
    missing, unknown, shapes, types = _misfits(state, model)
    faults = [
        f"{counted(len(names), one, several)} (first: {_first(names)})"
        for one, several, names in (
            ("weight is missing", "weights are missing", missing),
            ("is unknown to it", "are unknown to it", unknown),
            ("has another shape", "have another shape", shapes),
            ("is of another type", "are of another type", types),
        )
        if names
    ]
    if faults:
        raise UserError(
            f"weights file {str(path)!r} is not of backbone {backbone_name!r}: {'; '.join(faults)}; give that "
            "model's own weights, or the name and arguments of the model that the file is of"
        )


def _first(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3])
