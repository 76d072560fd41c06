"""The picture of accuracy against time, for each measured batch size."""

from collections.abc import Sequence
from pathlib import Path

from dynexit.report.figures import HUNDREDTHS, PERCENT, THEMES, draw_backbone, new_figure, save_figure
from dynexit.report.table import front_of, within_budgets
from dynexit.search.operating_points import ReportRow


def time_figure(rows: Sequence[ReportRow], batch_sizes: Sequence[int], path: Path, *, theme: str = "light") -> None:
    """Draws test accuracy against relative time as a PNG, for each batch size side by side (at most four).

    The front by time is a line, the points of that by MACs are crosses at the times that they take, which rise with
    MACs only roughly; the backbone is a dashed line.
    """
    look, sizes = THEMES[theme], list(batch_sizes)[:4]
    figure, _ = new_figure(look, (max(4.5, 3.2 * len(sizes)), 3.8), num_columns=len(sizes))
    timed = [row for row in rows if row.times]
    early = [row for row in timed if row.source != "backbone"]
    for axes, batch in zip(figure.axes, sizes, strict=True):
        for label, front, style, marker, colour in (
            ("front by MACs", front_of(early), "", "x", look.methods[1]),
            ("front by time", within_budgets(front_of(early, batch), HUNDREDTHS, batch), "-", ".", look.methods[0]),
        ):
            tests = sorted((point.test for point in front), key=lambda row: row.time(batch).relative_time)
            axes.plot(
                [row.time(batch).relative_time for row in tests], [row.accuracy for row in tests],
                color=colour, linewidth=1.8, linestyle=style, marker=marker, markersize=4, label=label,
            )  # fmt: skip
        draw_backbone(axes, timed, look)
        axes.axvline(1, color=look.muted, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
        axes.set(xlabel="relative time")
        axes.set_title(f"batch size {batch}", loc="left", color=look.ink, fontsize=10.5)
        axes.yaxis.set_major_formatter(PERCENT)
    figure.axes[0].set_ylabel("test accuracy", color=look.ink)
    entries, columns = figure.axes[0].get_legend_handles_labels(), max(2, min(3, len(sizes)))
    figure.legend(*entries, loc="outside lower left", ncols=columns, frameon=False, labelcolor=look.ink, fontsize=9)
    save_figure(figure, path)
