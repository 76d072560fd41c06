"""Quick products equal torch's own."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from dynexit.models.products import quick_linear


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("x", [draw(1, 300), draw(3, 300), draw(9, 300), draw(5, 8, 300), draw(9, 2, 300)[:, 1]])
@pytest.mark.parametrize("num_outputs", [1, 10, 1000])
def test_quick_products_equal_torch(x: Tensor, num_outputs: int) -> None:
    weight, bias = draw(num_outputs, 300), draw(num_outputs)
    for given in (weight, weight.T.contiguous().T):  # heads keep inputs first in memory
        torch.testing.assert_close(quick_linear(x, given, bias), linear(x, weight, bias), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(quick_linear(x, given, None), linear(x, weight), rtol=1e-4, atol=1e-4)
    exact = quick_linear(x.double(), weight.double(), bias.double())
    assert torch.equal(exact, linear(x.double(), weight.double(), bias.double()))
