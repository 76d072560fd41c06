"""Exit heads and gates, stacked over the members of a pack.

Every parameter carries the member axis in front, so one product serves all members. A member's initial values come from
its own seed, so they do not depend on who else is in the pack.

Shape letters: B batch, G gates, P positions, H head types, K classes, D features, M members. Heads are position-major.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dynexit.errors import UserError

INITIALISATIONS = ("uniform", "truncated_normal")


@dataclass(frozen=True)
class HeadSpec:
    """The architecture of an exit head: `num_layers` linear layers, ReLU between them, hidden layers `width` wide."""

    num_layers: int
    width: int

    @classmethod
    def parse(cls, head_type: str) -> "HeadSpec":
        """The architecture of `linear` or `mlp{n}x{w}`. `mlp1x{w}` is one linear layer. UserError for other names."""
        if head_type == "linear":
            return cls(1, 0)
        match = re.fullmatch(r"mlp([1-9]\d*)x([1-9]\d*)", head_type)
        if match is None:
            raise UserError(
                f"unknown head type {head_type!r}: use 'linear', or 'mlp{{n}}x{{w}}' for n linear layers with hidden "
                "layers w wide, such as 'mlp3x500'"
            )
        return cls(int(match[1]), int(match[2]))

    def widths(self, num_features: int, num_classes: int) -> list[int]:
        """The widths before the first layer, between layers and after the last."""
        return [num_features, *[self.width] * (self.num_layers - 1), num_classes]


class _StackedLinear(nn.Module):
    """M linear layers at once: `weight` (M, out, in), `bias` (M, out)."""

    def __init__(self, num_members: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_members, num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.empty(num_members, num_outputs))

    @torch.no_grad()
    def initialise(self, member: int, generator: torch.Generator, initialisation: str) -> None:
        """Draws one member's values: nn.Linear's default, or a truncated normal of 0.02 with zero bias (DyCE)."""
        if initialisation == "uniform":
            bound = 1 / math.sqrt(self.weight.shape[2])
            self.weight[member].uniform_(-bound, bound, generator=generator)
            self.bias[member].uniform_(-bound, bound, generator=generator)
        else:
            nn.init.trunc_normal_(self.weight[member], std=0.02, generator=generator)
            self.bias[member].zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(M, B, out) from x (B, in), the same for all members, or (M, B, in)."""
        num_members, num_outputs, num_inputs = self.weight.shape
        if x.dim() == 2:
            flat = torch.addmm(self.bias.reshape(-1), x, self.weight.reshape(-1, num_inputs).T)
            return flat.view(len(x), num_members, num_outputs).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], x, self.weight.transpose(1, 2))


