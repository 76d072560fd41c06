"""The static networks of a study: smaller networks of the backbone's family, fitted by the same recipe, as points.

Such a point has one exit, after the last block, whose heads are fitted by method probe and read what the study's exits
read; the network's own classifier is in the same record. So prepare, train and record do for it what they always do.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from dynexit.study.grid import Point, canonical_json, digest, ids_of
from dynexit.study.schema import Config
from dynexit.study.stages import STAGES


def static_points(points: Sequence[Point]) -> tuple[Point, ...]:
    """Returns the static networks that `points` are compared with, for each prepared backbone and set of readers.

    The last of each group is the backbone itself with the same heads after its last block. Readers are those of the
    points fitted by probe, if there are any. Empty where baselines.static is.
    """
    if not points or not points[0].config.baselines.static:
        return ()
    backbones: dict[str, list[Point]] = {}
    for point in points:
        backbones.setdefault(point.ids["prepare"], []).append(point)
    found: dict[str, Point] = {}
    for group in backbones.values():
        fitted = [point for point in group if point.config.train.method == "probe"] or group
        references = {canonical_json(point.config.exits): point for point in reversed(fitted)}
        for reference in reversed(references.values()):
            found |= {point.ids["search"]: point for point in _networks(reference)}
    return tuple(found.values())


def network_name(point: Point) -> str:
    """Returns the name of a static network: what of its arguments differs from the backbone's, or `backbone`."""
    return str(point.swept["baselines.static"])


def _networks(reference: Point) -> Iterator[Point]:
    """The static networks for one point of the study, then its backbone itself."""
    baselines = reference.config.baselines
    entries = list({json.dumps(entry, sort_keys=True): entry for entry in baselines.static}.values())
    configs = [_configuration(reference.config, entry) for entry in (*entries, {})]
    ids = [ids_of(config) for config in configs]
    records = tuple(each["record"] for each in ids)
    swept = {
        name: value for name, value in reference.swept.items() if name.partition(".")[0] in STAGES["prepare"].sections
    }
    for config, own, entry in zip(configs, ids, (*entries, {}), strict=True):
        own["search"] = digest([own["search"], records, baselines.cascade])
        names = {**swept, "baselines.static": _name(entry)}
        yield Point(config, names, own, tuple(names), networks=records)


def _configuration(config: Config, arguments: dict[str, Any]) -> Config:
    """The reference's configuration with another network and one exit, at its end."""
    backbone = {"arguments": {**config.backbone.arguments, **arguments}, **({"weights": None} if arguments else {})}
    changes = {
        "backbone": backbone,
        "exits": {"positions": "last", "stem": False, "concatenate": False},
        "train": {"method": "probe", "distillation": 0.0},
        "record": {"train": False},
    }
    sections = {name: getattr(config, name).model_copy(update=update) for name, update in changes.items()}
    return config.model_copy(update=sections)


def _name(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments).replace('"', "") if arguments else "backbone"
