"""The page's part on trainings: accuracies by epoch as inline SVG, and the epoch whose weights were kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import markupsafe
import numpy as np

from dynexit.contents import MetricsRow
from dynexit.report.page import PageSection, shade

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 235, 52, 14, 10, 40
_MOST = 8
_WHAT = (
    "Accuracy on validation by epoch: a thin line for each exit, darker with depth, and where gates are trained a "
    "thick one for leaving by them. Dotted: the epoch whose weights were kept. {shown}MLflow has these curves "
    "of all points."
)


@dataclass(frozen=True)
class Training:
    """A training's label, its epochs, and the number of the one that was kept (None if unknown)."""

    label: str
    rows: Sequence[MetricsRow]
    kept_epoch: int | None


def curves_section(trainings: Sequence[Training]) -> list[PageSection]:
    """The section on those of the trainings that have several epochs, at most eight; nothing if none has."""
    several = [one for one in trainings if len(one.rows) > 1]
    if not several:
        return []
    shown = f"{_MOST} of {len(several)} trainings. " if len(several) > _MOST else ""
    return [PageSection("Training", _WHAT.format(shown=shown), [], drawings=[_drawing(one) for one in several[:_MOST]])]


def _curves(rows: Sequence[Mapping[str, Any]]) -> tuple[list[list[tuple[int, float]]], list[tuple[int, float]]]:
    """By exit, and of the whole, (epoch, accuracy)."""
    num_exits = max((len(row.get("exit_accuracy") or ()) for row in rows), default=0)
    exits = [
        [(row["epoch"], row["exit_accuracy"][exit_]) for row in rows if exit_ < len(row.get("exit_accuracy") or ())]
        for exit_ in range(num_exits)
    ]
    return exits, [(row["epoch"], row["validation_accuracy"]) for row in rows if "validation_accuracy" in row]


def _drawing(one: Training) -> markupsafe.Markup:
    exits, whole = _curves(one.rows)
    values = [value for curve in (*exits, whole) for _, value in curve]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low, high = low - 0.04 * (high - low or 0.1), high + 0.04 * (high - low or 0.1)
    last = max(row["epoch"] for row in one.rows)

    def x(epoch: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * epoch / max(last, 1)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)

    parts: list[markupsafe.Markup] = []
    for value in _ticks(low, high):
        parts.append(_line("grid", _LEFT, y(value), _WIDTH - _RIGHT, y(value)))
        parts.append(_text("tick", _LEFT - 8, y(value) + 4, f"{100 * value:.4g} %", "end"))
    for epoch in sorted({round(last * part / 4) for part in range(5)}):
        parts.append(_text("tick", x(epoch), _HEIGHT - _BOTTOM + 18, str(epoch), "middle"))
    parts.append(_text("axis", x(last / 2), _HEIGHT - 6, "epoch", "middle"))
    for exit_, curve in enumerate(exits):
        colour = "var(--muted)" if exit_ == len(exits) - 1 else shade(exit_ / len(exits))
        parts.append(_path(curve, x, y, f'class="exit" stroke="{colour}"'))
    if whole:
        parts.append(_path(whole, x, y, 'class="curve ink-line"'))
    if one.kept_epoch is not None:
        parts.append(_line("kept", x(one.kept_epoch), _TOP, x(one.kept_epoch), _HEIGHT - _BOTTOM))
        side, anchor = (4, "start") if one.kept_epoch < last / 2 else (-4, "end")
        place = x(one.kept_epoch) + side, _HEIGHT - _BOTTOM - 6
        parts.append(_text("note", *place, f"kept: {one.kept_epoch}", anchor))
    drawn = markupsafe.Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="accuracy by epoch">{}</svg>')
    label = markupsafe.Markup('<p class="label">{}</p>').format(one.label)
    return label + drawn.format(_WIDTH, _HEIGHT, markupsafe.Markup("").join(parts))


def _ticks(low: float, high: float) -> list[float]:
    step = next(step for step in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if (high - low) / step <= 6)
    return [float(value) for value in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> markupsafe.Markup:
    return markupsafe.Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        name, x1, y1, x2, y2
    )


def _text(name: str, x: float, y: float, text: str, anchor: str) -> markupsafe.Markup:
    return markupsafe.Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        name, x, y, anchor, text
    )


def _path(curve: Sequence[tuple[int, float]], x: Any, y: Any, attributes: str) -> markupsafe.Markup:
    places = "L".join(f"{x(epoch):.1f} {y(value):.1f}" for epoch, value in curve)
    return markupsafe.Markup(f'<path fill="none" {attributes} d="M{places}"/>')
