"""Multinomial logistic regression by L-BFGS, on features that come in chunks and may lie on several ranks.

Shapes: N samples of all ranks, B samples of a chunk, D features, K classes.
"""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

GRADIENT_TOLERANCE = 1e-5  # norm of the gradient of the mean loss at which a fit counts as converged

Chunks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Yields this rank's features (B, D) and labels (B,), the same at every call."""


@dataclasses.dataclass(frozen=True)
class Regression:
    """The iterate with the lowest objective: float64 weights and what the solver says of it."""

    weight_KD: Tensor
    bias_K: Tensor
    objective: float
    gradient_norm: float
    num_iterations: int

    @property
    def converged(self) -> bool:
        return self.gradient_norm <= GRADIENT_TOLERANCE


def fit_regression(
    chunks: Chunks,
    num_samples: int,
    start: tuple[Tensor, Tensor],
    l2: float,
    max_iterations: int,
    all_reduce: Callable[[Iterable[Tensor]], None],
) -> Regression:
    """Minimises mean cross-entropy + l2 · |weight|² from `start` (weight (K, D), bias (K,)); the bias is free.

    `num_samples` counts those of all ranks, `all_reduce` sums tensors over ranks in place. Every rank gets the same
    answer. The objective is strictly convex in the weights, so converged answers do not depend on `start`.
    """
    parameters = torch.cat((start[0], start[1][:, None]), 1).to(torch.float64).clone()
    best = Regression(start[0], start[1], float("inf"), float("inf"), 0)
    solver = torch.optim.LBFGS(
        [parameters],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=GRADIENT_TOLERANCE / parameters.numel() ** 0.5,
        tolerance_change=1e-12,
    )

    def evaluate() -> Tensor:
        nonlocal best
        weight_KD, bias_K = parameters[:, :-1], parameters[:, -1]
        sums = _sums(chunks(), weight_KD, bias_K)
        all_reduce(sums)
        loss = sums[0] / num_samples + l2 * weight_KD.square().sum()
        gradient = sums[1] / num_samples
        gradient[:, :-1] += 2 * l2 * weight_KD
        parameters.grad = gradient
        if float(loss) < best.objective:
            best = Regression(weight_KD.clone(), bias_K.clone(), float(loss), float(gradient.norm()), 0)
        return loss

    solver.step(evaluate)  # type: ignore[no-untyped-call]
    return dataclasses.replace(best, num_iterations=solver.state[parameters]["n_iter"])


def _sums(chunks: Iterable[tuple[Tensor, Tensor]], weight_KD: Tensor, bias_K: Tensor) -> list[Tensor]:
    """The sums of the cross-entropy and of its gradient (K, D + 1), in float64; products in the features' dtype."""
    loss, gradient = weight_KD.new_zeros(()), weight_KD.new_zeros(len(weight_KD), weight_KD.shape[1] + 1)
    for x_BD, labels_B in chunks:
        logits_BK = x_BD @ weight_KD.T.to(x_BD.dtype) + bias_K.to(x_BD.dtype)
        log_p_BK = logits_BK.log_softmax(1)
        loss -= log_p_BK.gather(1, labels_B[:, None]).sum(dtype=torch.float64)
        error_BK = log_p_BK.exp()
        error_BK[torch.arange(len(labels_B), device=labels_B.device), labels_B] -= 1
        gradient[:, :-1] += error_BK.T @ x_BD
        gradient[:, -1] += error_BK.sum(0, dtype=torch.float64)
    return [loss, gradient]
