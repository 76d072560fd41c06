"""Stacked heads and gates against the same modules one by one."""

import pytest
import torch
from torch import Tensor, nn

from dynexit.errors import UserError
from dynexit.models.heads import HeadSpec, StackedGates, StackedHeads

DIMS, POSITIONS, TYPES, CLASSES, SEEDS = [6, 9, 6], [0, 2, 5], ["linear", "mlp3x7"], 5, [11, 3]
BATCH = 8


def features(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(BATCH, d, generator=generator, dtype=dtype) for d in DIMS]


def heads(seeds: list[int] = SEEDS, **options: str) -> StackedHeads:
    return StackedHeads(DIMS, POSITIONS, TYPES, CLASSES, seeds, **options).double()


def plain_head(state: dict[str, Tensor], name: str) -> nn.Sequential:
    """The head of that name as ordinary modules."""
    modules: list[nn.Module] = []
    layer = 0
    while f"{name}.{layer}.weight" in state:
        weight = state[f"{name}.{layer}.weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0]).double()
        linear.weight.data, linear.bias.data = weight, state[f"{name}.{layer}.bias"]
        modules += [nn.ReLU(), linear] if layer else [linear]
        layer += 1
    return nn.Sequential(*modules)


def test_logits_and_gradients_are_those_of_the_heads_one_by_one() -> None:
    stacked, x = heads(), features()
    logits = stacked(x)
    assert logits.shape == (2, 6, BATCH, CLASSES)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (logits * weights).sum().backward()
    gradients = stacked.by_name({name: block.grad for name, block in stacked.named_parameters()})
    for m in range(2):
        state = stacked.member_state(m)
        for row, (p, t) in enumerate((p, t) for p in range(3) for t in range(2)):
            name = f"heads.{POSITIONS[p]}.{TYPES[t]}"
            head = plain_head(state, name)
            expected = head(x[p])
            torch.testing.assert_close(logits[m, row], expected, rtol=1e-12, atol=1e-12)
            (expected * weights[m, row]).sum().backward()
            for i, linear in enumerate(module for module in head if isinstance(module, nn.Linear)):
                for kind in ("weight", "bias"):
                    found, wanted = (
                        gradients[f"{name.removeprefix('heads.')}.{i}.{kind}"][m],
                        linear.get_parameter(kind),
                    )
                    torch.testing.assert_close(found, wanted.grad, rtol=1e-12, atol=1e-12)


def test_names_and_shapes_of_a_members_state() -> None:
    shapes = {name: tuple(value.shape) for name, value in heads().member_state(1).items()}
    assert shapes["heads.2.linear.0.weight"] == (5, 9)
    assert shapes["heads.2.linear.0.bias"] == (5,)
    assert shapes["heads.5.mlp3x7.0.weight"] == (7, 6)
    assert shapes["heads.5.mlp3x7.1.weight"] == (7, 7)
    assert shapes["heads.5.mlp3x7.2.weight"] == (5, 7)
    assert len(shapes) == 3 * (2 + 6)


@pytest.mark.parametrize("initialisation", ["uniform", "truncated_normal"])
def test_a_members_initial_values_do_not_depend_on_the_others(initialisation: str) -> None:
    pack, alone = heads([4, 11, 7], initialisation=initialisation), heads([11], initialisation=initialisation)
    ours, theirs = pack.member_state(1), alone.member_state(0)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not torch.equal(ours["heads.0.linear.0.weight"], pack.member_state(0)["heads.0.linear.0.weight"])
    gates, gates_alone = StackedGates(3, [4, 11, 7]).member_state(1), StackedGates(3, [11]).member_state(0)
    assert all(torch.equal(gates[name], gates_alone[name]) for name in gates)


def test_initial_values_fill_nn_linears_range() -> None:
    stacked = StackedHeads([400, 400], [0, 1], ["linear"], 50, [0]).requires_grad_(False)
    named = stacked.by_name(stacked.blocks())
    for position in range(2):
        weight, bias = (named[f"{position}.linear.0.{name}"] for name in ("weight", "bias"))
        assert max(weight.abs().max(), bias.abs().max()) <= 1 / 20
        assert weight.std() == pytest.approx(0.05 / 3**0.5, rel=0.02)
        assert bias.std() == pytest.approx(0.05 / 3**0.5, rel=0.2)
        assert weight.mean().abs() < 0.001
    assert not torch.equal(named["0.linear.0.weight"], named["1.linear.0.weight"])


def test_truncated_normal_initial_values() -> None:
    stacked = StackedHeads([400], [0], ["mlp2x300"], 50, [0], initialisation="truncated_normal")
    named = stacked.by_name(stacked.blocks())
    for layer in range(2):
        assert named[f"0.mlp2x300.{layer}.weight"].std() == pytest.approx(0.02, rel=0.02)
        assert not named[f"0.mlp2x300.{layer}.bias"].any()
    with pytest.raises(UserError, match="unknown initialisation 'zeros': use one of uniform, truncated_normal"):
        StackedHeads([4], [0], ["linear"], 5, [0], initialisation="zeros")


def test_a_member_can_be_put_into_another_pack() -> None:
    pack, other = heads([1, 2, 3]), heads([8, 9])
    before = other.member_state(0)
    other.load_member(1, {**pack.member_state(2), "gates.weight": torch.zeros(1)})
    x = features()
    torch.testing.assert_close(other(x)[1], pack(x)[2])
    assert all(torch.equal(before[name], value) for name, value in other.member_state(0).items())
    state = pack.member_state(2)
    del state["heads.2.linear.0.bias"]
    with pytest.raises(ValueError, match=r"heads.2.linear.0.bias must be of shape \(5,\), but is missing"):
        other.load_member(0, state)
    state["heads.2.linear.0.bias"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"heads.2.linear.0.bias must be of shape \(5,\), but is of shape \(4,\)"):
        other.load_member(0, state)


def test_gates_are_affine_maps_of_their_four_inputs() -> None:
    gates = StackedGates(3, SEEDS).double()
    u = torch.randn(2, 3, BATCH, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = gates(u)
    assert out.shape == (2, 3, BATCH)
    for m in range(2):
        state = gates.member_state(m)
        for g in range(3):
            expected = u[m, g] @ state["gates.weight"][g] + state["gates.bias"][g]
            torch.testing.assert_close(out[m, g], expected)
            torch.testing.assert_close(gates.gate(g, u[:, g])[m], expected)
    values = torch.cat([StackedGates(9, range(50)).member_state(m)["gates.weight"].flatten() for m in range(50)])
    assert values.abs().max() <= 0.5
    assert values.std() == pytest.approx(0.5 / 3**0.5, rel=0.05)
    assert len(values.unique()) == len(values)


@pytest.mark.parametrize("head_type", ["mlp", "mlp0x5", "mlp3x0", "mlp3x", "mlpx5", "Linear", "mlp3x500 ", "mlp-1x5"])
def test_unknown_head_types(head_type: str) -> None:
    with pytest.raises(UserError, match=f"unknown head type '{head_type}': use 'linear', or 'mlp{{n}}x{{w}}'"):
        HeadSpec.parse(head_type)


def test_head_widths() -> None:
    assert HeadSpec.parse("linear").widths(8, 3) == [8, 3]
    assert HeadSpec.parse("mlp1x1000").widths(8, 3) == [8, 3]
    assert HeadSpec.parse("mlp3x500").widths(8, 3) == [8, 500, 500, 3]
