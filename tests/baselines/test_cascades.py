"""Cascades of whole networks: their costs and answers, their exact search, and records of other samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynexit.baselines.cascades import Network, cascade_problem, check_same_samples, find_cascades
from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import Configuration
from dynexit.errors import UserError
from dynexit.jobs.search_records import CascadeFiles, search_records
from dynexit.record.shards import Record
from dynexit.search.driver import SearchRequest
from dynexit.search.operating_points import read_csv
from tests.reference.exit_problems import random_problem
from tests.search.recorded import write_json, write_shards

MACS = (7, 20, 60)


def networks(num_samples: int = 300, seed: int = 0) -> list[Network]:
    problem = random_problem(np.random.default_rng(seed), num_samples, 3, 1)
    return [Network(problem.correct_PHN[k, 0], problem.confidence_PHN[k, 0], macs) for k, macs in enumerate(MACS)]


def run_in_turn(chain: list[Network], exits: list[tuple[int, float]]) -> tuple[list[int], list[bool], list[int]]:
    """Of each sample the network that answers, whether it is right, and the MACs of all that ran."""
    found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for sample in range(len(chain[0].correct_N)):
        answers, macs = len(chain) - 1, 0
        for k, (head, threshold) in enumerate(exits):
            if head >= 0:
                macs += chain[k].macs
                if chain[k].confidence_N[sample] > np.float32(threshold):
                    answers = k
                    break
        else:
            macs += chain[-1].macs
        values = answers, bool(chain[answers].correct_N[sample]), macs
        for of_all, value in zip(found, values, strict=True):
            of_all.append(value)
    return found


@pytest.mark.parametrize("exits", [[(0, 0.5), (0, 0.75)], [(-1, 1.0), (0, 0.5)], [(0, 0.25), (-1, 1.0)]])
def test_a_sample_pays_for_every_network_that_ran(exits: list[tuple[int, float]]) -> None:
    chain = networks()
    point = cascade_problem(chain).evaluate(Configuration(tuple(exits)))
    answered, right, macs = run_in_turn(chain, exits)
    assert point.accuracy == np.mean(right)
    assert point.macs == np.mean(macs)
    assert point.relative_macs == pytest.approx(np.mean(macs) / MACS[-1])
    assert point.exit_fractions == tuple(np.bincount(answered, minlength=3) / len(answered))


@pytest.mark.parametrize("budget", [0.5, 0.7, 0.9])
def test_no_threshold_of_two_networks_is_better_in_budget(budget: float) -> None:
    chain = networks()[1:]
    problem = cascade_problem(chain)
    thresholds = [-1.0, *map(float, chain[0].confidence_N)]
    every = [problem.evaluate(Configuration(((0, t),))) for t in thresholds]
    best = max(point.accuracy for point in every if point.relative_macs <= budget)
    found = [problem.evaluate(one) for one in find_cascades(problem, [0.5, 0.9], [budget])]
    assert max(point.accuracy for point in found if point.relative_macs <= budget) >= best


def folder_of(path: Path, network: Network, **changes: Any) -> Path:
    """A folder as record leaves it, both splits with the same outputs of one network."""
    problem = random_problem(np.random.default_rng(3), len(network.correct_N), 1, 1)
    costs = {**problem.costs.to_json(), "backbone_macs": [1], "full_macs": network.macs}
    object.__setattr__(problem, "base_correct_N", network.correct_N)
    for split in ("validation", "test"):
        write_shards(path / split, problem, **changes)
    write_json(path / "costs.json", costs)
    return path


def test_search_records_runs_networks_in_the_order_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = networks()
    folders = [folder_of(tmp_path / str(k), network) for k, network in enumerate(chain)]
    records = [Record.open(folder / "validation") for folder in folders]
    recorded = [Network.of(record, -1, macs) for record, macs in zip(records, MACS, strict=True)]
    request = SearchRequest(accuracy_weights=[0.0, 0.5, 1.0])
    entries = search_records(CascadeFiles(folders), request, tmp_path / "out")
    for entry in entries:
        _, right, macs = run_in_turn(recorded, [(head, t) for head, t in entry["exits"]])
        assert entry["train"]["accuracy"] == np.mean(right)
        assert entry["val"]["relative_macs"] == pytest.approx(np.mean(macs) / MACS[-1])
    assert entries[0]["train"]["relative_macs"] == pytest.approx(MACS[0] / MACS[-1])
    rows = read_csv(tmp_path / "out" / "operating_points.csv")
    assert {row.source for row in rows} == {"backbone", "cascade"}
    assert json.loads((tmp_path / "out" / "configurations.json").read_text()) == entries
    assert "accuracy weight 0.5" in capsys.readouterr().out


def test_records_of_other_samples_are_refused(tmp_path: Path) -> None:
    first, second = networks()[:2]
    ask = "; record both models on the same data, with the same split and data.seed"
    mine = folder_of(tmp_path / "mine", first)
    fewer = folder_of(tmp_path / "fewer", networks(200)[1])
    other = folder_of(tmp_path / "other", second, s5=6)
    for folder, why in ((fewer, "they have 300 and 200 samples"), (other, "the label of sample 5 is 5 and 6")):
        with pytest.raises(UserError) as caught:
            CascadeFiles([mine, folder]).read()
        assert str(caught.value) == f"{mine} and {folder} are not records of the same samples: {why}{ask}"
    check_same_samples({name: Record.open(mine / name) for name in ("validation", "test")})


def test_what_is_no_cascade_is_refused(tmp_path: Path) -> None:
    mine = folder_of(tmp_path / "mine", networks()[0])
    for folders in ([mine], [mine, mine]):
        given = ", ".join(map(str, folders))
        with pytest.raises(UserError) as caught:
            CascadeFiles(folders).read()
        why = "should be two or more different folders, the first network in front"
        assert str(caught.value) == f"--cascade {given}: {why}"
    for folder in (mine / "test", tmp_path / "nothing"):
        with pytest.raises(UserError) as caught:
            CascadeFiles([mine, folder]).read()
        holds = "it should hold costs.json, validation and test, as record/ID of a study"
        assert str(caught.value) == f"{folder} is no folder of records: {holds}"


def test_costs_of_a_cascade_are_those_of_exits() -> None:
    assert cascade_problem(networks()).costs == ExitCosts(60, (0, 1), (0, 0), ("network",), ((7,), (20,)), (0, 0))
