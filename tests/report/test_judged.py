"""Words for intervals, the front's tables and the cards of budgets, on made-up rows."""

import csv
from pathlib import Path

import numpy as np
import pytest

from dynexit.core.statistics import Interval
from dynexit.report.judged.cards import cards
from dynexit.report.judged.front import FrontEntry, entries_of, even_steps, write_front
from dynexit.report.judged.methods import MethodAtBudget, methods_section
from dynexit.report.judged.outcomes import Judgement
from dynexit.report.judged.seeds import SeedAnswers, num_distinct
from dynexit.report.judged.verdicts import headline
from dynexit.report.judged.words import at_least, at_most, difference_text, drop_to_test, share_text
from dynexit.report.page import Page, write_page
from dynexit.report.table import front_of
from dynexit.search.operating_points import ReportRow
from tests.report.synthetic_rows import synthetic_rows

ROWS = synthetic_rows(tradeoffs=(0.1, 1.0))
JUDGEMENTS = {
    (row.key, row.split): Judgement(
        Interval(row.accuracy, row.accuracy - 0.02, row.accuracy + 0.01),
        Interval(row.accuracy - 0.98, row.accuracy - 1, row.accuracy - 0.975),
        Interval(row.relative_macs, row.relative_macs - 0.01, row.relative_macs + 0.01),
        400,
    )
    for row in ROWS
}


def words(row: ReportRow) -> str:
    return f"50 % & {row.source}_{row.accuracy_weight}"


def entries() -> list[FrontEntry]:
    return entries_of(front_of(ROWS), ROWS, JUDGEMENTS, words)


def test_intervals_in_words() -> None:
    assert difference_text(Interval(0.0017, -0.0017, 0.005)).replace("\xa0", " ") == "+0.17 (−0.17, +0.50)"
    assert share_text(Interval(0.9783, 0.9601, 0.9888)).replace("\xa0", " ") == "97.83 % (96.01 to 98.88)"


@pytest.mark.parametrize(
    ("low", "high", "within", "reached"),
    [
        (0.1, 0.3, "yes", "no"),
        (0.6, 0.7, "no", "yes"),
        (0.4, 0.6, "too few samples to tell", "too few samples to tell"),
    ],
)
def test_a_limit_holds_if_the_whole_interval_does(low: float, high: float, within: str, reached: str) -> None:
    interval = Interval((low + high) / 2, low, high)
    assert (at_most(interval, 0.5), at_least(interval, 0.5)) == (within, reached)


@pytest.mark.parametrize(("distinct", "seeds"), [(1, "2, equal"), (2, "2")])
def test_seeds_without_randomness_are_named(distinct: int, seeds: str) -> None:
    points = tuple(front_of(ROWS)[-2:])
    spread = (-0.02, 0.01)
    found = MethodAtBudget(0.5, "probe", points, distinct, Interval(0.0, -0.1, 0.1), spread, None, None)
    (section,) = methods_section([found])
    ((cells,),) = [section.table]
    assert cells["seeds"] == seeds
    assert (
        ("; seeds −2.00 to +1.00" in cells["vs backbone, points"]) == ("(" in cells["test accuracy"]) == (distinct > 1)
    )
    assert ("a seed changes nothing" in section.remark) == (distinct == 1)


def test_only_other_answers_count_as_seeds() -> None:
    right_N, origin_N = np.arange(20) % 3 > 0, np.arange(20)
    other_N = right_N.copy()
    other_N[7] ^= True
    one, same, other = (SeedAnswers("a", answer_N, origin_N) for answer_N in (right_N, right_N.copy(), other_N))
    assert [num_distinct([one, same]), num_distinct([one, other, same])] == [1, 2]
    assert num_distinct([one, SeedAnswers("b", right_N, origin_N)]) == 2  # of other images


def test_headline_states_the_verdict() -> None:
    found = entries()
    affordable = [one for one in found if one.validation.on_front and one.validation.relative_macs <= 0.5][-1]
    text = headline(found)
    assert affordable.verdict == "worse"
    assert "test accuracy: worse than the backbone’s" in text
    assert affordable.difference in text
    assert "above" not in text