class _Stacked(nn.Module):
    """Parameters that carry the member axis in front, taken out and put in one member at a time."""

    prefix: str

    def member_state(self, member: int) -> dict[str, Tensor]:
        """A copy of one member's parameters, by name, without the member axis."""
        return {self.prefix + name: p.detach()[member].clone() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_member(self, member: int, state: dict[str, Tensor]) -> None:
        """Puts `member_state`'s result back. Raises ValueError naming a parameter that is missing or of another shape.

        Names of other modules in `state` are passed over.
        """
        for name, parameter in self.named_parameters():
            value = state.get(self.prefix + name)
            if value is None or value.shape != parameter.shape[1:]:
                found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise ValueError(f"{self.prefix + name} must be of shape {tuple(parameter.shape[1:])}, but is {found}")
            parameter[member].copy_(value)


class StackedHeads(_Stacked):
    """One head of every type at every position, for every member.

    `seeds_M` are the members' seeds, `initialisation` is "uniform" (nn.Linear's default, JEI-DNN) or "truncated_normal"
    (standard deviation 0.02, DyCE). With a `shrinkage` above 0 heads are additive: what leaves a position is its own
    logits plus shrinkage times those of the position before (BoostedNet); gradients stop there.
    """

    prefix = "heads."

    def __init__(
        self,
        feature_dims_P: Sequence[int],
        positions: Sequence[int],
        head_types: Sequence[str],
        num_classes: int,
        seeds_M: Sequence[int],
        initialisation: str = "uniform",
        shrinkage: float = 0.0,
    ) -> None:
        super().__init__()
        if initialisation not in INITIALISATIONS:
            raise UserError(f"unknown initialisation {initialisation!r}: use one of {', '.join(INITIALISATIONS)}")
        self.num_members, self.num_classes, self.shrinkage = len(seeds_M), num_classes, shrinkage
        # heads of one kind may be given (M, B, D) instead, an input for every member
        self._reads_two = len({head_type == "linear" for head_type in head_types}) == 2
        self.row_names = [f"{position}.{head_type}" for position in positions for head_type in head_types]
        for row, name in enumerate(self.row_names):
            num_features = feature_dims_P[row // len(head_types)]
            widths = HeadSpec.parse(head_types[row % len(head_types)]).widths(num_features, num_classes)
            layers = nn.ModuleList(_StackedLinear(self.num_members, a, b) for a, b in itertools.pairwise(widths))
            position, head_type = name.split(".")
            if position not in self._modules:
                self.add_module(position, nn.ModuleDict())
            self.get_submodule(position)[head_type] = layers  # type: ignore[operator]
            for member, seed in enumerate(seeds_M):
                generator = _generator(seed, 0, row)
                for layer in layers:
                    layer.initialise(member, generator, initialisation)  # type: ignore[operator]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (M, P·H, B, K) from what the exits read, one (B, D_p) or (B, 2, D_p) a position (see MultiExit)."""
        num_types = len(self.row_names) // len(features)
        rows: list[Tensor] = []
        for row, name in enumerate(self.row_names):
            before = rows[row - num_types] if row >= num_types else None
            rows.append(self.head(name, features[row // num_types], before))
        return torch.stack(rows, dim=1)

    def head(self, row_name: str, x: Tensor, before: Tensor | None = None) -> Tensor:
        """Logits (M, B, K) of the one head `{position}.{head_type}`, from its position's feature, (B, D) or (B, 2, D).

        Of two features the linear head reads the first, MLP heads the second. `before` is what this gave for the same
        head type at the position before; only additive heads need it.
        """
        layers = list(self.get_submodule(row_name).children())
        if self._reads_two and x.dim() == 3:
            x = x[:, 0 if row_name.endswith(".linear") else 1]
        for layer in layers[:-1]:
            x = layer(x).relu()
        logits: Tensor = layers[-1](x)
        return logits if before is None or not self.shrinkage else logits + self.shrinkage * before.detach()

    def plain(self, row_name: str) -> "PlainHead":
        """One head of the first member, as it is now, without what additive heads add."""
        pairs = []
        for layer in self.get_submodule(row_name).children():
            weight, bias = (parameter.detach()[0] for parameter in layer.parameters())
            # inputs first in memory: products with one sample, which wait for the weights, take two thirds of the time
            pairs.append((weight.T.contiguous().T, bias.clone()))
        return PlainHead(tuple(pairs), row_name.endswith(".linear"))


@dataclass(frozen=True)
class PlainHead:
    """One exit head of one member as plain (weight, bias) pairs, ReLU between them."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    is_linear: bool

    def __call__(self, feature: Tensor) -> Tensor:
        """Logits (B, K) from what its exit reads, (B, D) or (B, 2, D)."""
        if feature.dim() == 3:  # what linear heads read, then what MLP heads read
            feature = feature[:, 0 if self.is_linear else 1]
        x = feature.to(self.layers[0][0].dtype)
        for weight, bias in self.layers[:-1]:
            x = linear(x, weight, bias).relu_()
        weight, bias = self.layers[-1]
        return linear(x, weight, bias)


class StackedGates(_Stacked):
    """One gate at every position for every member: an affine map of the four confidence measures of an exit's logits.

    Source: JEI-DNN, section 3; initial values as nn.Linear(4, 1).
    """

    prefix = "gates."

    def __init__(self, num_gates: int, seeds_M: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(seeds_M), num_gates, 4))
        self.bias = nn.Parameter(torch.empty(len(seeds_M), num_gates))
        with torch.no_grad():
            for member, seed in enumerate(seeds_M):
                for gate in range(num_gates):
                    generator = _generator(seed, 1, gate)
                    self.weight[member, gate].uniform_(-0.5, 0.5, generator=generator)
                    self.bias[member, gate].uniform_(-0.5, 0.5, generator=generator)

    def forward(self, u_MGB4: Tensor) -> Tensor:
        """Gate logits (M, G, B) from the gate features (M, G, B, 4)."""
        return (u_MGB4 @ self.weight[..., None]).squeeze(-1) + self.bias[..., None]

    def gate(self, p: int, u_MB4: Tensor) -> Tensor:
        """Logits (M, B) of the one gate number p."""
        return (u_MB4 @ self.weight[:, p, :, None]).squeeze(-1) + self.bias[:, p, None]


def _generator(seed: int, kind: int, row: int) -> torch.Generator:
    """The source of initial values of one row of one member; hashed, so that neighbouring seeds share nothing."""
    state = np.random.SeedSequence([seed, kind, row]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
