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


def test_exported_products_take_batches_of_any_size() -> None:
    weight, bias = draw(1000, 300), draw(1000)

    class Head(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return quick_linear(x, weight, bias)

    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(Head(), (draw(9, 300),), dynamic_shapes={"x": {0: batch}}).module()
    for size in (1, 40):
        torch.testing.assert_close(program(draw(size, 300)), linear(draw(size, 300), weight, bias))