def test_front_csv_has_each_point_once(tmp_path: Path) -> None:
    found = entries()
    write_front(tmp_path, found)
    with (tmp_path / "front.csv").open() as file:
        table = list(csv.DictReader(file))
    front = front_of(ROWS)
    assert len({tuple(row.values()) for row in table}) == len(table)
    assert [float(row["test_accuracy"]) for row in table[: len(front)]] == [point.test.accuracy for point in front]
    assert sum(row["source"] == "backbone" for row in table) == 1
    for row, point in zip(table, front, strict=False):
        assert (row["point_id"], row["configuration"]) == (point.test.point_id, point.test.configuration)
        assert float(row["test_difference_low"]) < float(row["test_difference"]) < float(row["test_difference_high"])
        shares = [float(row[f"exit_{exit_}"]) for exit_ in range(len(point.test.exit_fractions))]
        assert tuple(shares) == point.test.exit_fractions


def test_tables_for_papers_are_escaped(tmp_path: Path) -> None:
    write_front(tmp_path, entries())
    tex, markdown = ((tmp_path / name).read_text() for name in ("front.tex", "front.md"))
    assert tex.count(r"\\") == tex.count("\n") - 5
    assert "%" not in tex.replace(r"\%", "")
    assert "−" not in tex
    assert len({line.count("|") for line in markdown.splitlines()}) == 1


def test_steps_are_even_and_end_with_the_backbone() -> None:
    found = entries()
    shown = even_steps(found, 8)
    assert shown[-1].test.source == "backbone"
    assert 4 <= len(shown) <= 9
    ways = [one for one in found if one.test.source != "backbone"]
    costs = [one.validation.relative_macs for one in ways]
    for budget in np.linspace(costs[0], costs[-1], 8):
        assert [one for one in ways if one.validation.relative_macs <= budget][-1] in shown
    assert even_steps(found, 1000) == found
    assert even_steps([]) == []


def test_a_card_buys_the_best_within_its_budget() -> None:
    found = entries()
    labels = {one.test.point_id: f"label {one.test.point_id}" for one in found}
    made = cards(found, (0.3, 0.45), labels, Path("runs/my study"))
    front = [one for one in found if one.test.source != "backbone"]
    for card in made:
        share = float(card.commands["measure it on the test split"].rpartition("=")[2])
        assert [one for one in front if one.validation.relative_macs <= share][-1] is card.entry
        assert card.label == f"label {card.entry.test.point_id}"
    assert made[0].commands["save it as a model folder"].startswith("dynexit save 'runs/my study' 'my study-0.")
    assert any("at most 45 % of the MACs" in card.budget for card in made)
    assert cards([], (), {}, Path("runs/x")) == []


def test_drop_to_test_is_shown_beside_the_backbones() -> None:
    text = drop_to_test(front_of(ROWS), ROWS)
    base = {row.split: row.accuracy for row in ROWS if row.source == "backbone"}
    own = 100 * (base["test"] - base["validation"])
    assert text.endswith(f"the backbone’s own by {own:+.2f}.".replace("-", "−"))
    assert drop_to_test([], ROWS) == ""


def test_page_shows_cards_warnings_and_intervals(tmp_path: Path) -> None:
    found = entries()
    made = cards(found, (0.3,), {}, Path("runs/x"))
    page = Page("x", ROWS, judged=JUDGEMENTS, cards=made, warnings=["Few <originals>"], remarks=["A remark."])
    write_page(tmp_path / "report.html", page)
    html = (tmp_path / "report.html").read_text()
    for text in (made[0].commands["save it as a model folder"], "Few &lt;originals&gt;", "A remark.", "Choose your"):
        assert text in html
    assert html.count("<script>") == 1
    assert "script-src 'sha256-" in html
    assert share_text(JUDGEMENTS[found[0].test.key, "test"].accuracy) in html
