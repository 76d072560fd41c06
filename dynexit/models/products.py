"""Products with weights, by the library that is fastest at them on a CPU.

Shapes: M rows, D features, K outputs.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

_MANY_PRODUCTS = 1 << 20
"""From so many on oneDNN is at least as fast as MKL; it prepares a product for 10 µs, for a new M once 500 µs."""


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
