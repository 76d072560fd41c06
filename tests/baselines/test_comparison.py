"""The page's table of baselines over several seeds, against loops over the seeds."""

from dataclasses import replace

import numpy as np

from dynexit.baselines.comparison import Comparison, comparison_section
from dynexit.baselines.rows import Baseline
from dynexit.core.statistics import mean_interval
from dynexit.report.judged.seeds import SeedAnswers
from dynexit.report.judged.words import difference_text
from dynexit.report.table import FrontPoint
from dynexit.study.read import load_study
from tests.command_line import TINY
from tests.report.synthetic_rows import row

NUM_IMAGES = 400


def compared(seed: int, *, is_random: bool = True, budget: float | None = None) -> Comparison:
    """A static network, or with a budget a cascade, of one seed against a point of the study."""
    (point, *_) = load_study(TINY, [f"data.seed={seed}"]).points
    random = np.random.default_rng(seed if is_random else 0)
    mine, theirs = (
        SeedAnswers(f"images {seed if is_random else 0}", random.random(NUM_IMAGES) < chance, np.arange(NUM_IMAGES))
        for chance in (0.95, 0.9)
    )
    networks = f'[["small", {0.5 + 0.1 * seed}], ["backbone", null]]' if budget else '[["small", null]]'
    test = row(0.3 + 0.01 * seed, theirs.correct_N.mean(), "test", "cascade" if budget else "static", method="own")
    test = replace(test, configuration=networks, seed=seed)
    ours = row(0.2, mine.correct_N.mean(), "test")
    baseline = Baseline("own", point, replace(test, split="validation"), test, lambda split: theirs.correct_N)
    return Comparison(baseline, budget, FrontPoint(ours, ours, 0.0), (mine, theirs))


def test_seeds_are_one_row_with_their_spread() -> None:
    found = [compared(seed) for seed in (0, 1, 2)]
    (cells,) = comparison_section(found).table
    answers = [one.answers for one in found if one.answers]
    gains = [100 * (mine.correct_N.mean() - theirs.correct_N.mean()) for mine, theirs in answers]
    values_N = np.concatenate([mine.correct_N.astype(float) - theirs.correct_N for mine, theirs in answers])
    spread = f"; seeds {min(gains):+.2f} to {max(gains):+.2f}".replace("-", "−")
    assert cells["difference"] == difference_text(mean_interval(values_N)) + spread
    accuracies = [100 * theirs.correct_N.mean() for _, theirs in answers]
    text = f"0.310 at {np.mean(accuracies):.2f} % ({min(accuracies):.2f} to {max(accuracies):.2f})"
    assert cells["test MACs and accuracy"].replace("\N{NO-BREAK SPACE}", " ") == text
    assert (cells["seeds"], cells["ours is"]) == ("3", "better")


def test_each_seed_has_its_own_cascade() -> None:
    (cells,) = comparison_section([compared(seed, budget=0.4) for seed in (0, 1)]).table
    name = "cascade within 0.4: small above 0.50, else backbone; other seeds have their own"
    assert cells["compared with"] == name


def test_seeds_with_the_same_answers_have_no_spread() -> None:
    section = comparison_section([compared(seed, is_random=False) for seed in (0, 1)])
    (cells,) = section.table
    assert cells["seeds"] == "2, equal"
    assert "seeds" not in cells["difference"]
    assert "Equal seeds gave the same answers" in section.remark


def test_one_seed_has_no_column_of_seeds() -> None:
    (cells,) = comparison_section([compared(0), Comparison(compared(0, budget=0.4).baseline, 0.4)]).table[:1]
    assert "seeds" not in cells
    assert "(" in cells["ours"]


def test_a_seed_without_a_point_as_cheap_is_left_out() -> None:
    cheap = Comparison(compared(1).baseline, None)
    (cells,) = comparison_section([compared(0), cheap]).table
    assert cells == comparison_section([compared(0)]).table[0] | {"seeds": "1"}
    (cells,) = comparison_section([cheap]).table
    assert cells["ours is"] == "none as cheap"
