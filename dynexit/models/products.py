"""Products with weights, by the library that is fastest at them on a CPU.

Shapes: B batch, D features, K outputs.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

if TYPE_CHECKING:
    from dynexit.core.bounds import ProbabilityLimit

_MANY_PRODUCTS = 1 << 20
"""From so many on oneDNN is at least as fast as MKL; it prepares a product for 10 µs, for a new size once 500 µs."""

_MANY_WEIGHTS = 1 << 15
"""Fewer are read in a µs or two, and asking for certainty first costs samples that leave as much."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


def quick_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns torch.nn.functional.linear of x (..., D), weight (K, D) and bias (K,), without gradients.

    Large products in float32 on a CPU go to oneDNN instead of MKL, which takes twice as long on AMD's CPUs. The product
    of one row waits for the weights, whichever library computes it.
    """
    if torch.compiler.is_compiling():  # or exporting, for batches of any size
        return linear(x, weight, bias)
    num_rows = x.numel() // x.shape[-1]
    is_large = num_rows > 1 and num_rows * weight.numel() >= _MANY_PRODUCTS
    if is_large and _HAS_ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu":
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return linear(x, weight, bias)


@dataclass(frozen=True)
class PlainHead:
    """One exit head of one member as plain (weight, bias) pairs, ReLU between them."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    is_linear: bool

    def __call__(self, feature: Tensor) -> Tensor:
        """Logits (B, K) from what its exit reads, (B, D) or (B, 2, D)."""
        return self.last_layer(self.hidden(feature))

    def last_layer(self, x: Tensor) -> Tensor:
        """Logits (B, K) from what the last layer reads."""
        weight, bias = self.layers[-1]
        return quick_linear(x, weight, bias)

    def stays_below(self, limit: float, x: Tensor) -> bool:
        """Whether no probability of one sample reaches the limit for certain, from what its last layer reads (1, D).

        It takes a fraction of the time of the logits, on a CPU in float32 with many weights. Else nothing is certain.
        """
        return self._limit is not None and self._limit.is_above_all(limit, x.numpy()[0])

    @functools.cached_property
    def _limit(self) -> "ProbabilityLimit | None":
        from dynexit.core.bounds import ProbabilityLimit  # imports numba, which takes half a second

        weight, bias = self.layers[-1]
        if weight.device.type != "cpu" or weight.dtype != torch.float32 or weight.numel() < _MANY_WEIGHTS:
            return None
        if not weight.isfinite().all():
            return None
        return ProbabilityLimit(weight.numpy(), bias.numpy())

    def hidden(self, feature: Tensor) -> Tensor:
        """What the last layer reads, from what the exit reads, (B, D) or (B, 2, D)."""
        if feature.dim() == 3:  # what linear heads read, then what MLP heads read
            feature = feature[:, 0 if self.is_linear else 1]
        x = feature.to(self.layers[0][0].dtype)
        for weight, bias in self.layers[:-1]:
            x = quick_linear(x, weight, bias).relu_()
        return x
