"""The page in a browser: its figure, budgets and cards, on paper, on a phone, and without scripts."""

import itertools
import re
from pathlib import Path

import pytest

from dynexit.report.chart.data import chart_data
from dynexit.report.chart.groups import fronts_of, groups_of
from dynexit.report.figures import pareto_figure
from dynexit.report.judged.cards import cards
from dynexit.report.judged.curves import Training, curves_section
from dynexit.report.judged.front import entries_of
from dynexit.report.page import Figure, Page, PageSection, write_page
from dynexit.report.table import front_of
from tests.report.browser import Browser
from tests.report.test_chart import COSTS, ROWS

pytestmark = pytest.mark.browser
SLY = "<b>=1+1</b></script>"
DOTS = "document.querySelectorAll('#figure .dot').length"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that its script works on."""
    folder = tmp_path_factory.mktemp("page")
    pictures = {theme: folder / f"{theme}.png" for theme in ("light", "dark")}
    for theme, path in pictures.items():
        pareto_figure(ROWS, path, theme=theme)
    front, fronts = front_of(ROWS), fronts_of(ROWS, COSTS)
    labels = {row.point_id: f"{SLY} {row.point_id}" for row in ROWS}
    chart = chart_data(
        groups_of(ROWS, fronts), ROWS, fronts, {}, (), describe=lambda row: SLY, labels=labels,
        study_dir=Path("runs/my study"),
    )  # fmt: skip
    write_page(
        folder / "report.html",
        Page(
            40 * "w", ROWS, [Figure(pictures["light"], "alt", "caption", pictures["dark"])], chart=chart,
            cards=cards(entries_of(front, ROWS, {}, lambda row: SLY), (0.3, 0.45), labels, Path("runs/my study")),
            sections=[
                PageSection("Wide", "", [{f"column {n}": f"some text {n}" for n in range(9)}], folded=[(40 * "w", [])]),
                *curves_section([Training(80 * "w", [{"epoch": n, "exit_accuracy": [0.5, 0.6]} for n in (0, 1)], 1)]),
            ],
        ),
    )  # fmt: skip
    return folder / "report.html"


def test_points_are_hovered_pinned_hidden_and_zoomed(page: Path, chromium: str) -> None:
    with Browser(chromium, page, (1000, 1600)) as browser:
        dots = browser.run(DOTS)
        assert dots > 50
        browser.run("document.getElementById('figure').scrollIntoView()")
        x, y = browser.run(
            "(() => { const box = document.querySelector('#figure .dot.gates').getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        browser.mouse("mouseMoved", x, y)
        assert "% on test" in browser.run("document.getElementById('tip').innerText")
        browser.click(x, y)
        pinned = browser.run("document.getElementById('pinned').innerText")
        assert f"gates of {SLY} jei_dnn-" in pinned
        browser.run("document.querySelector('#legend button').click()")
        hidden = browser.run(DOTS)
        assert 0 < hidden < dots
        browser.run("document.querySelector('#legend button').click()")
        browser.run("[...document.querySelectorAll('#legend button')].at(-1).click()")
        assert browser.run("document.querySelectorAll('#figure .dot.gates').length") == 2  # those of the other seed
        ticks = "[...document.querySelectorAll('#figure .tick')].map((one) => one.textContent).join()"
        whole = browser.run(ticks)
        left, top, width, height = browser.run(
            "(() => { const box = document.getElementById('figure').getBoundingClientRect();"
            "return [box.x, box.y, box.width, box.height]; })()"
        )
        browser.mouse("mousePressed", left + 0.3 * width, top + 0.2 * height, 1)
        browser.mouse("mouseMoved", left + 0.6 * width, top + 0.5 * height, 1)
        browser.mouse("mouseReleased", left + 0.6 * width, top + 0.5 * height)
        assert browser.run(ticks) != whole
        browser.run("[...document.querySelectorAll('#figure-controls button')].at(-1).click()")
        assert browser.run(ticks) == whole
        assert browser.problems == []


def test_split_and_cost_of_the_figure_are_switched(page: Path, chromium: str) -> None:
    with Browser(chromium, page) as browser:
        places = "[...document.querySelectorAll('#figure .dot')].map((one) => one.getAttribute('transform')).join()"
        seen = {browser.run(places)}
        for control, value in (("split", "validation"), ("cost", "1"), ("split", "test")):
            browser.run(
                f"(() => {{ const one = document.getElementById('{control}'); one.value = '{value}';"
                "one.dispatchEvent(new Event('change')); })()"
            )
            seen.add(browser.run(places))
        assert len(seen) == 4
        assert "time of a batch of 8" in browser.run("document.querySelector('#figure .axis').textContent")
        keys = "for (const key of ['ArrowRight', 'ArrowRight', 'Enter']) document.getElementById('figure')"
        browser.run(keys + ".dispatchEvent(new KeyboardEvent('keydown', { key }))")
        assert "The pinned point" in browser.run("document.getElementById('pinned').innerText")
        assert browser.problems == []


def test_a_budget_shows_the_best_point_within_it(page: Path, chromium: str) -> None:
    front = [one for one in front_of(ROWS) if one.validation.source != "backbone"]
    base = max(row.accuracy for row in ROWS if row.source == "backbone" and row.split == "validation")
    by_time = [one for one in front_of(ROWS, 8) if one.validation.source != "backbone"]
    worse = [one for one in front if one.validation.accuracy < base]
    kept = front[: len(worse) + 1][::-1]
    first = [one for one in front if one.validation.relative_macs <= 0.5][-1]
    with Browser(chromium, page) as browser:
        assert f"point {first.test.point_id}" in browser.run("document.getElementById('chosen').innerText")
        for (kind, offers), place in itertools.product(enumerate((front, by_time, kept)), (0, 5, -1)):
            assert len(offers) > 6
            point = offers[place]
            browser.run(
                f"(() => {{ const kind = document.getElementById('budget-kind'); kind.value = '{kind}';"
                "kind.dispatchEvent(new Event('change')); const range = document.getElementById('budget');"
                f"range.value = {place % len(offers)}; range.dispatchEvent(new Event('input')); }})()"
            )
            card = browser.run("document.getElementById('chosen').innerText")
            assert f"point {point.test.point_id}" in card
            assert f"On test {point.test.relative_macs:.3f} of the MACs" in card
            assert f"({point.test.times[0].latency_ms:.3g} ms)" in card
            assert "dynexit save 'runs/my study' 'my study-" in card
            option, unit = (r"--latency-ms ([\d.]+)", 1) if kind == 1 else (r"--relative-macs ([\d.]+)", 100)
            said = re.search(r"at most ([\d.]+) (?:%|ms)", card)
            named = re.search(option, card)
            assert said
            assert named
            assert float(said[1]) == pytest.approx(unit * float(named[1]))
        assert browser.run("document.querySelectorAll('#chosen .what button').length") == 3
        assert not browser.run("document.getElementById('usual-budgets').open")
        assert browser.run("document.querySelectorAll('b').length") == 0
        assert browser.problems == []


def test_a_phone_needs_no_scrolling_sideways(page: Path, chromium: str) -> None:
    with Browser(chromium, page, (390, 844)) as browser:
        browser.run("for (const one of document.querySelectorAll('details')) one.open = true")
        assert browser.run("document.documentElement.scrollWidth") <= 390
        rights = "[...document.querySelectorAll('td, .card, #figure')].map((one) => one.getBoundingClientRect().right)"
        assert browser.run(f"Math.max(...{rights})") <= 390.5
        assert browser.problems == []


def test_without_scripts_there_are_a_picture_and_a_table(page: Path, chromium: str, tmp_path: Path) -> None:
    with Browser(chromium, page, script=False) as browser:
        assert browser.run("document.querySelector('noscript img').complete")
        assert browser.run("document.getElementById('usual-budgets').open")
        assert browser.run("document.getElementById('interactive').hidden")
        assert browser.run("document.querySelectorAll('#usual-budgets code').length") >= 6
        browser.pdf(tmp_path / "page.pdf")
        assert browser.problems == []
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_paper_has_the_budgets_and_the_figure(page: Path, chromium: str, tmp_path: Path) -> None:
    with Browser(chromium, page, dark=True) as browser:
        browser.pdf(tmp_path / "page.pdf")
        assert browser.run("document.getElementById('usual-budgets').open")
        assert browser.problems == []
    assert (tmp_path / "page.pdf").stat().st_size > 30_000
