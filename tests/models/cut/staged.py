"""A module whose owner gives its stages, since torch cannot export it."""

import torch
from torch import Tensor, nn

import dynexit
from dynexit.models.cut.backbone import OwnBackbone
from tests.models.cut.own import Residual


class Checking(Residual):
    """Looks at the images' values, so that it cannot be exported."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise ValueError("the images hold NaN")
        return super().forward(x)


class Head(nn.Module):
    def __init__(self, model: Checking) -> None:
        super().__init__()
        self.dropout, self.head = model.dropout, model.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(x.mean((2, 3))))


def staged(in_channels: int, num_classes: int) -> OwnBackbone:
    model = Checking(in_channels, num_classes).eval()
    example = torch.zeros(1, in_channels, 24, 24)
    return dynexit.cut(model, example, stages=[model.stem, *model.blocks], tail=Head(model))
