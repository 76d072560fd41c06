"""The model folder: its files, how it is written (whole or not at all) and read (checked, nothing unpickled)."""

import contextlib
import dataclasses
import errno
import glob
import inspect
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynexit.deploy.description import Description, FilePromise, read_description
from dynexit.errors import Failure, UserError
from dynexit.files import read_text
from dynexit.models.backbones import Backbone, build_backbone
from dynexit.models.cut.backbone import OwnBackbone
from dynexit.models.cut.own import OwnModule, read_stages, stages_of
from dynexit.run_dir import load_tensors, read_json, save_tensors, sha256_file
from dynexit.study.own_code import allowing_code, check_allowed

CONFIG, BACKBONE, EXITS, HEADS, PROBE, CARD = (
    "config.json",
    "model.safetensors",
    "exits.json",
    "exits.safetensors",
    "probe.safetensors",
    "README.md",
)
STAGES, STAGE_TENSORS = "stages.json", "stages.safetensors"
"""Of a module of the user's own: its stages as operations of torch's, and the tensors that they need beyond weights."""
_PROMISED = (CONFIG, BACKBONE, HEADS, PROBE)
"""The files whose bytes exits.json promises. The card is for people, who may edit it; nothing reads it."""
FILES = (*_PROMISED, EXITS, CARD)
"""All files of a folder."""


def backbone_config(
    backbone: Backbone,
    arguments: Mapping[str, Any],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Any]:
    """Returns config.json in timm's form, from which timm builds the backbone alone, if it is one of timm's.

    `arguments` are the constructor's own; `mean` and `std` (one a channel) are what images are normalised by.
    """
    model: Any = backbone.model
    if isinstance(backbone, OwnBackbone):
        return {
            "architecture": backbone.name,
            "num_classes": backbone.num_classes,
            "label_names": list(class_names),
            "own_module": backbone.origin,
            "pretrained_cfg": {"input_size": list(backbone.input_size), "mean": list(mean), "std": list(std)},
        }
    arguments = {**arguments, "in_chans": backbone.input_size[0]}
    if "img_size" in inspect.signature(type(model).__init__).parameters:
        arguments["img_size"] = list(backbone.input_size[1:])
    published = model.default_cfg
    inherited = ("first_conv", "classifier", "fixed_input_size", "interpolation", "crop_pct", "pool_size")
    return {
        "architecture": backbone.name.split(".")[0],
        "num_classes": backbone.num_classes,
        "num_features": int(getattr(model, "num_features", 0)),
        "label_names": list(class_names),
        "model_args": arguments,
        "pretrained_cfg": {
            **{name: published[name] for name in inherited if published.get(name) is not None},
            "input_size": list(backbone.input_size),
            "num_classes": backbone.num_classes,
            "mean": list(mean),
            "std": list(std),
            "custom_load": False,
        },
    }


def read_backbone(config: Mapping[str, Any], state: Mapping[str, Tensor], folder: str) -> Backbone:
    """Returns the backbone of a config.json with its weights. Raises UserError where the two do not fit."""
    try:
        arguments = {name: value for name, value in config["model_args"].items() if name != "in_chans"}
        channels, height, width = config["pretrained_cfg"]["input_size"]
        backbone = build_backbone(
            config["architecture"],
            arguments=arguments,
            num_classes=config["num_classes"],
            image_size=(height, width),
            in_channels=channels,
        )
        backbone.model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/{CONFIG} describes no backbone ({error!r}); copy the folder again") from None
    except RuntimeError as error:  # how torch reports missing and unexpected weights
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}/{BACKBONE} does not fit {CONFIG}: {reason}; copy the folder again") from None
    return backbone


def _read_own(
    config: Mapping[str, Any], state: Mapping[str, Tensor], directory: Path, description: Description
) -> OwnBackbone:
    """Returns a backbone of the user's own from its stages, without its code; if they are not there, from its code."""
    try:
        num_classes, input_size = int(config["num_classes"]), tuple(map(int, config["pretrained_cfg"]["input_size"]))
        channels, height, width = input_size
        size = (channels, height, width)
        if STAGES in description.files:
            stages = read_json(directory / STAGES)
            tensors = load_tensors(directory / STAGE_TENSORS)
            name = str(config["architecture"])
            return read_stages(stages, tensors, state, name=name, num_classes=num_classes, input_size=size)
        own = OwnModule(**config["own_module"])
        check_allowed(own.module, f"{directory / CONFIG}")
        backbone = own.build(size, num_classes)
        backbone.model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{directory / CONFIG} describes no backbone ({error!r}); copy the folder again") from None
    except RuntimeError as error:  # how torch reports missing and unexpected weights
        reason = " ".join(str(error).split())
        raise UserError(
            f"{directory / BACKBONE} does not fit {own.module}: {reason}; use the code that it was saved with"
        ) from None
    return backbone


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a folder holds, as read: the backbone, heads and gates by training, the probe's tensors."""

    directory: Path
    description: Description
    backbone: Backbone
    heads: dict[str, dict[str, Tensor]]
    probe: dict[str, Tensor]


