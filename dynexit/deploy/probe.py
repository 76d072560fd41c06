"""The probe of a model folder: a few inputs with the logits and exits that they gave where it was saved.

Shapes: n inputs, R rows (every head type at every position), K classes, S operating points.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dynexit.core.confidence import max_probability
from dynexit.deploy.description import SavedPoint
from dynexit.deploy.engine import Engine
from dynexit.deploy.router import NEAR, even_parts, join
from dynexit.errors import Failure

_MARGIN = 4
"""Confidences of other images may differ more than the probe's did."""
_MOST_DIFFERENCE = 1e-3
"""Of logits, relative to the largest one, from one machine to another in float32."""
_OTHER_MODEL = {"float32": 0.01, "tf32": 0.02, "bf16": 0.1}
"""By precision how far a confidence may lie from the recorded one."""
_MOST_RUN = 3
_MOST_ALONE = 8


def make_probe(images: Tensor, engines: Mapping[str, Engine], points: Sequence[SavedPoint]) -> dict[str, Tensor]:
    """Returns the tensors of probe.safetensors: inputs, logits (n, K) and (n, R, K), classes and exits (S, n)."""
    probe = {"images": images}
    for training, engine in engines.items():
        logits_PHnK, probe["logits"] = engine.all_logits(images)
        probe[f"{training}.logits"] = logits_PHnK.flatten(0, 1).transpose(0, 1)
    answers = [
        engines[point.training].router(point.configuration, point.confidence).classify(images) for point in points
    ]
    probe["prediction"] = torch.from_numpy(np.stack([answer.prediction_B for answer in answers]))
    probe["exit_index"] = torch.from_numpy(np.stack([answer.exit_index_B for answer in answers]))
    return {name: tensor.clone().contiguous() for name, tensor in probe.items()}


def measured_tolerance(images: Tensor, engine: Engine, recorded_Rn: np.ndarray) -> float:
    """How far confidences of the same image may lie apart, at least NEAR.

    That is from one batch size to another, by up to eight of the images, and from those recorded, perhaps on another
    device or compiled. Raises Failure if they are too far from these.
    """

    def confidences(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([max_probability(engine.all_logits(part)[0]) for part in parts], -1)

    together_PHn = confidences(even_parts(images, engine.tile))
    step = -(-len(images) // _MOST_ALONE)
    alone_PHn = confidences(torch.split(images[::step], 1))
    most = float(np.abs(together_PHn.flatten(0, 1).cpu().numpy() - recorded_Rn).max())
    if not most <= _OTHER_MODEL[engine.model.backbone.precision]:
        raise Failure(
            f"confidences differ by {most:.3g} from those recorded; the record is of another machine, model or "
            "images: record the study again, under another name"
        )
    return max(NEAR, _MARGIN * most, _MARGIN * float((together_PHn[..., ::step] - alone_PHn).abs().max()))


def check_probe(
    probe: Mapping[str, Tensor],
    engines: Mapping[str, Engine],
    points: Sequence[SavedPoint],
    folder: str,
    most_difference: float = _MOST_DIFFERENCE,
) -> float:
    """Runs the probe and returns the largest difference of a confidence from the saved ones, or by batch size.

    Logits may differ by `most_difference` of the largest. Up to three operating points are run; a sample may leave
    elsewhere only if its confidence is near the threshold. Raises Failure, naming `folder`, for other answers.
    """
    device = next(next(iter(engines.values())).model.parameters()).device
    images, most = probe["images"].to(device), 0.0
    parts = [part for part in (images[:1], images[1:]) if len(part)]
    for training, engine in engines.items():
        logits_PHnK, final_nK = engine.all_logits(images)
        found = logits_PHnK.flatten(0, 1).transpose(0, 1).cpu()
        alone_PHnK = torch.cat([engine.all_logits(part)[0] for part in parts], 2)
        by_size = max_probability(alone_PHnK) - max_probability(logits_PHnK)
        most = max(most, float(by_size.abs().max()))
        for name, values, expected in (
            ("the backbone", final_nK.cpu(), probe["logits"]),
            (f"training {training}", found, probe[f"{training}.logits"]),
        ):
            difference = float((values - expected).abs().max())
            if not difference <= most_difference * (1 + float(expected.abs().max())):
                raise Failure(
                    f"{folder}: on its probe {name} gives logits that differ by {difference:.3g} from the saved ones; "
                    "this machine or library computes something else: report it, or load with verify=False"
                )
            most = max(most, float((max_probability(values) - max_probability(expected)).abs().max()))
    tolerance = max(NEAR, _MARGIN * most)
    for place in np.unique(np.linspace(0, len(points) - 1, _MOST_RUN).astype(int)):
        point = points[place]
        router = engines[point.training].router(point.configuration, point.confidence, tolerance)
        answers = join([router.classify(part) for part in parts])
        expected_n = probe["exit_index"][place].numpy()
        wrong = (answers.exit_index_B != expected_n) & ~answers.near_B
        if wrong.any():
            raise Failure(
                f"{folder}: on its probe the operating point {point.name} leaves at exits "
                f"{answers.exit_index_B.tolist()} instead of {expected_n.tolist()}; report it, or load with "
                "verify=False"
            )
    return most
