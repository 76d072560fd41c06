"""Tables that follow a configuration equal rebuilt tables, bit for bit; rows and thresholds keep their rules."""

import numpy as np
import pytest

from dynexit.search import tables as compiled
from dynexit.search.kernels import OFF
from dynexit.search.line_search import LineSearch
from dynexit.search.problem import objective_of
from dynexit.search.rows import midpoint
from tests.reference import exit_search
from tests.reference.exit_problems import odd_problem, random_problem


def wander(generator: np.random.Generator, search: LineSearch, steps: int) -> None:
    """Random changes, small ones (tables are updated) and large ones (tables are dropped), tables read in between."""
    confidence_PHN = search.problem.confidence_PHN
    num_positions, num_heads, count = confidence_PHN.shape
    for _ in range(steps):
        position = int(generator.integers(num_positions))
        head = int(search.tables.head_P[position])
        if head == OFF or generator.random() < 0.2:
            head = int(generator.integers(-1, num_heads))
            threshold = float(confidence_PHN[position, max(head, 0), generator.integers(count)])
        else:
            near = float(search.tables.threshold_P[position]) + generator.normal(scale=0.02)
            threshold = float(np.float32(np.clip(near, -1, 1)))
        search.tables.move(position, head, threshold)
        search.tables.best_exit(int(generator.integers(num_positions)), 1e-6, 1e-3)


@pytest.mark.parametrize("levels", [0, 6])
def test_tables_after_many_moves_equal_tables_made_anew(levels):
    generator = np.random.default_rng(levels)
    problem = random_problem(generator, 700, 5, 3, levels)
    wandered = LineSearch(problem)
    updated = 0
    for _ in range(40):
        wander(generator, wandered, 10)
        rebuilt = LineSearch(problem, wandered.rows)
        rebuilt.move_to(wandered.candidate().exits)
        for position in range(5):
            updated += bool(wandered.tables.fresh_P[position])
            for search in (wandered, rebuilt):
                search.tables.best_exit(position, 1e-6, 1e-3)
        assert wandered.tables.fresh_P.all()
        for name in ("table_PHQB", "count_FQ", "right_F", "head_P", "threshold_P"):
            np.testing.assert_array_equal(getattr(wandered.tables, name), getattr(rebuilt.tables, name))
        assert wandered.candidate() == rebuilt.candidate()
        assert (wandered.candidate().correct, wandered.candidate().macs) == exit_search.evaluate(
            problem, list(wandered.candidate().exits)
        )
    assert updated > 40  # most tables compared were updated, not rebuilt


def test_the_bulk_route_and_the_update_route_give_the_same_tables(monkeypatch):
    problem = random_problem(np.random.default_rng(3), 300, 4, 2)
    both = []
    for share in (0, 10**9):  # never, and always, drop the tables
        monkeypatch.setattr(compiled, "_BULK", share)
        search = LineSearch(problem)
        wander(np.random.default_rng(7), search, 60)
        for position in range(4):
            search.tables.best_exit(position, 1e-6, 1e-3)
        both.append(search)
    np.testing.assert_array_equal(both[0].tables.table_PHQB, both[1].tables.table_PHQB)
    assert both[0].candidate() == both[1].candidate()


def test_without_refining_the_best_threshold_between_bins_is_found():
    for seed in range(5):
        problem = random_problem(np.random.default_rng(seed), 400, 1, 2, levels=[0, 30][seed % 2])
        for weight in (0.3, 0.6, 0.9):
            objective = objective_of(problem, weight)
            search = LineSearch(problem, refine=False)
            found = search.descend(((OFF, 1.0),), objective)[-1]
            prices = [exit_search.objective(problem, [(OFF, 1.0)], weight)]
            for head in range(2):
                confidence_N = problem.confidence_PHN[0, head][search.rows.order(0, head)]
                for edge in search.rows.edges_PHB[0, head][1:]:
                    threshold = float(confidence_N[edge]) if edge < 400 else -1.0
                    prices.append(exit_search.objective(problem, [(head, threshold)], weight))
            assert objective(found.correct, found.macs) == pytest.approx(min(prices), abs=1e-12)


@pytest.mark.parametrize("levels", [0, 3, 40])
def test_rows_are_sorted_and_equal_confidences_share_a_bin(levels):
    problem = random_problem(np.random.default_rng(1), 500, 3, 2, levels)
    rows = LineSearch(problem).rows
    for position in range(3):
        for head in range(2):
            packed_N = rows.order_PHN[position, head].astype(np.int64)
            order_N, code_N = packed_N & ((1 << 30) - 1), rows.code_PNH[position, :, head].astype(int)
            confidence_N = problem.confidence_PHN[position, head][order_N]
            assert sorted(order_N.tolist()) == list(range(500))
            assert (np.diff(confidence_N) <= 0).all()
            np.testing.assert_array_equal(packed_N[:-1] >> 31, confidence_N[1:] == confidence_N[:-1])
            np.testing.assert_array_equal((packed_N >> 30) & 1, problem.correct_PHN[position, head][order_N])
            np.testing.assert_array_equal(code_N >> 15, problem.correct_PHN[position, head])
            bin_N = (code_N & 0x7FFF)[order_N]
            assert ((np.diff(bin_N) == 0) | (np.diff(confidence_N) < 0)).all()
            edges_B = rows.edges_PHB[position, head]
            np.testing.assert_array_equal(np.searchsorted(edges_B, np.arange(500), side="right") - 1, bin_N)


def test_minus_zero_ties_with_zero():
    problem = odd_problem(np.random.default_rng(0), 6)
    packed_N = LineSearch(problem).rows.order_PHN[0, 0].astype(np.int64)
    assert (packed_N[:-1] >> 31).all()


@pytest.mark.parametrize(
    ("upper", "lower", "expected"),
    [(0.75, 0.25, 0.5), (1.0, np.nextafter(np.float32(1), np.float32(0)), None), (0.7, 0.0, 0.35)],
)
def test_the_threshold_parts_its_neighbours(upper, lower, expected):
    upper, lower = np.float32(upper), np.float32(lower)
    threshold = midpoint(upper, lower)
    assert upper > np.float32(threshold) >= lower
    assert threshold == float(lower if expected is None else np.float32(expected))


def test_neighbours_in_float32_are_parted_exactly():
    # either the midpoint rounds to the lower one, or it would round to the upper one and the lower one is taken
    for bits in range(0x3F000000, 0x3F000040):
        lower, upper = np.array([bits, bits + 1], dtype=np.uint32).view(np.float32)
        assert midpoint(upper, lower) == float(lower)