def write_folder(
    directory: Path,
    *,
    description: Mapping[str, Any],
    config: Mapping[str, Any],
    backbone: Backbone,
    heads: Mapping[str, Mapping[str, Tensor]],
    probe: Mapping[str, Tensor],
    card: str,
) -> None:
    """Writes the folder, whole or not at all; raises as `new_folder` does.

    `description` is that of exits.json without `files`, `config` config.json's.
    """
    with new_folder(directory) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_tensors(temporary / BACKBONE, backbone.model.state_dict())
        promised = [*_PROMISED, *_write_stages(temporary, backbone)]
        named = {f"{training}.{name}": t for training, state in heads.items() for name, t in state.items()}
        save_tensors(temporary / HEADS, named)
        save_tensors(temporary / PROBE, probe)
        (temporary / CARD).write_text(card, encoding="utf-8")
        files = {name: _promise(temporary / name) for name in promised}
        whole = Description.model_validate({**description, "files": files})
        (temporary / EXITS).write_text(whole.to_text(), encoding="utf-8")


@contextlib.contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """Yields an empty folder that is renamed to `directory` at the end, and removed if the block raises.

    Raises UserError if there is something at `directory`, Failure where it cannot be written.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} exists; give the name of a new folder, or move it aside")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        for left in directory.parent.glob(f".{glob.escape(directory.name)}.*.tmp"):  # by a save that was killed
            shutil.rmtree(left, ignore_errors=True)
        temporary = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.tmp"
        temporary.mkdir()
        try:
            yield temporary
            temporary.replace(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{directory} was made meanwhile; give the name of a new folder") from None
        raise Failure(
            f"{directory} could not be written: {error.strerror or error}; free space or fix the permissions, then "
            "run again"
        ) from error


def _write_stages(directory: Path, backbone: Backbone) -> tuple[str, ...]:
    stages = stages_of(backbone) if isinstance(backbone, OwnBackbone) else None
    if stages is None:
        return ()
    (directory / STAGES).write_text(json.dumps(stages[0], allow_nan=False) + "\n", encoding="utf-8")
    save_tensors(directory / STAGE_TENSORS, stages[1])
    return STAGES, STAGE_TENSORS


def _promise(path: Path) -> FilePromise:
    return FilePromise(bytes=path.stat().st_size, sha256=sha256_file(path))


def read_folder(directory: Path, allow_code: Sequence[str] = ()) -> Contents:
    """Returns what the folder holds. Raises UserError, naming the file, if it is foreign, cut short or altered.

    A folder that is not self-contained imports the function that made its backbone, if `allow_code` has its module.
    """
    try:
        text = read_text(directory / EXITS)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory} is no model folder of dynexit (it has no {EXITS}); give a folder that `dynexit save` wrote"
        ) from None
    except (OSError, ValueError) as error:  # other bytes than UTF-8, a null byte in the name
        raise UserError(f"{directory / EXITS} cannot be read ({error}); copy the folder again") from None
    description = read_description(text, str(directory))
    if missing := set(_PROMISED) - set(description.files):
        raise UserError(f"{directory / EXITS} promises no {', '.join(sorted(missing))}; copy the folder again")
    for name in (*_PROMISED, *(name for name in (STAGES, STAGE_TENSORS) if name in description.files)):
        _check(directory / name, description.files[name])
    config = read_json(directory / CONFIG)
    state = load_tensors(directory / BACKBONE)
    with torch.device("cpu"), allowing_code(allow_code):
        if "own_module" in config:
            backbone: Backbone = _read_own(config, state, directory, description)
        else:
            backbone = read_backbone(config, state, str(directory))
    heads: dict[str, dict[str, Tensor]] = {training: {} for training in description.trainings}
    for name, tensor in load_tensors(directory / HEADS).items():
        training, _, rest = name.partition(".")
        heads.setdefault(training, {})[rest] = tensor
    return Contents(directory, description, backbone, heads, load_tensors(directory / PROBE))


def copy_folder(source: Path, description: Description, target: Path) -> None:
    """Copies a folder's files, as they were read, into the folder `target`, over files of the same names.

    Raises UserError, naming the file, if one of them was altered since.
    """
    for name, promise in description.files.items():
        _check(source / name, promise)
        shutil.copyfile(source / name, target / name)
    (target / EXITS).write_text(description.to_text(), encoding="utf-8")
    if (source / CARD).is_file():
        shutil.copyfile(source / CARD, target / CARD)


def _check(path: Path, promised: FilePromise) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; copy the folder again")
    if (size := path.stat().st_size) != promised.bytes:
        raise UserError(f"{path} has {size} bytes instead of {promised.bytes}; copy the folder again")
    if sha256_file(path) != promised.sha256:
        raise UserError(f"{path} was altered (its SHA-256 is not the one in {EXITS}); copy the folder again")
