"""Logistic regression against scikit-learn's, in any number of chunks and ranks, and what stops early."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dynexit.core.regression import Regression, fit_regression

NUM_SAMPLES, NUM_FEATURES, NUM_CLASSES = 300, 7, 4


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_SAMPLES, NUM_FEATURES, generator=generator, dtype=torch.float64)
    scores = x @ torch.randn(NUM_FEATURES, NUM_CLASSES, generator=generator, dtype=torch.float64)
    noise = torch.randn(scores.shape, generator=generator, dtype=torch.float64)
    return x, (scores + 2 * noise).argmax(1)


def fitted(l2: float, max_iterations: int, *, chunk: int = 300, dtype: torch.dtype = torch.float64) -> Regression:
    x, labels = samples()
    zero = torch.zeros(NUM_CLASSES, NUM_FEATURES), torch.zeros(NUM_CLASSES)
    chunks = [(x[i : i + chunk].to(dtype), labels[i : i + chunk]) for i in range(0, NUM_SAMPLES, chunk)]
    return fit_regression(lambda: chunks, NUM_SAMPLES, zero, l2, max_iterations, lambda tensors: None)


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_optimum_is_that_of_scikit_learn(l2: float) -> None:
    x, labels = samples()
    ours = fitted(l2, 500)
    theirs = LogisticRegression(C=1 / (2 * NUM_SAMPLES * l2), tol=1e-10, max_iter=5000).fit(x.numpy(), labels.numpy())
    assert ours.converged
    np.testing.assert_allclose(ours.weight_KD, theirs.coef_, atol=2e-3)
    # scikit-learn's biases sum to 0 as ours do when the fit starts from 0
    np.testing.assert_allclose(ours.bias_K, theirs.intercept_, atol=2e-3)
    logits = x.numpy() @ theirs.coef_.T + theirs.intercept_
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(NUM_SAMPLES), labels.numpy()]
    assert ours.objective == pytest.approx(losses.mean() + l2 * (theirs.coef_**2).sum(), abs=1e-8)


def test_chunks_and_single_precision_change_nothing_that_matters() -> None:
    whole = fitted(1e-3, 500)
    assert (fitted(1e-3, 500, chunk=37).weight_KD - whole.weight_KD).abs().max() < 1e-9
    assert (fitted(1e-3, 500, dtype=torch.float32).weight_KD - whole.weight_KD).abs().max() < 1e-3


def test_what_stops_early_says_so_and_keeps_its_best_iterate() -> None:
    early, late = fitted(1e-3, 3), fitted(1e-3, 500)
    assert (early.converged, late.converged) == (False, True)
    assert early.num_iterations == 3 < late.num_iterations
    assert early.gradient_norm > 1e-3 > late.gradient_norm
    x, labels = samples()
    logits = x @ early.weight_KD.T + early.bias_K
    value = torch.nn.functional.cross_entropy(logits, labels) + 1e-3 * early.weight_KD.square().sum()
    assert early.objective == pytest.approx(value.item(), rel=1e-12)
    assert late.objective < early.objective < np.log(NUM_CLASSES)
