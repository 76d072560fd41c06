"""The picture of a bench: accuracy against time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from dynexit.core.latency import LatencyTable
from dynexit.run_dir import atomic_write

if TYPE_CHECKING:
    from dynexit.bench.model_bench import BenchRow

_COLOURS = ("#d9480f", "#1971c2", "#2b8a3e", "#9c36b5")
_INK, _MUTED, _GRID = "#1c2128", "#5f6875", "#e6e8ec"


def accuracy_figure(
    predicted: Mapping[int, Sequence[tuple[float, float]]], rows: "Sequence[BenchRow]", table: LatencyTable, path: Path
) -> None:
    """Draws validation accuracy against milliseconds an image as a PNG, for each batch size side by side.

    `predicted` has (relative time, accuracy) of all operating points by batch size, drawn as small dots; what was timed
    is a large one, and the full model in the same runtime a vertical line.
    """
    figure = Figure(figsize=(max(4.5, 3.4 * len(predicted)), 3.9), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    runtimes = list(dict.fromkeys(row.runtime for row in rows))
    for axes, (batch, points) in zip(
        figure.subplots(1, len(predicted), squeeze=False)[0], predicted.items(), strict=True
    ):
        full_ms = 1000 * table.times[batch].backbone / batch
        axes.scatter(
            [full_ms * time for time, _ in points], [accuracy for _, accuracy in points],
            s=10, color=_MUTED, alpha=0.5, linewidths=0, label="all points, predicted (torch)",
        )  # fmt: skip
        for colour, runtime in zip(_COLOURS, runtimes, strict=False):
            mine = [row for row in rows if (row.runtime, row.batch_size) == (runtime, batch)]
            early = [row for row in mine if row.asked]
            axes.scatter(
                [1000 / row.images_per_second for row in early], [row.accuracy for row in early],
                s=46, color=colour, zorder=3, label=f"{runtime}, measured",
            )  # fmt: skip
            for row in mine:
                if not row.asked:
                    axes.axvline(
                        1000 / row.images_per_second, color=colour, linewidth=1.3, linestyle=(0, (5, 3)),
                        label=f"{runtime}, full model",
                    )  # fmt: skip
        axes.set_xlim(left=0)
        axes.set_xlabel("ms an image", color=_INK)
        axes.set_title(f"batch size {batch}", loc="left", color=_INK, fontsize=10.5)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{100 * fraction:.4g} %"))
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(colors=_MUTED, length=0, pad=5)
    figure.axes[0].set_ylabel("validation accuracy", color=_INK)
    entries = figure.axes[0].get_legend_handles_labels()
    columns = max(2, len(predicted))
    figure.legend(*entries, loc="outside lower left", ncols=columns, fontsize=8.5, labelcolor=_INK, frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
