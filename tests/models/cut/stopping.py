"""The models of other people as a study builds them; one that trains stops once, when the file `stop` is there."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tests.models.cut.own import MODELS

STOP = Path("stop")
STEPS = 3


class Stopping(nn.Module):
    """A model that is interrupted in its third training step."""

    num_steps = 0

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        if self.training and STOP.exists():
            Stopping.num_steps += 1
            if Stopping.num_steps == STEPS:
                STOP.unlink()
                raise KeyboardInterrupt
        return self.model(x)


def build(family: str) -> nn.Module:
    return Stopping(MODELS[family]())
