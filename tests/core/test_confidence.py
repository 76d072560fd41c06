"""Confidence statistics against plain loops, at extremes, and what flows back."""

import math
import subprocess
import sys

import pytest
import torch

from dynexit.core.confidence import CONFIDENCES, entropy, gate_features, margin, max_probability, power_entropy
from tests.reference import jei_dnn_loops as loops


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 3, 4, 5)])
def test_statistics_equal_loops(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    logits = 4 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))
    rows = logits.reshape(-1, shape[-1]).tolist()
    expected = torch.tensor([loops.features(row) for row in rows], dtype=dtype).reshape(*shape[:-1], 4)
    features = gate_features(logits)
    assert features.dtype == dtype
    torch.testing.assert_close(features, expected, rtol=0, atol=tolerance)
    for place, function in enumerate((max_probability, entropy, margin, power_entropy)):
        torch.testing.assert_close(function(logits), features[..., place], rtol=0, atol=tolerance)


def test_confidences_lie_in_unit_interval_at_extremes() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [1e4, 0.0, 0.0], [3.0, 3.0, -1e4], [-1e30, 0.0, 1e30]])
    for name, kind in CONFIDENCES.items():
        confidence = kind.function(logits)
        lowest, highest = kind.range
        assert confidence.shape == (logits.shape if kind.reads == "gates" else logits.shape[:-1]), name
        assert confidence.min() >= lowest, name
        assert confidence.max() <= highest, name
    assert gate_features(logits).isfinite().all()
    assert margin(logits).tolist() == gate_features(logits)[:, 2].tolist() == [0, 1, 0, 1]
    assert CONFIDENCES["entropy"].function(logits)[:2].tolist() == pytest.approx([0, 1], abs=1e-6)
    assert entropy(logits)[0].item() == pytest.approx(math.log(3))


def test_gradients_of_confidences() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for function in (*(kind.function for kind in CONFIDENCES.values()), power_entropy):
        assert torch.autograd.gradcheck(function, (logits,))


def test_gate_features_stop_the_gradient() -> None:
    assert not gate_features(torch.randn(2, 3, requires_grad=True)).requires_grad


@pytest.mark.parametrize("shape", [(), (4, 1), (4, 0)])
def test_one_class_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as error:
        gate_features(torch.zeros(shape))
    assert str(error.value) == f"logits need at least 2 classes on their last axis, got shape {shape}"


def test_reading_the_tables_imports_no_torch() -> None:
    modules = "dynexit.core.confidence, dynexit.study.schema"
    code = f"import sys, {modules}; print({{'torch', 'numpy', 'numba'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
