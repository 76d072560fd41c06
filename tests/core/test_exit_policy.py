"""The exit rules against their definitions, one sample at a time."""

import pytest
import torch

from dynexit.core.exit_policy import exit_index_from_gates, exit_probabilities
from tests.reference import jei_dnn_loops as loops

SHAPES = [(4, 300), (2, 7, 150), (3, 2, 1, 50)]


def random_gates(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Gates of every kind: small, large, and exactly 0, 0.25, 0.5 and 1."""
    source = torch.Generator().manual_seed(seed)
    gates = torch.rand(shape, dtype=torch.float64, generator=source) ** (1 + 3 * seed)
    special = torch.tensor([0, 0.25, 0.5, 1], dtype=torch.float64)
    pick = torch.randint(8, shape, generator=source)
    return torch.where(pick < 4, special[pick.clamp_max(3)], gates)


def by_sample(gates: torch.Tensor) -> list[list[float]]:
    return gates.movedim(-2, -1).reshape(-1, gates.shape[-2]).tolist()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_exit_probabilities_equal_loops_and_sum_to_at_most_one(shape: tuple[int, ...], seed: int) -> None:
    gates = random_gates(shape, seed)
    p = exit_probabilities(gates)
    assert p.shape == gates.shape
    assert p.min() >= 0
    assert p.sum(-2).max() <= 1 + 1e-12
    expected = torch.tensor([loops.exit_probabilities(sample) for sample in by_sample(gates)], dtype=torch.float64)
    torch.testing.assert_close(p.movedim(-2, -1).reshape(expected.shape), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_exit_index_equals_the_recursion(shape: tuple[int, ...], seed: int, single: bool) -> None:
    gates = random_gates(shape, seed)
    index = exit_index_from_gates(gates, single)
    assert index.dtype == torch.int64
    assert index.shape == shape[:-2] + shape[-1:]
    assert index.flatten().tolist() == [loops.exit_index(sample, single) for sample in by_sample(gates)]
    assert torch.equal(exit_index_from_gates(gates.float(), single), exit_index_from_gates(gates.float(), not single))


def test_exit_index_without_gates_is_the_last_exit() -> None:
    assert exit_index_from_gates(torch.zeros(2, 0, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]
