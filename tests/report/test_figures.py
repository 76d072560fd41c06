import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dynexit.report import figures
from dynexit.report.published import PublishedPoint
from dynexit.report.table import by_seed, front_of
from dynexit.search.operating_points import BASELINES
from tests.report.synthetic_rows import row, synthetic_rows

ROWS = synthetic_rows(tradeoffs=(0.1, 1.0, 5.0), accuracy_weights=(0.5, 0.7, 0.8, 0.9, 0.95))
METHODS = synthetic_rows((0.1, 1.0), (0, 1, 2), (0.5, 0.8, 0.95), ("jei_dnn", "dyce", "boosted"))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws and gives the axes instead of a file."""
    kept = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: kept.append(figure))

    def draw(function, *arguments, **options):
        function(*arguments[:1], tmp_path / "x.png", *arguments[1:], **options)
        return kept[-1].axes[0]

    return draw


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else []


def test_the_picture_is_sharp_and_the_same_every_time(tmp_path):
    for name in ("a.png", "b.png"):
        figures.pareto_figure(ROWS, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1440, 864)
        assert image.info["dpi"] == pytest.approx((160, 160), abs=0.1)
        assert image.getpixel((2, 2))[:3] == (255, 255, 255)
    figures.pareto_figure(ROWS, tmp_path / "c.png", theme="dark")
    with Image.open(tmp_path / "c.png") as image:
        assert max(image.getpixel((2, 2))[:3]) < 40


def test_the_front_is_drawn_with_test_values_of_points_chosen_on_validation(drawn):
    axes = drawn(figures.pareto_figure, ROWS)
    (line,) = [line for line in axes.get_lines() if line.get_label() == "search, front chosen on validation"]
    allowed = {(p.test.relative_macs, p.test.accuracy) for p in front_of(r for r in ROWS if r.source == "search")}
    shown = set(zip(*line.get_data(), strict=True))
    assert shown
    assert shown <= allowed
    assert list(line.get_xdata()) == sorted(line.get_xdata())


def test_baselines_have_markers_and_a_legend_of_their_own(drawn):
    fields = {"split": "test", "seed": None, "method": "own classifier"}
    rows = [row(0.1 * k, 0.5 + 0.1 * k, source=source, **fields) for source in BASELINES for k in (3, 1, 2)]
    shown = drawn(figures.pareto_figure, [*ROWS, *rows])
    new = set(labels(shown)) - set(labels(drawn(figures.pareto_figure, ROWS)))
    assert new == {f"{what}, own classifier" for what in ("static networks", "cascades", "one threshold")}
    (dots,) = [dots for dots in shown.collections if dots.get_label() == "static networks, own classifier"]
    (line,) = [line for line in shown.get_lines() if line.get_label() == "cascades, own classifier"]
    expected = [[0.1 * k, 0.5 + 0.1 * k] for k in (1, 2, 3)]
    np.testing.assert_allclose(dots.get_offsets(), expected)
    np.testing.assert_allclose(line.get_xydata(), expected)
    assert not len(dots.get_facecolors())


def test_gates_backbone_and_seeds_are_all_there(drawn):
    axes = drawn(figures.pareto_figure, ROWS)
    offsets = {tuple(point) for dots in axes.collections for point in np.asarray(dots.get_offsets()).tolist()}
    gates = {(r.relative_macs, r.accuracy) for r in ROWS if r.source == "gates" and r.split == "test"}
    assert gates <= offsets
    backbone = next(r.accuracy for r in ROWS if r.source == "backbone" and r.split == "test")
    assert any(list(line.get_ydata()) == [backbone, backbone] for line in axes.get_lines())
    assert labels(axes)[0] == f"backbone {100 * backbone:.2f} %"
    assert labels(axes)[-2:] == ["gates, seed 0", "gates, seed 1"]
    assert [text.get_text() for text in axes.figure.axes[1].get_yticklabels()] == ["0.1", "1", "5"]


def test_budget_curves_take_the_best_on_validation():
    groups = by_seed(r for r in METHODS if r.source == "search" and r.method == "jei_dnn")
    budgets, accuracy_SB = figures.budget_curves(groups)
    assert accuracy_SB.shape == (3, len(budgets))
    for group, accuracy_B in zip(groups, accuracy_SB, strict=True):
        tests = {r.key: r.accuracy for r in group if r.split == "test"}
        for budget, accuracy in zip(budgets[::40], accuracy_B[::40], strict=True):
            affordable = [r for r in group if r.split == "validation" and r.relative_macs <= budget]
            best = max(affordable, key=lambda r: (r.accuracy, -r.relative_macs))
            assert accuracy == tests[best.key]
    assert figures.budget_curves([])[1].size == 0


def test_several_methods_have_a_colour_and_a_band_each(drawn):
    published = [
        PublishedPoint("jei_dnn", 0.9, 0.6),
        PublishedPoint("jei_dnn", 0.8, 0.4),
        PublishedPoint("old", 0.5, 0.3),
    ]
    axes = drawn(figures.pareto_figure, METHODS, published)
    assert labels(axes)[1:4] == [f"search, {method}, 3 seeds" for method in ("boosted", "dyce", "jei_dnn")]
    assert labels(axes)[-2:] == ["published: jei_dnn", "published: old"]
    assert len({line.get_color() for line in axes.get_lines() if line.get_label().startswith("search")}) == 3
    assert len(axes.figure.axes) == 2, "the bar of the only method's tradeoffs"
    both = [replace(r, method=name, point_id=name + r.point_id) for name in ("a", "b") for r in ROWS]
    assert len(drawn(figures.pareto_figure, both).figure.axes) == 1, "no bar where a gate's colour is its method"


def test_gates_of_one_method_keep_their_tradeoffs_colours(drawn):
    probes = [replace(r, method="probe", point_id=f"p{r.seed}") for r in ROWS if r.source == "search"]
    axes = drawn(figures.pareto_figure, [*ROWS, *probes])
    assert labels(axes)[1:] == [*(f"search, {m}, 2 seeds" for m in ("jei_dnn", "probe")), *labels(axes)[-2:]]
    assert [text.get_text() for text in axes.figure.axes[1].get_yticklabels()] == ["0.1", "1", "5"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [r for r in ROWS if r.source == "backbone"],
        [r for r in ROWS if r.source == "gates"],
        [r for r in ROWS if r.split == "validation"],
        [replace(r, seed=None, ce_ic_tradeoff=None) for r in ROWS],
        [replace(r, ce_ic_tradeoff=0.0) for r in ROWS],
        [replace(r, seed=seed, point_id=f"{seed}") for seed in range(13) for r in ROWS if r.source == "gates"],
        [
            replace(r, accuracy=r.accuracy - 0.01 * i, point_id=str(i))
            for i in range(3)
            for r in ROWS
            if r.source == "backbone"
        ],
    ],
    ids=["none", "backbone", "gates", "validation", "no seed", "zero tradeoff", "13 seeds", "3 backbones"],
)
def test_any_part_may_be_missing(rows, tmp_path):
    figures.pareto_figure(rows, tmp_path / "a.png")
    figures.exit_share_figure(rows, tmp_path / "b.png")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}


def test_labels_of_close_points_differ_and_do_not_overlap(drawn):
    for step in (0.1, 0.003, 0.0004, 0.000002):
        figures_of = [(0.09 + step * n, 0.5 + n / 100) for n in range(24)]
        rows = [row(*one, split, point_id=str(one)) for one in figures_of for split in ("validation", "test")]
        axes = drawn(figures.exit_share_figure, rows)
        axes.figure.draw_without_rendering()
        ticks = axes.get_xticklabels()
        assert len({tick.get_text() for tick in ticks}) == len(ticks) >= 8
        boxes = [tick.get_window_extent() for tick in ticks]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
        shown = {round(tick.get_position()[0]): tick.get_text() for tick in ticks}
        assert all(float(text) == pytest.approx(figures_of[n][0], abs=5e-3) for n, text in shown.items())


def test_the_bars_are_the_shares_on_test(drawn):
    axes = drawn(figures.exit_share_figure, ROWS, lambda row: (-2, 0, 1, 2, 4, 5, 6), most=5)
    bars = [[bar.get_height() for bar in container] for container in axes.containers]
    shown = {tuple(shares) for shares in np.array(bars).T.round(9).tolist()}
    assert 2 <= len(shown) <= 5
    assert shown <= {tuple(np.round(p.test.exit_fractions, 9).tolist()) for p in front_of(ROWS)}
    assert labels(axes) == ["backbone", *(f"block {place}" for place in (6, 5, 4, 2, 1, 0)), "the stem"]


def test_points_with_fewer_exits_still_end_with_the_backbone(drawn):
    rows = [replace(r, exit_fractions=(0.25, 0.75)) if r.source == "backbone" else r for r in ROWS]
    rows = [replace(r, accuracy=1.0) if r.source == "backbone" else r for r in rows]
    axes = drawn(figures.exit_share_figure, rows, lambda row: range(1) if row.source == "backbone" else range(7))
    dearest = [container[-1].get_height() for container in axes.containers]
    assert dearest == pytest.approx([0.25, 0, 0, 0, 0, 0, 0, 0.75])


def test_neither_mlflow_nor_a_global_figure_is_loaded():
    program = (
        "import sys; from dynexit.report import figures, page, published, table, terminal, tracking;"
        "sys.exit(bool({'mlflow', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "start"), [("pareto.svg", b"<?xml"), ("pareto.pdf", b"%PDF"), ("pareto.png", b"\x89PNG")]
)
def test_pareto_has_the_format_of_its_name(tmp_path, name, start):
    rows = synthetic_rows(tradeoffs=(0.1, 1.0), accuracy_weights=(0.5, 0.8))
    figures.pareto_figure(rows, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(start)
    figures.pareto_figure(rows, tmp_path / name)
    assert (tmp_path / name).read_bytes() == content
