"""Features brought to mean 0 and deviation 1, or whitened, and the same folded into a linear layer.

Sums over the samples come first, division last, so that sums of several ranks can be added up between the two.
Shapes: N samples, B batch, D features, F standardised features (as many), M members, O outputs of a layer.
"""

import dataclasses

import torch
from torch import Tensor

WHITENING_EPSILON = 1e-3  # added to the variances of standardised features, so that noise is not blown up
_CONSTANT = 1e-5  # below this share of its mean, or of the largest deviation, a feature's deviation is rounding


@dataclasses.dataclass(frozen=True)
class Standardisation:
    """x -> (x - mean_D) times scales (D,) or a whitening matrix (D, F); float64. Constant features become 0."""

    mean_D: Tensor
    map_DF: Tensor
    is_constant_D: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Standardised features (..., F) from features (..., D), in their dtype."""
        centred, map_DF = x - self.mean_D.to(x.dtype), self.map_DF.to(x.dtype)
        return centred * map_DF if map_DF.dim() == 1 else centred @ map_DF

    def fold(self, weight_OF: Tensor, bias_O: Tensor) -> tuple[Tensor, Tensor]:
        """(weight, bias) of the linear layer on features that equals the given one on standardised features."""
        exact = weight_OF.to(torch.float64)
        weight_OD = exact * self.map_DF if self.map_DF.dim() == 1 else exact @ self.map_DF.T
        bias = bias_O.to(torch.float64) - weight_OD @ self.mean_D
        return weight_OD.to(weight_OF.dtype), bias.to(bias_O.dtype)


class Moments:
    """Sums of features, and of their squares or (to whiten) products, in float64."""

    def __init__(self, num_features: int, device: torch.device, *, whiten: bool) -> None:
        shape = (num_features, num_features) if whiten else (num_features,)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum_D = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=device)

    @property
    def sums(self) -> list[Tensor]:
        """What is to be summed over ranks, in place."""
        return [self.count, self.sum_D, self.squares]

    def add(self, x_BD: Tensor) -> None:
        """Counts a batch of features."""
        exact_BD = x_BD.to(torch.float64)
        self.count += len(exact_BD)
        self.sum_D += exact_BD.sum(0)
        self.squares += exact_BD.square().sum(0) if self.squares.dim() == 1 else exact_BD.T @ exact_BD

    def num_not_finite(self) -> int:
        """How many features have a sample that is not finite."""
        squares_D = self.squares if self.squares.dim() == 1 else self.squares.diagonal()
        return int((~(self.sum_D.isfinite() & squares_D.isfinite())).sum())

    def standardisation(self) -> Standardisation:
        """The standardisation by these moments; the variance is divided by the number of samples."""
        mean_D = self.sum_D / self.count
        whiten = self.squares.dim() == 2
        squares_D = self.squares.diagonal() if whiten else self.squares
        std_D = (squares_D / self.count - mean_D.square()).clamp_min(0).sqrt()
        constant_D = (std_D <= _CONSTANT * mean_D.abs()) | (std_D <= _CONSTANT * std_D.max())
        scale_D = torch.where(constant_D, 0.0, 1 / std_D)
        map_DF = scale_D
        if whiten:
            covariance_DD = self.squares / self.count - mean_D[:, None] * mean_D
            variance_F, basis_DF = torch.linalg.eigh(covariance_DD * scale_D[:, None] * scale_D)
            # the symmetric root: unlike the basis it does not depend on signs and on the order of equal variances
            root_FF = basis_DF / (variance_F.clamp_min(0) + WHITENING_EPSILON).sqrt() @ basis_DF.T
            map_DF = scale_D[:, None] * root_FF
        return Standardisation(mean_D, map_DF, constant_D)
