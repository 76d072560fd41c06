"""Costs of exits against sums written out, and what ExitCosts refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dynexit.core.cost import STEM, ExitCosts
from dynexit.core.tradeoff import Configuration, configuration_macs_L

COSTS = ExitCosts(
    full_macs=1000,
    positions=(0, 2, 3),
    backbone_macs=(100, 400, 400),
    head_types=("linear", "mlp1x8"),
    head_macs=((1, 10), (2, 20), (3, 30)),
    gate_macs=(4, 5, 6),
)


def test_macs_sum_everything_passed() -> None:
    heads = ("linear", "mlp1x8", "linear")
    assert COSTS.macs_L(heads).tolist() == [100 + 5, 400 + 5 + 25, 400 + 5 + 25 + 9, 1000 + 5 + 25 + 9]
    assert COSTS.macs_L(heads, gates=False).tolist() == [101, 421, 424, 1024]
    assert COSTS.macs_L(heads).dtype == np.int64


def test_one_head_type_needs_no_name() -> None:
    one = replace(COSTS, head_types=("linear",), head_macs=((1,), (2,), (3,)))
    assert one.macs_L().tolist() == one.macs_L(["linear"] * 3).tolist() == [105, 412, 421, 1021]
    assert one.relative_cost_L().tolist() == [105 / 1021, 412 / 1021, 421 / 1021, 1]


def test_macs_beyond_32_bits() -> None:
    big = ExitCosts(2**40, (1,), (2**39,), ("linear",), ((2**35,),), (4,))
    assert big.macs_L().tolist() == [2**39 + 2**35 + 4, 2**40 + 2**35 + 4]


def test_no_positions_leave_only_the_backbone() -> None:
    bare = ExitCosts(7, (), (), ("linear",), (), ())
    assert bare.macs_L().tolist() == [7]
    assert bare.relative_cost_L().tolist() == [1]


def test_json_round_trip() -> None:
    for costs in (COSTS, replace(COSTS, reader_macs=(7, 0, 8), positions=(STEM, 0, 1))):
        assert ExitCosts.from_json(json.loads(json.dumps(costs.to_json()))) == costs
    assert "reader_macs" not in COSTS.to_json()


def test_readers_are_paid_up_to_the_last_enabled_exit() -> None:
    costs = replace(COSTS, reader_macs=(10, 20, 40))
    assert costs.path_macs(np.array([0, 3, 0])).tolist() == [110, 433, 473, 1073]
    assert costs.path_macs(np.array([0, 3, 0]), last=1).tolist() == [110, 433, 433, 1033]
    assert costs.path_macs(np.array([0, 0, 0]), last=-1).tolist() == [100, 400, 400, 1000]
    exits = ((-1, 1.0), (0, 0.5), (-1, 1.0))
    assert configuration_macs_L(Configuration(exits), costs).tolist() == [110, 432, 432, 1032]
    assert configuration_macs_L(Configuration(((-1, 1.0),) * 3), costs)[-1] == 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone_macs": [100, 400]}, "backbone_macs has 2 entries, but there are 3 positions"),
        ({"head_macs": [[1, 10], [2], [3, 30]]}, "head_macs has a row of 1 entries, but there are 2 head types"),
        ({"head_types": [], "head_macs": [[], [], []]}, "head types are distinct names, at least one, got []"),
        ({"head_types": ["a", "a"]}, "head types are distinct names, at least one, got ['a', 'a']"),
        ({"full_macs": 10**15 + 1}, f"positions and MACs are integers from 0 to 1e+15, got {10**15 + 1}"),
        ({"gate_macs": [4, -5, 6]}, "positions and MACs are integers from 0 to 1e+15, got -5"),
        ({"full_macs": 1e3}, "positions and MACs are integers from 0 to 1e+15, got 1000.0"),
        ({"full_macs": True}, "positions and MACs are integers from 0 to 1e+15, got True"),
        ({"positions": [0, 2, 2]}, "positions must increase, got [0, 2, 2]"),
        (
            {"backbone_macs": [100, 400, 399]},
            "MACs must not decrease with depth, got [100, 400, 399, 1000] (the last is the full backbone)",
        ),
        (
            {"full_macs": 300},
            "MACs must not decrease with depth, got [100, 400, 400, 300] (the last is the full backbone)",
        ),
    ],
)
def test_impossible_costs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ExitCosts.from_json(COSTS.to_json() | change)
    assert str(error.value) == message


def test_missing_and_unknown_keys_are_refused() -> None:
    data = COSTS.to_json()
    data["gates"] = data.pop("gate_macs")
    with pytest.raises(ValueError) as error:
        ExitCosts.from_json(data)
    assert str(error.value) == (
        "exit costs need the keys ['backbone_macs', 'full_macs', 'gate_macs', 'head_macs', 'head_types', 'positions'], "
        "got ['backbone_macs', 'full_macs', 'gates', 'head_macs', 'head_types', 'positions']"
    )


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (None, "there are 2 head types; say which one sits at each position"),
        (["linear"], "1 head types were given for 3 positions"),
        (["linear", "mlp", "linear"], "head type 'mlp' is unknown; it is one of linear, mlp1x8"),
    ],
)
def test_wrong_head_types_are_named(heads: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError) as error:
        COSTS.macs_L(heads)
    assert str(error.value) == message
