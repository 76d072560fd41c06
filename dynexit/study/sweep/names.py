"""The names of points and methods: the fewest swept keys in which they differ."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynexit.study.grid import Point

_METHOD = "train.method"


def name_points(points: Sequence["Point"]) -> tuple["Point", ...]:
    """Returns the points with `label_keys` and `method_keys` set."""
    by_method: dict[str, list[Point]] = {}
    for point in points:
        by_method.setdefault(point.config.train.method, []).append(point)
    keys = {}
    for method, group in by_method.items():
        swept = dict.fromkeys(name for point in group for name in point.swept)
        methods = telling_keys(group, filter(_in_method, swept))
        labels = telling_keys(group, dict.fromkeys((*methods, *swept)))
        keys[method] = (_METHOD, *labels) if len(by_method) > 1 else labels, methods
    return tuple(
        dataclasses.replace(point, label_keys=labels, method_keys=methods)
        for point in points
        for labels, methods in [keys[point.config.train.method]]
    )


def telling_keys(points: Sequence["Point"], names: Iterable[str]) -> tuple[str, ...]:
    """Returns those of `names` that tell points apart which the names before them do not."""
    kept: list[str] = []
    groups: list[int] = [0] * len(points)
    count = min(len(points), 1)
    for name in names:
        seen: dict[tuple[int, str], int] = {}
        finer = [
            seen.setdefault((group, json.dumps(point.swept.get(name, "-"), sort_keys=True)), len(seen))
            for group, point in zip(groups, points, strict=True)
        ]
        if len(seen) > count:
            kept.append(name)
            groups, count = finer, len(seen)
    return tuple(kept)


def _in_method(name: str) -> bool:
    return name.startswith("exits.") or name in ("train.distillation", "search.confidence")


def method_name(point: "Point") -> str:
    """Returns the method with what of its exits, distillation and confidence the sweep varies."""
    variants = {name: _variant(name, point.swept.get(name)) for name in point.method_keys}
    in_order = sorted(variants, key=lambda name: (not name.startswith("exits."), name == "search.confidence"))
    named = ", ".join(filter(None, (variants[name] for name in in_order)))
    return point.config.train.method + (f" ({named})" if named else "")


def _variant(name: str, value: Any) -> str:
    last = name.rpartition(".")[2]
    if name == "train.distillation":
        return f"distilled {value:g}" if value else ""
    if name == "search.confidence":
        return "" if value == "max_probability" else str(value)
    if isinstance(value, bool):
        return last if value else ""
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value or "default")
    return text if last == "head_types" else f"{last} {text}"
