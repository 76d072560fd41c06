"""The report's pictures. Every front in them is chosen on validation and drawn with test values.

matplotlib's object interface is used throughout: no global figure, no display, no change to the caller's settings.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from dynexit.core.cost import place_name
from dynexit.report.published import PublishedPoint
from dynexit.report.table import budget_curves, by_seed, distinct_texts, front_of, within_budgets
from dynexit.run_dir import atomic_write
from dynexit.search.operating_points import BASELINES, ONE_THRESHOLD, ReportRow

DOTS_PER_INCH = 160
MARKERS = "osD^vPX<>*"
_MOST_INSIDE = 6  # entries of a legend
_MOST_LETTERS = 110  # below the bars
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)), (0, (3, 1.5)))
_MOST_MARKED = 20  # a longer published curve is a line without markers
# The finest budgets of relative MACs a picture tells apart; closer points of a front differ by noise, not by cost.
HUNDREDTHS = [hundredth / 100 for hundredth in range(1, 151)]

PERCENT = FuncFormatter(lambda fraction, _: f"{100 * fraction:.4g} %")


@dataclass(frozen=True)
class _Theme:
    background: str
    ink: str
    muted: str
    grid: str
    methods: tuple[str, ...]
    map_range: tuple[float, float]


THEMES = {
    "light": _Theme(
        "#ffffff", "#1c2128", "#5f6875", "#e6e8ec",
        ("#d9480f", "#1971c2", "#2b8a3e", "#9c36b5", "#a37500", "#c2255c", "#0c8599", "#7a5230"), (0.0, 0.85),
    ),
    "dark": _Theme(
        "#15181d", "#e6e8ec", "#9aa3af", "#2a2f37",
        ("#ff8a4c", "#5fb0ff", "#5fce7b", "#d591ec", "#e0b83a", "#ff7fa8", "#3bc9db", "#c9a27a"), (0.2, 0.9),
    ),
}  # fmt: skip


def pareto_figure(
    rows: Iterable[ReportRow], path: Path, published: Sequence[PublishedPoint] | None = None, *, theme: str = "light"
) -> None:
    """Draws test accuracy against relative MACs: gates, the front of the search, the backbone as a line.

    `path` ends in .png, or for papers in .svg or .pdf, whose text is readable at the width of one column.

    With one method MSDNet's thresholds are drawn too. With several a colour is a method and its line the accuracy that
    each budget buys: mean over seeds, the band from the worst to the best seed. A gate's marker is its seed, its colour
    its ce_ic_tradeoff, if one method has gates at several of them, else its method.
    Static networks are hollow markers and cascades thin lines, a marker and a line style for each of their classifiers.
    `published` points are drawn beside. Any part may be missing; without test rows the axes are empty.
    """
    rows = list(rows)
    look = THEMES[theme]
    figure, axes = new_figure(look, (9, 5.4) if path.suffix == ".png" else (5.4, 4.2))
    methods = sorted({row.method for row in rows if row.source == "search"})
    colours = {method: look.methods[index % len(look.methods)] for index, method in enumerate(methods)}
    draw_backbone(axes, rows, look)
    if len(methods) > 1:
        _draw_budget_curves(axes, rows, colours)
    else:
        _draw_search_front(axes, rows, colours)
        _draw_fixed(axes, rows, look)
    gates = {(row.method, row.ce_ic_tradeoff) for row in rows if row.source == "gates"}
    of_one_method = len({method for method, _ in gates}) == 1 < len(gates)
    _draw_gates(figure, axes, rows, colours if len(methods) > 1 and not of_one_method else {}, look)
    _draw_baselines(axes, rows, look)
    _draw_published(axes, published or (), look)
    axes.set(xlabel="relative MACs (bare backbone = 1)", ylabel="test accuracy")
    costs = [row.relative_macs for row in rows if row.split == "test" and row.source != "backbone"]
    if costs:
        axes.set_xlim(left=0.9 * min((*costs, *(point.relative_macs for point in published or ()))))
    axes.yaxis.set_major_formatter(PERCENT)
    if axes.get_legend_handles_labels()[1]:
        _place_legend(figure, axes, look)
    save_figure(figure, path)


def _place_legend(figure: Figure, axes: Axes, look: _Theme) -> None:
    """In the empty corner if it is short, else below the axes of a taller figure."""
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) <= _MOST_INSIDE:
        axes.legend(loc="lower right", frameon=False, labelcolor=look.ink, borderaxespad=1.2)
        return
    columns = max(1, int(figure.get_figwidth() / (0.9 + 0.075 * max(map(len, labels)))))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, frameon=False, labelcolor=look.ink, fontsize=9,
        handlelength=3,
    )  # fmt: skip


def draw_backbone(axes: Axes, rows: list[ReportRow], look: _Theme) -> None:
    accuracies = [row.accuracy for row in rows if row.source == "backbone" and row.split == "test"]
    if not accuracies:
        return
    mean = float(np.mean(accuracies))
    if len(accuracies) > 1:
        axes.axhspan(min(accuracies), max(accuracies), color=look.ink, alpha=0.07, linewidth=0)
    label = f"backbone {100 * mean:.2f} %"
    axes.axhline(mean, color=look.ink, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1, label=label)


def _draw_search_front(axes: Axes, rows: list[ReportRow], colours: dict[str, str]) -> None:
    search = [row for row in rows if row.source == "search"]
    front = sorted((point.test for point in within_budgets(front_of(search), HUNDREDTHS)), key=_cost)
    if not front:
        return
    (colour,) = colours.values()
    tests = [row for row in search if row.split == "test"]
    axes.scatter(
        [row.relative_macs for row in tests], [row.accuracy for row in tests],
        s=9, color=colour, alpha=0.22, linewidths=0, zorder=2, label="search, every configuration",
    )  # fmt: skip
    axes.plot(
        [row.relative_macs for row in front], [row.accuracy for row in front],
        color=colour, linewidth=2, marker=".", markersize=6, zorder=3, label="search, front chosen on validation",
    )  # fmt: skip


def _draw_fixed(axes: Axes, rows: list[ReportRow], look: _Theme) -> None:
    fixed = [row for row in rows if row.source == "fixed" and row.split == "test"]
    if fixed:
        axes.scatter(
            [row.relative_macs for row in fixed], [row.accuracy for row in fixed],
            s=16, marker="+", color=look.muted, alpha=0.5, linewidths=0.8, zorder=1.5, label="MSDNet's thresholds",
        )  # fmt: skip


def _draw_budget_curves(axes: Axes, rows: list[ReportRow], colours: dict[str, str]) -> None:
    for index, (method, colour) in enumerate(colours.items()):
        seeds = by_seed(row for row in rows if row.source == "search" and row.method == method)
        budgets, accuracy_SB = budget_curves(seeds)
        if not len(budgets):
            continue
        label = f"search, {method}" + (f", {len(seeds)} seeds" if len(seeds) > 1 else "")
        axes.plot(
            budgets, accuracy_SB.mean(0), color=colour, linestyle=_DASHES[index % len(_DASHES)], linewidth=2, zorder=3,
            label=label,
        )  # fmt: skip
        axes.fill_between(budgets, accuracy_SB.min(0), accuracy_SB.max(0), color=colour, alpha=0.15, linewidth=0)


def _draw_gates(figure: Figure, axes: Axes, rows: list[ReportRow], colours: dict[str, str], look: _Theme) -> None:
    gates = [row for row in rows if row.source == "gates" and row.split == "test"]
    tradeoffs = sorted({row.ce_ic_tradeoff for row in gates if row.ce_ic_tradeoff is not None})
    ramp = LinearSegmentedColormap.from_list("", colormaps["viridis"](np.linspace(*look.map_range, 64)))
    shades = ListedColormap(ramp(np.linspace(0, 1, len(tradeoffs)))) if tradeoffs else None

    def colour(row: ReportRow) -> Any:
        if colours or shades is None or row.ce_ic_tradeoff is None:
            return colours.get(row.method, look.muted)
        return shades(tradeoffs.index(row.ce_ic_tradeoff))

    for index, group in enumerate(by_seed(gates)):
        marker = MARKERS[index % len(MARKERS)]
        axes.scatter(
            [row.relative_macs for row in group], [row.accuracy for row in group], c=[colour(row) for row in group],
            s=46, marker=marker, edgecolors=look.background, linewidths=0.8, zorder=4,
        )  # fmt: skip
        name = "gates" if group[0].seed is None else f"gates, seed {group[0].seed}"
        axes.scatter([], [], s=46, marker=marker, color=look.muted, linewidths=0, label=name)
    if not colours and shades is not None and len(tradeoffs) > 1:
        _tradeoff_bar(figure, axes, tradeoffs, shades, look)


def _tradeoff_bar(figure: Figure, axes: Axes, tradeoffs: list[float], shades: ListedColormap, look: _Theme) -> None:
    norm = BoundaryNorm(np.arange(len(tradeoffs) + 1) - 0.5, len(tradeoffs))
    every = -(-len(tradeoffs) // 16)
    ticks = range(0, len(tradeoffs), every)
    bar = figure.colorbar(ScalarMappable(norm, shades), ax=axes, ticks=list(ticks), pad=0.02, fraction=0.035, aspect=32)
    bar.ax.set_yticklabels([f"{tradeoffs[index]:g}" for index in ticks])
    bar.ax.tick_params(which="both", length=0, colors=look.muted, labelsize=9)
    bar.outline.set_visible(False)
    bar.set_label("gates: ce_ic_tradeoff", color=look.ink, labelpad=8)


_LINES = {"cascade": "cascades", ONE_THRESHOLD: "one threshold"}


def _draw_baselines(axes: Axes, rows: list[ReportRow], look: _Theme) -> None:
    baselines = [row for row in rows if row.source in BASELINES and row.split == "test"]
    methods = sorted({row.method for row in baselines}, key=lambda method: (method != "own classifier", method))
    for index, method in enumerate(methods):
        of_method = {
            source: sorted((row for row in baselines if (row.source, row.method) == (source, method)), key=_cost)
            for source in BASELINES
        }
        static = of_method.pop("static")
        marker, style = "sD^vo"[index % 5], (":", "-.", "--")[index % 3]
        if static:
            axes.scatter(
                [row.relative_macs for row in static], [row.accuracy for row in static],
                s=40, marker=marker, facecolors="none", edgecolors=look.ink, linewidths=1.2, zorder=3.5,
                label=f"static networks, {method}",
            )  # fmt: skip
        for source, line in ((source, line) for source, line in of_method.items() if line):
            costs, accuracy_SB = np.array([[row.relative_macs, row.accuracy] for row in line]).T
            seeds = by_seed(row for row in rows if (row.source, row.method) == (source, method))
            if len(seeds) > 1:
                costs, accuracy_SB = budget_curves(seeds)
                axes.fill_between(costs, accuracy_SB.min(0), accuracy_SB.max(0), color=look.ink, alpha=0.1, linewidth=0)
            axes.plot(
                costs, np.atleast_2d(accuracy_SB).mean(0), color=look.ink,
                linewidth=0.9, linestyle=style, marker="x" if source == "cascade" else "", markersize=4,
                markevery=max(1, len(costs) // 12), zorder=2.5, label=f"{_LINES[source]}, {method}",
            )  # fmt: skip


def _draw_published(axes: Axes, published: Sequence[PublishedPoint], look: _Theme) -> None:
    methods = sorted({point.method for point in published}, key=lambda method: (method != "jei_dnn", method))
    for index, method in enumerate(methods):
        points = sorted((point.relative_macs, point.accuracy) for point in published if point.method == method)
        axes.plot(
            *zip(*points, strict=True), color=look.muted, linewidth=1.3, linestyle=("-", ":", "--", "-.")[index % 4],
            marker="x" if len(points) <= _MOST_MARKED else "", markersize=6, zorder=2, label=f"published: {method}",
        )  # fmt: skip


def exit_share_figure(
    rows: Iterable[ReportRow],
    path: Path,
    places_of: Callable[[ReportRow], Sequence[int]] | None = None,
    *,
    theme: str = "light",
    most: int = 24,
) -> None:
    """Draws the share of test samples leaving at each exit as a PNG of stacked bars, along the front of all rows.

    At most `most` points, evenly spread over their cost. `places_of` gives the positions of a row's exits, the
    backbone's own left out; without it exits are numbered.
    """
    front = front_of(rows)
    costs = [point.validation.relative_macs for point in front]
    budgets = np.linspace(costs[0], costs[-1], most) if costs else ()
    bars = sorted((point.test for point in within_budgets(front, budgets)), key=_cost)
    places = [range(len(row.exit_fractions) - 1) if places_of is None else places_of(row) for row in bars]
    found = sorted(set[int]().union(*places))  # points may differ in where their exits are
    names = [f"exit {place}" if places_of is None else place_name(place) for place in found] + ["backbone"]
    num_exits = len(names) if bars else 0
    share_BL = np.zeros((len(bars), num_exits))
    for index, row in enumerate(bars):
        share_BL[index, [*(found.index(place) for place in places[index]), -1]] = row.exit_fractions
    look = THEMES[theme]
    figure, axes = new_figure(look, (9, 3.6))
    shades = colormaps["viridis"](np.linspace(look.map_range[1], look.map_range[0], max(1, num_exits - 1)))
    for exit_ in range(num_exits):
        last = exit_ == num_exits - 1
        axes.bar(
            range(len(bars)), share_BL[:, exit_], bottom=share_BL[:, :exit_].sum(1), width=0.86, label=names[exit_],
            color=look.grid if last else shades[exit_], edgecolor=look.background, linewidth=0.4,
        )  # fmt: skip
    axes.set(xlabel="relative MACs of the front's points", ylabel="share of test samples", ylim=(0, 1))
    texts = distinct_texts([row.relative_macs for row in bars])
    every = max(1, -(-sum(len(text) + 1 for text in texts) // _MOST_LETTERS))
    axes.set_xticks(range(0, len(bars), every), texts[::every], fontsize=8)
    axes.yaxis.set_major_formatter(PERCENT)
    axes.grid(visible=False)
    axes.margins(x=0.01)
    if num_exits:
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False,
            labelcolor=look.ink, handlelength=1, handleheight=1,
        )  # fmt: skip
    save_figure(figure, path)


def uncertainty_figure(
    relative_macs_N: Sequence[float],
    errors: Mapping[str, Sequence[float]],
    coverages: Mapping[str, Sequence[float]],
    level: float,
    path: Path,
    *,
    theme: str = "light",
) -> None:
    """Draws calibration errors and the coverage of prediction sets, by label, along N points of a front, as a PNG.

    `level` is what the sets were made for. Values are fractions; nan leaves a gap.
    """
    look = THEMES[theme]
    figure, left = new_figure(look, (9, 3.6), num_columns=2)
    right = figure.axes[1]
    for axes, curves, title in (
        (left, errors, "calibration error of the exits taken"),
        (right, coverages, f"coverage of sets made for {100 * level:g} %"),
    ):
        for (label, values_N), colour in zip(curves.items(), look.methods, strict=False):
            axes.plot(relative_macs_N, values_N, color=colour, linewidth=1.8, marker=".", markersize=5, label=label)
        axes.set(xlabel="relative MACs of the front's points")
        axes.set_title(title, loc="left", color=look.ink, fontsize=10.5)
        axes.yaxis.set_major_formatter(PERCENT)
    left.set_ylim(bottom=0)
    right.axhline(level, color=look.ink, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    for axes in (left, right):
        axes.legend(loc="best", frameon=False, labelcolor=look.ink, fontsize=9)
    save_figure(figure, path)


def _cost(row: ReportRow) -> float:
    return row.relative_macs


def new_figure(look: _Theme, inches: tuple[float, float], num_columns: int = 1) -> tuple[Figure, Axes]:
    """A figure of axes side by side, all in the theme, and the first of them."""
    with rc_context({"font.size": 10.5, "axes.axisbelow": True}):
        figure = Figure(
            figsize=inches, facecolor=look.background, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        )
        FigureCanvasAgg(figure)
        for axes in figure.subplots(1, num_columns, squeeze=False)[0]:
            axes.set_facecolor(look.background)
            axes.grid(color=look.grid, linewidth=0.8)
            axes.spines[:].set_visible(False)
            axes.spines["bottom"].set(visible=True, color=look.muted)
            axes.tick_params(colors=look.muted, length=0, pad=6)
            axes.xaxis.label.set_color(look.ink)
            axes.yaxis.label.set_color(look.ink)
    return figure, figure.axes[0]


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure in the format of the path's ending; the same figure gives the same bytes."""
    kind = path.suffix.removeprefix(".")
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with atomic_write(path) as temporary, rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(temporary, format=kind, dpi=DOTS_PER_INCH, metadata=undated[kind])
