"""The page's part on trainings: accuracies and losses by epoch as inline SVG, and the epoch whose weights were kept."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import markupsafe
import numpy as np

from dynexit.contents import MetricsRow
from dynexit.report.page import PageSection, shade

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 235, 52, 14, 10, 40
_MOST = 8
_LOSS = "train_"  # begins the names of losses in metrics.jsonl
_DASHES = ("", "7 3", "2 3", "8 3 2 3")
_WHAT = (
    "Accuracy on validation by epoch: a thin line for each exit, darker with depth, and where gates are trained a "
    "thick one for leaving by them. Below it the losses on the training images, by term the mean of each epoch, on a "
    "logarithmic scale where they span more than a factor of ten. Dotted: the epoch whose weights were kept. {shown}"
    "MLflow has these curves of all points."
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


@dataclass(frozen=True)
class _Axes:
    """Maps epochs and values to places of the drawing."""

    last: int
    low: float
    high: float
    is_log: bool = False

    @classmethod
    def of(cls, last: int, values: Sequence[float], *, may_be_log: bool = False) -> "_Axes":
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        is_log = may_be_log and low > 0 and high > 10 * low
        if is_log:
            low, high = math.log10(low), math.log10(high)
        more = 0.04 * (high - low or 0.1)
        return cls(last, low - more, high + more, is_log)

    def x(self, epoch: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * epoch / max(self.last, 1)

    def y(self, value: float) -> float:
        place = math.log10(value) if self.is_log else value
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (place - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if not self.is_log:
            return _ticks(self.low, self.high)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        inside = [value for value in values if self.low <= math.log10(value) <= self.high]
        return inside if len(inside) < 9 else [value for value in inside if math.log10(value).is_integer()]


def _drawing(one: Training) -> markupsafe.Markup:
    label = markupsafe.Markup('<p class="label">{}</p>').format(one.label)
    return label + _accuracies(one) + _losses(one)


def _accuracies(one: Training) -> markupsafe.Markup:
    exits, whole = _curves(one.rows)
    axes = _Axes.of(_last_epoch(one), [value for curve in (*exits, whole) for _, value in curve])
    parts = []
    for exit_, curve in enumerate(exits):
        colour = "var(--muted)" if exit_ == len(exits) - 1 else shade(exit_ / len(exits))
        parts.append(_path(curve, axes, f'class="exit" stroke="{colour}"'))
    if whole:
        parts.append(_path(whole, axes, 'class="curve ink-line"'))
    return _svg("accuracy by epoch", axes, lambda value: f"{100 * value:.4g} %", parts, one.kept_epoch)


def _losses(one: Training) -> markupsafe.Markup:
    """The drawing of the training losses; nothing where none was noted."""
    names = dict.fromkeys(name for row in one.rows for name in row if name.startswith(_LOSS))
    rows: Sequence[Mapping[str, Any]] = one.rows
    curves = {name: [(row["epoch"], row[name]) for row in rows if name in row] for name in names}
    if not curves:
        return markupsafe.Markup()
    values = [value for curve in curves.values() for _, value in curve]
    axes = _Axes.of(_last_epoch(one), values, may_be_log=True)
    parts = []
    right = _WIDTH - _RIGHT - 12
    for index, (name, curve) in enumerate(curves.items()):
        look = f'class="curve ink-line" stroke-dasharray="{_DASHES[index % len(_DASHES)]}"'
        parts.append(_path(curve, axes, look))
        if len(curve) == 1:
            parts.append(
                markupsafe.Markup('<circle class="dot ink" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(
                    axes.x(curve[0][0]), axes.y(curve[0][1])
                )
            )
        y = _TOP + 12 + 16 * index
        parts.append(markupsafe.Markup(f'<path {look} d="M{right - 30} {y - 4}h30"/>'))
        text = name.removeprefix(_LOSS).replace("_", " ")
        parts.append(_text("note", right - 36, y, text, "end"))
    return _svg("training losses by epoch", axes, lambda value: f"{value:.4g}", parts, one.kept_epoch)


def _last_epoch(one: Training) -> int:
    return max(row["epoch"] for row in one.rows)


def _svg(
    title: str,
    axes: _Axes,
    tick: Callable[[float], str],
    drawn: Sequence[markupsafe.Markup],
    kept_epoch: int | None,
) -> markupsafe.Markup:
    """Curves over a grid, with the kept epoch."""
    last, bottom = axes.last, _HEIGHT - _BOTTOM
    parts: list[markupsafe.Markup] = []
    for value in axes.ticks():
        parts.append(_line("grid", _LEFT, axes.y(value), _WIDTH - _RIGHT, axes.y(value)))
        parts.append(_text("tick", _LEFT - 8, axes.y(value) + 4, tick(value), "end"))
    for epoch in sorted({round(last * part / 4) for part in range(5)}):
        parts.append(_text("tick", axes.x(epoch), bottom + 18, str(epoch), "middle"))
    parts.append(_text("axis", axes.x(last / 2), _HEIGHT - 6, "epoch", "middle"))
    parts += drawn
    if kept_epoch is not None:
        parts.append(_line("kept", axes.x(kept_epoch), _TOP, axes.x(kept_epoch), bottom))
        side, anchor = (4, "start") if kept_epoch < last / 2 else (-4, "end")
        parts.append(_text("note", axes.x(kept_epoch) + side, bottom - 6, f"kept: {kept_epoch}", anchor))
    whole = markupsafe.Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return whole.format(_WIDTH, _HEIGHT, title, markupsafe.Markup("").join(parts))


def _ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [float(value) for value in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> markupsafe.Markup:
    return markupsafe.Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        name, x1, y1, x2, y2
    )


def _text(name: str, x: float, y: float, text: str, anchor: str) -> markupsafe.Markup:
    return markupsafe.Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        name, x, y, anchor, text
    )


def _path(curve: Sequence[tuple[int, float]], axes: _Axes, attributes: str) -> markupsafe.Markup:
    places = "L".join(f"{axes.x(epoch):.1f} {axes.y(value):.1f}" for epoch, value in curve)
    return markupsafe.Markup(f'<path fill="none" {attributes} d="M{places}"/>')
