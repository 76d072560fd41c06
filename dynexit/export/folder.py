"""`dynexit export`: a model folder as a folder of programs, router.json and router.py, which need no dynexit."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynexit.core.confidence import CONFIDENCES, max_probability
from dynexit.deploy.model import EarlyExitModel
from dynexit.deploy.model_folder import CONFIG, new_folder, read_folder
from dynexit.errors import Failure, UserError
from dynexit.export import router as router_file
from dynexit.export.convert import SUFFIXES, check_packages
from dynexit.export.plan import ProgramPlan
from dynexit.export.router import ExportedModel

SETTINGS, SCRIPT = "router.json", "router.py"
FORMAT = 1
"""The version of router.json."""
MOST_DIFFERENCE = 1e-3
"""Of logits, over 1 + the largest one, from the saved ones to those of the programs."""
_MARGIN = 4
"""Confidences of other images may differ more than the probe's did."""


@dataclasses.dataclass(frozen=True)
class ExportCheck:
    """How the programs and the router answered the probe.

    `difference` is the largest from a saved logit, over 1 + the largest logit; `tolerance` how near a threshold a
    confidence may decide otherwise. Of `num_answers`, `num_near` were that near, and `num_other` left at another exit.
    """

    difference: float
    tolerance: float
    num_answers: int
    num_near: int
    num_other: int


def export_model(
    directory: str | Path, out: str | Path, to: str = "onnx", *, verify: bool = True, allow_code: Sequence[str] = ()
) -> tuple[int, ExportCheck | None]:
    """Writes the operating points of a model folder as programs, `to` onnx or torch, into the new folder `out`.

    Returns the number of programs and, with `verify`, how they answered the model's probe. A folder that is not
    self-contained runs a function of a module in `allow_code`, as for `load`. Raises UserError for a
    folder that exists, is foreign or damaged, for an unknown format and a missing package, Failure for other answers:
    the folder is not written then.
    """
    check_packages(to)
    contents = read_folder(Path(directory), allow_code)
    if contents.description.backbone_precision == "bf16":
        raise UserError(
            f"{directory} has a backbone in bf16, and programs run in float32; save a study whose backbone.precision "
            "is float32 or tf32"
        )
    model = EarlyExitModel(contents)
    normalisation = json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))["pretrained_cfg"]
    plan = ProgramPlan(model, contents.heads, SUFFIXES[to])
    settings = {
        "format": FORMAT,
        "input_size": model.input_size,
        "mean": normalisation["mean"],
        "std": normalisation["std"],
        "preprocessing": contents.description.preprocessing.data,
        "class_names": model.class_names,
        "tolerance": model.tolerance,
        "points": [plan.point(point) for point in model.points],
    }
    with new_folder(Path(out)) as temporary:
        plan.write(temporary)
        shutil.copyfile(router_file.__file__, temporary / SCRIPT)
        _write(temporary, settings)
        check = None
        if verify:
            difference, tolerance = _compare_programs(ExportedModel(temporary), model, str(directory))
            settings["tolerance"] = max(model.tolerance, tolerance)
            _write(temporary, settings)
            check = _check_router(ExportedModel(temporary), model, difference, str(directory))
    return plan.num_programs, check


def _write(folder: Path, settings: Mapping[str, Any]) -> None:
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _compare_programs(router: ExportedModel, model: EarlyExitModel, folder: str) -> tuple[float, float]:
    """Runs every program on the whole probe. Returns the largest difference of a logit, and the tolerance that follows.

    Raises Failure if a logit differs by more than MOST_DIFFERENCE.
    """
    probe, most, most_sure = model.probe, 0.0, 0.0
    for point in model.points:
        training = model.trainings[point.training]
        kind = CONFIDENCES[point.confidence if point.configuration is not None else "gate"]
        confidence = kind.function if kind.reads == "logits" else max_probability
        pool = {"state": probe["images"].numpy()}
        for step in router.points[point.name]["steps"]:
            if not router.run(step, pool):
                continue
            p, expected = step["exit_index"], probe["logits"]
            if "threshold" in step:
                head = 0 if point.configuration is None else point.configuration.exits[p][0]
                expected = probe[f"{point.training}.logits"][:, p * len(training.stack.head_types) + head]
            found = torch.from_numpy(pool["logits"])
            difference = float((found - expected).abs().max()) / (1 + float(expected.abs().max()))
            if not difference <= MOST_DIFFERENCE:
                raise Failure(
                    f"{folder}: on its probe {step['program']} gives logits that differ from the saved ones by "
                    f"{difference:.3g} of the largest (allowed {MOST_DIFFERENCE:g}); report it, or export to another "
                    "format"
                )
            most = max(most, difference)
            most_sure = max(most_sure, float((confidence(found) - confidence(expected)).abs().max()))
    return most, _MARGIN * most_sure


def _check_router(router: ExportedModel, model: EarlyExitModel, difference: float, folder: str) -> ExportCheck:
    """Runs every operating point on the probe, all images together and one by one.

    Raises Failure if an image leaves elsewhere without a confidence near a threshold.
    """
    images, num_answers, num_near, num_other = model.probe["images"].numpy(), 0, 0, 0
    for place, point in enumerate(model.points):
        expected = model.probe["exit_index"][place].numpy()
        for parts in (images[None], images[:, None]):
            answers = [router(part, point.name) for part in parts]
            found = np.concatenate([answer.exit_index for answer in answers])
            near = np.concatenate([answer.near for answer in answers])
            if ((found != expected) & ~near).any():
                raise Failure(
                    f"{folder}: on its probe the exported operating point {point.name} leaves at exits "
                    f"{found.tolist()} instead of {expected.tolist()}; report it, or export to another format"
                )
            num_answers += len(found)
            num_near += int(near.sum())
            num_other += int((found != expected).sum())
    return ExportCheck(difference, router.settings["tolerance"], num_answers, num_near, num_other)
