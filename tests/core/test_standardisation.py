"""Standardised and whitened features against their definition, and folding against applying."""

import numpy as np
import pytest
import torch

from dynexit.core.standardisation import WHITENING_EPSILON, Moments, Standardisation


def features(num_samples: int = 400) -> torch.Tensor:
    """Correlated features of means and scales far apart, one of them constant."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_samples, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    x = x * torch.tensor([1, 1e-3, 20, 1, 1, 1]) + torch.tensor([0, 0.5, -300, 1, 2, 3.0])
    x[:, 4] = 0.7
    return x


def standardisation(x: torch.Tensor, *, whiten: bool, parts: int = 1) -> Standardisation:
    """From the sums of so many parts of the samples, added up as ranks do it."""
    moments = [Moments(x.shape[1], x.device, whiten=whiten) for _ in range(parts)]
    for part, chunk in zip(moments, x.chunk(parts), strict=True):
        part.add(chunk)
    for part in moments[1:]:
        for total, own in zip(moments[0].sums, part.sums, strict=True):
            total += own
    return moments[0].standardisation()


@pytest.mark.parametrize("parts", [1, 3])
def test_features_have_mean_0_and_deviation_1(parts: int) -> None:
    x = features()
    own = standardisation(x, whiten=False, parts=parts)
    z = own(x.double()).numpy()
    expected = (x.double().numpy() - x.double().numpy().mean(0)) / np.where(
        np.arange(6) == 4, np.inf, x.double().numpy().std(0)
    )
    np.testing.assert_allclose(z, expected, atol=1e-9)
    assert own.is_constant_D.tolist() == [False, False, False, False, True, False]


def test_whitened_features_have_covariance_w_over_w_plus_epsilon() -> None:
    x = features()
    z = standardisation(x, whiten=True)(x.double())
    assert z.mean(0).abs().max() < 1e-9
    covariance = z.T @ z / len(z)
    kept = np.delete(x.double().numpy(), 4, axis=1)
    variances = np.linalg.eigvalsh(np.corrcoef(kept.T))
    expected = np.sort(np.append(variances / (variances + WHITENING_EPSILON), 0.0))
    np.testing.assert_allclose(np.linalg.eigvalsh(covariance), expected, atol=1e-9)
    standardised = standardisation(x, whiten=False)(x.double())
    similarity = (z * standardised).mean(0)  # what is left of each feature: whitening turns none into another
    assert (np.delete(similarity.numpy(), 4) > 0.1).all()


@pytest.mark.parametrize("whiten", [False, True])
def test_a_folded_layer_gives_the_same_on_features_as_they_are(whiten: bool) -> None:
    x = features().double()
    own = standardisation(x, whiten=whiten)
    weight, bias = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    folded_weight, folded_bias = own.fold(weight, bias)
    torch.testing.assert_close(x @ folded_weight.T + folded_bias, own(x) @ weight.T + bias)
    assert (folded_weight[:, 4] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("whiten", [False, True])
def test_features_that_are_not_finite_are_counted(bad: float, whiten: bool) -> None:
    x = features()
    x[7, 1] = bad
    moments = Moments(6, x.device, whiten=whiten)
    moments.add(x)
    assert moments.num_not_finite() == 1
