"""The data of the page's figure against loops over the rows."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dynexit.errors import UserError
from dynexit.jobs.infer import choose
from dynexit.report.chart.data import chart_data, json_script
from dynexit.report.chart.groups import fronts_of, groups_of, reachable, spread, steps
from dynexit.report.published import PublishedPoint
from dynexit.report.table import FrontPoint, front_of, relative_cost
from dynexit.search.operating_points import ReportRow, RowTime
from dynexit.study.outcomes import InferSettings
from tests.report.synthetic_rows import row, synthetic_rows


def timed(rows: list[ReportRow]) -> list[ReportRow]:
    """The same with a time that rises with MACs, but slower."""
    return [
        replace(one, times=(RowTime(8, 4 * (0.3 + 0.7 * one.relative_macs), 0.3 + 0.7 * one.relative_macs),))
        for one in rows
    ]


ROWS = timed(synthetic_rows(tradeoffs=(0.1, 1.0), methods=("jei_dnn", "probe"), seeds=(0, 1)))
COSTS = (None, 8)


def data(
    rows: list[ReportRow] = ROWS, published: tuple[PublishedPoint, ...] = (), costs: tuple[int | None, ...] = COSTS
) -> dict:
    fronts = fronts_of(rows, costs)
    groups = groups_of(rows, fronts)
    labels = {one.point_id: f"label of {one.point_id}" for one in rows}
    return chart_data(
        groups, rows, fronts, {}, published, describe=lambda one: one.source, labels=labels, study_dir=Path("runs/x")
    )


def cost(one: ReportRow, index: int) -> float:
    return one.relative_macs if index == 0 else one.times[0].relative_time


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_curves_are_what_each_budget_buys(index: int, split: str) -> None:
    search = [one for one in ROWS if one.source == "search" and one.method == "probe"]
    tests = {one.key: one for one in search if one.split == "test"}
    seeds = [[one for one in search if one.seed == seed and one.split == "validation"] for seed in (0, 1)]
    fronts = [front_of([one for one in search if one.seed == seed], COSTS[index]) for seed in (0, 1)]
    found = steps(fronts, COSTS[index], split)
    assert found[0].budget == max(min(cost(one, index) for one in own) for own in seeds)
    for step, following in zip(found, [*found[1:], None], strict=True):
        for budget in (step.budget, step.budget if following is None else (step.budget + following.budget) / 2):
            bought = []
            for own in seeds:
                within = [one for one in own if cost(one, index) <= budget + 1e-12]
                best = max(within, key=lambda one: (one.accuracy, -cost(one, index)))
                bought.append((best if split == "validation" else tests[best.key]).accuracy)
            wanted = (np.mean(bought), min(bought), max(bought))
            assert (step.mean, step.least, step.greatest) == pytest.approx(wanted, abs=1e-12)


def test_cascades_have_curves_over_seeds_and_points_of_each() -> None:
    cascades = [
        replace(one, source="cascade", seed=seed, accuracy=one.accuracy - 0.01 * seed, times=(), point_id=f"c{seed}")
        for one in ROWS
        if one.source == "search" and one.method == "probe" and one.seed == 0
        for seed in (0, 1)
    ]
    found = data([*ROWS, *cascades])
    (series,) = [one for one in found["series"] if one["kind"] == "cascade"]
    lower, upper = ([*zip(*series["curves"]["0test"], strict=True)][which] for which in (2, 3))
    assert np.subtract(upper, lower) == pytest.approx(np.full(len(lower), 0.01), abs=2e-5)
    assert series["curves"]["1test"] == []  # times are not known
    own = [one for one in found["points"] if found["series"][one["series"]] is series]
    assert {one["seed"] for one in own} == {0, 1}
    assert {one["label"] for one in own} == {"cascade"}


def test_offers_are_the_front_in_order_of_cost() -> None:
    found = data()
    for index in (0, 1):
        front = [one for one in front_of(ROWS, COSTS[index]) if one.validation.source != "backbone"]
        offers = found["offers"][index]
        assert [offer["cost"] for offer in offers] == [cost(one.validation, index) for one in front]
        for offer, one in zip(offers, front, strict=True):
            point = found["points"][offer["point"]]
            assert (point["id"], point["search"]) == (one.test.point_id, one.test.search_id)
            assert point["test"]["accuracy"] == round(one.test.accuracy, 5)
            words = shlex.split(offer["commands"]["save it as a model folder"])
            limit = float(words[words.index("--relative-macs" if index == 0 else "--latency-ms") + 1])
            unit = 1 if index == 0 else 4
            within = [other for other in front if unit * cost(other.validation, index) <= limit]
            assert within[-1] is one
            said = float(offer["budget"].split()[2])
            assert said == pytest.approx(limit if index else 100 * limit)
            infer = offer["commands"]["measure it on the test split"].split("=")
            assert float(infer[1].split()[0]) == limit
            given = {"relative_macs": limit} if index == 0 else {"latency_ms": limit, "latency_batch_size": 8}
            assert choose(ROWS, InferSettings(**given)).key == one.validation.key


def test_losses_of_accuracy_buy_the_cheapest_point() -> None:
    front = [one for one in front_of(ROWS) if one.validation.source != "backbone"]
    base = max(one.accuracy for one in ROWS if one.source == "backbone" and one.split == "validation")
    asked = [offer["loss"] for offer in data()["offers"][0]]
    whole = [one.validation.accuracy for one in front if one.validation.accuracy >= base]
    assert asked[len(front) - len(whole) :] == ["0", *[None] * (len(whole) - 1)][: len(whole)]
    for one, loss in zip(front, asked, strict=True):
        if loss is not None:
            kept = [other for other in front if 100 * (base - other.validation.accuracy) <= float(loss)]
            assert kept[0] is one


def test_rows_keep_their_own_times_of_several_backbones() -> None:
    faster = []
    for one in ROWS:
        relative = one.times[0].relative_time * (0.98 if one.seed else 1.02)
        faster.append(replace(one, point_id=f"f{one.point_id}", times=(RowTime(8, 2 * relative, relative),)))
    rows = [*ROWS, *faster]
    found = data(rows)
    assert found["costs"][1]["axis"] == "time of a batch of 8 over the plain backbone’s (2 to 4 ms)"
    assert data()["costs"][1]["axis"] == "time of a batch of 8 over the plain backbone’s (4 ms)"
    seen = set()
    for point in found["points"]:
        for split in ("validation", "test"):
            relative, (none, milliseconds) = point[split]["costs"][1], point[split]["milliseconds"]
            plain = 2 if point["id"].startswith("f") else 4
            assert (none, milliseconds) == (None, pytest.approx(plain * relative, rel=0.01))
            seen.add(plain)
    assert seen == {2, 4}
    for offer in found["offers"][1]:
        limit = float(offer["budget"].split()[2])
        chosen = choose(rows, InferSettings(latency_ms=limit, latency_batch_size=8))
        point = found["points"][offer["point"]]
        is_own = (chosen.point_id, chosen.search_id) == (point["id"], point["search"])
        is_own = is_own and round(chosen.accuracy, 5) == point["validation"]["accuracy"]
        assert ("measure it on the test split" in offer["commands"]) == is_own
    assert {len(offer["commands"]) for offer in found["offers"][1]} == {2, 3}


def test_every_group_has_its_points_and_colour() -> None:
    found = data(published=(PublishedPoint("old", 0.9, 0.4), PublishedPoint("old", 0.8, 0.2)))
    names = [one["name"] for one in found["series"]]
    assert names == ["search, jei_dnn", "search, probe", "gates, jei_dnn", "published: old"]
    assert [one["colour"] for one in found["series"]] == [0, 1, 0, -1]
    assert found["series"][-1]["line"] == [(0.2, 0.8), (0.4, 0.9)]
    both = {(number, seed) for number in (0, 1, 2) for seed in (0, 1)}
    assert {(point["series"], point["seed"]) for point in found["points"]} == both


def test_many_points_are_thinned_evenly() -> None:
    points = front_of(row(n / 1000, n / 1000, split) for n in range(1000) for split in ("validation", "test"))
    kept = spread(points, 100)
    assert len(kept) == 100
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert max(np.diff([one.validation.relative_macs for one in kept])) < 0.0115


@pytest.mark.parametrize("cost", COSTS)
def test_sliders_reach_what_is_best_at_each_step(cost: int | None) -> None:
    random = np.random.default_rng(0)
    rows = []
    for at, gain in zip(np.sort(random.random(900)), np.sort(random.random(900)), strict=True):
        one = row(float(at), float(0.5 + gain / 2), point_id=str(at))
        rows += [one, replace(one, split="test")]
    front = fronts_of(timed(rows), (cost,))[cost]
    kept = reachable(front, cost, 0.95)
    assert 100 < len(kept) < 400 < len(front)
    for budget in np.arange(0.3, 1, 0.005):
        within = [[p for p in of if relative_cost(p.validation, cost) <= budget] for of in (front, kept)]
        best = [max(of, key=accuracy, default=None) for of in within]
        assert best[0] is best[1]
    for drop in np.arange(0, 0.05, 0.001):
        first = [next(p for p in of if accuracy(p) >= 0.95 - drop) for of in (front, kept)]
        assert first[0] is first[1]


def accuracy(point: FrontPoint) -> float:
    return point.validation.accuracy


def test_certified_points_are_offered_with_their_search() -> None:
    asked = json.dumps({"risk": 0.03, "confidence": 0.95})
    certified = [row(0.9, 0.5, split, budget=asked, search_id="s1") for split in ("validation", "test")]
    fronts = fronts_of([*ROWS, *certified], (None,))
    groups = groups_of(ROWS, fronts, front_of(certified))
    given = {"describe": lambda one: one.source, "labels": {}, "study_dir": Path("runs/my study")}
    found = chart_data(groups, [*ROWS, *certified], fronts, {}, (), **given)
    (risk,) = found["risks"]
    assert found["points"][risk["point"]]["risk"] == 0.03
    assert list(risk["commands"].values()) == [
        "dynexit save 'runs/my study' 'my study-s1' --point s1",
        "dynexit predict 'my study-s1' IMAGE_OR_FOLDER --risk 0.03",
        "dynexit infer 'runs/my study' infer.risk=0.03",
    ]
    asked = json.dumps({"risk": 0.02, "confidence": 0.95})
    cheaper = [row(0.8, 0.4, split, budget=asked, search_id="s2") for split in ("validation", "test")]
    equal = [row(0.8, 0.3, split, budget=asked, search_id="s3") for split in ("validation", "test")]
    more = [*certified, *cheaper, *equal]
    every = [front_of(pair)[0] for pair in (certified, cheaper, equal)]
    found = chart_data(groups_of(ROWS, fronts, every), [*ROWS, *more], fronts, {}, (), **given)
    searches = {found["points"][one["point"]]["search"]: one for one in found["risks"]}
    runs = {search for search, one in searches.items() if any("dynexit infer" in c for c in one["commands"].values())}
    for risk, search in ((0.03, "s2"), (0.02, "s2")):
        assert choose([*ROWS, *more], InferSettings(risk=risk)).search_id == search
    assert runs == {"s2"}
    with pytest.raises(UserError, match=r"infer.risk = 0.01: no operating point is within it; the nearest has 0.02"):
        choose([*ROWS, *more], InferSettings(risk=0.01))
    with pytest.raises(UserError, match=r"no operating point has a certificate; set search\.risk"):
        choose(ROWS, InferSettings(risk=0.01))


def test_a_large_sweep_stays_below_three_megabytes() -> None:
    rows = []
    for n in range(3000):
        gates = row(0.1 + n / 3400, 0.5 + n / 8000, source="gates", point_id=str(n))
        rows += [gates, replace(gates, split="test")]
        more = {"point_id": str(n), "search_id": f"s{n}", "configuration": json.dumps([[0, n / 3000]] * 12)}
        one = row(0.1 + n / 3400, 0.6 + n / 12000, seed=n % 5, method=f"m{n % 7}", **more)
        rows += [one, replace(one, split="test")]
    assert len(json_script(data(timed(rows)))) < 2_000_000


def test_nothing_in_json_ends_its_script() -> None:
    sly = {"a": "</script><script>alert('&')<!--", "b": [1.5, None]}
    text = str(json_script(sly))
    assert not set("<>&") & set(text)
    assert json.loads(text) == sly


def test_rows_without_test_or_any_give_an_empty_figure() -> None:
    validation = [one for one in ROWS if one.split == "validation"]
    for rows, costs in ((validation, COSTS), ([], (None,))):
        found = data(rows, costs=costs)
        assert found["points"] == []
        assert all(offers == [] for offers in found["offers"])
