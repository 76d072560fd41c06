"""Exit heads and gates, stacked over the members of a pack.

Every parameter carries the member axis in front, so one product serves all members. A member's initial values come from
its own seed, so they do not depend on who else is in the pack.

Shape letters: B batch, G gates, P positions, H head types, K classes, D features, M members. Heads are position-major.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dynexit.errors import UserError
from dynexit.models.products import PlainHead

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


class Stacked(nn.Module):
    """Parameters with a member axis, taken out and put in one member at a time.

    A training works on blocks (R, M, ...): R rows of one shape, so that one kernel serves them all. A single parameter,
    by its name, is (M, ...).
    """

    prefix: str

    def blocks(self) -> dict[str, Tensor]:
        """The parameters as blocks (R, M, ...), sharing their memory."""
        raise NotImplementedError

    def by_name(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views (M, ...) into blocks such as `blocks` gives, or others of as many rows, by the parameters' names."""
        raise NotImplementedError

    def member_state(self, member: int) -> dict[str, Tensor]:
        """A copy of one member's parameters, by name, without the member axis."""
        return {self.prefix + name: value[member].clone() for name, value in self.by_name(self.blocks()).items()}

    def load_member(self, member: int, state: dict[str, Tensor]) -> None:
        """Puts `member_state`'s result back. Raises ValueError naming a parameter that is missing or of another shape.

        Names of other modules in `state` are passed over.
        """
        for name, parameter in self.by_name(self.blocks()).items():
            value = state.get(self.prefix + name)
            if value is None or value.shape != parameter.shape[1:]:
                found = "missing" if value is None else f"of shape {tuple(value.shape)}"
                raise ValueError(f"{self.prefix + name} must be of shape {tuple(parameter.shape[1:])}, but is {found}")
            parameter[member].copy_(value)


class _HeadsOfAType(nn.Module):
    """All heads of one type. Rows are positions, those that read equally many features next to each other.

    The first layer has a weight (R, M, out, in) for each number of features; every other layer has one weight for all
    rows, and every layer one bias (R, M, out). `order` holds the position number of each row.
    """

    def __init__(self, num_members: int, feature_dims_P: Sequence[int], spec: HeadSpec, num_classes: int) -> None:
        super().__init__()
        self.widths = list(dict.fromkeys(feature_dims_P))
        self.rows_of = [[p for p, width in enumerate(feature_dims_P) if width == one] for one in self.widths]
        self.order = list(itertools.chain(*self.rows_of))
        self.num_layers, num_rows = spec.num_layers, len(self.order)
        for width, rows in zip(self.widths, self.rows_of, strict=True):
            shape = (len(rows), num_members, spec.widths(width, num_classes)[1], width)
            self.register_parameter(f"weight0_{width}", nn.Parameter(torch.empty(shape)))
        for layer, (num_inputs, num_outputs) in enumerate(itertools.pairwise(spec.widths(0, num_classes))):
            if layer:
                weight = torch.empty(num_rows, num_members, num_outputs, num_inputs)
                self.register_parameter(f"weight{layer}", nn.Parameter(weight))
            self.register_parameter(f"bias{layer}", nn.Parameter(torch.empty(num_rows, num_members, num_outputs)))

    def layers_at(self, p: int, blocks: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Weights (M, out, in) and biases (M, out) of the head at position number p, as views into `blocks`."""
        row = self.order.index(p)
        width, place = next((w, rows.index(p)) for w, rows in zip(self.widths, self.rows_of, strict=True) if p in rows)
        weights = [blocks[f"weight0_{width}"][place], *(blocks[f"weight{i}"][row] for i in range(1, self.num_layers))]
        return [(weight, blocks[f"bias{i}"][row]) for i, weight in enumerate(weights)]

    def _stacked(self, features_P: Sequence[Tensor]) -> list[Tensor]:
        """Features (R, ..., D) for each width, copied in one kernel; they are constants."""
        stacks = [features_P[rows[0]].new_empty(len(rows), *features_P[rows[0]].shape) for rows in self.rows_of]
        places = list(itertools.chain(*(stack.unbind() for stack in stacks)))
        torch._foreach_copy_(places, [features_P[p] for p in self.order])
        return stacks

    def logits(self, features_P: Sequence[Tensor], blocks: Mapping[str, Tensor]) -> list[Tensor]:
        """Logits (R, M, K, B), in parts along the rows, from features (B, D_p), or (M, B, D_p) of each member's own.

        The batch comes last: so the gradient of a weight has the weight's layout, and layers follow without a copy.
        """
        parts, biases = [], [blocks["bias0"]]
        if len(self.widths) > 1:
            biases = list(torch.split(blocks["bias0"], [len(rows) for rows in self.rows_of]))
        for width, x, bias in zip(self.widths, self._stacked(features_P), biases, strict=True):
            weight = blocks[f"weight0_{width}"]
            alike = x.dim() == 3  # one product for all members, as they read the same
            last = 1 if alike else 0
            flat = torch.baddbmm(
                bias.flatten(last, 2)[..., None] if alike else bias.flatten(0, 1)[..., None],
                weight.flatten(1, 2) if alike else weight.flatten(0, 1),
                x.transpose(1, 2) if alike else x.flatten(0, 1).transpose(1, 2),
            )
            parts.append(flat.view(*weight.shape[:3], flat.shape[-1]))
        for layer in range(1, self.num_layers):
            x = (parts[0] if len(parts) == 1 else torch.cat(parts)).relu()
            weight, bias = blocks[f"weight{layer}"], blocks[f"bias{layer}"]
            flat = torch.baddbmm(bias.flatten(0, 1)[..., None], weight.flatten(0, 1), x.flatten(0, 1))
            parts = [flat.view(*weight.shape[:3], flat.shape[-1])]
        return parts


class StackedHeads(Stacked):
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
        self.positions, self.head_types = tuple(positions), tuple(head_types)
        self.row_names = [f"{position}.{head_type}" for position in positions for head_type in head_types]
        self.types = nn.ModuleDict(
            {t: _HeadsOfAType(self.num_members, feature_dims_P, HeadSpec.parse(t), num_classes) for t in head_types}
        )
        blocks = self.blocks()
        for row, name in enumerate(self.row_names):
            layers = self._layers(name, blocks)
            for member, seed in enumerate(seeds_M):
                generator = _generator(seed, 0, row)
                for weight, bias in layers:
                    _initialise(weight[member], bias[member], generator, initialisation)

    def blocks(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def by_name(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in self.row_names:
            for i, (weight, bias) in enumerate(self._layers(name, blocks)):
                found |= {f"{name}.{i}.weight": weight, f"{name}.{i}.bias": bias}
        return found

    def exits_of(self, block: str) -> list[int]:
        """The number of the position of each row of a block."""
        _, head_type, name = block.split(".")
        own = self._type(head_type)
        return own.rows_of[own.widths.index(int(name[8:]))] if name.startswith("weight0_") else own.order

    def forward(
        self, features: Sequence[Tensor], final_BK: Tensor | None = None, blocks: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits (M, P·H, B, K) from what the exits read, one (B, D_p) or (B, 2, D_p) a position (see MultiExit).

        With `final_BK`, the backbone's own logits, they follow as a last row, the same for all members. `blocks` take
        the place of the parameters. A view: of all axes the batch is the innermost in memory.
        """
        blocks = dict(self.named_parameters()) if blocks is None else blocks
        parts_T = []
        for head_type in self.head_types:
            own = {name.split(".")[2]: value for name, value in blocks.items() if name.split(".")[1] == head_type}
            which = 0 if head_type == "linear" else 1
            read = [x[:, which] if self._reads_two and x.dim() == 3 else x for x in features]
            parts_T.append(self._type(head_type).logits(read, own))
        rows = parts_T[0]
        order = self._type(self.head_types[0]).order  # the same for all types
        in_order = order == sorted(order)
        if len(parts_T) > 1 or not in_order or self.shrinkage:
            whole_T = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in parts_T]
            if not in_order:
                places = [order.index(p) for p in range(len(order))]
                whole_T = [torch.stack([whole[place] for place in places]) for whole in whole_T]
            rows = [whole_T[0] if len(whole_T) == 1 else torch.stack(whole_T, 1).flatten(0, 1)]
        if self.shrinkage:
            rows = [self._added_up(rows[0])]
        if final_BK is not None:
            rows = [*rows, final_BK.T.expand(1, rows[0].shape[1], *final_BK.T.shape)]
        logits_RMKB = rows[0] if len(rows) == 1 else torch.cat(rows)
        return logits_RMKB.permute(1, 0, 3, 2)

    def _added_up(self, own_RMKB: Tensor) -> Tensor:
        """Additive heads' logits from what each head gives."""
        with torch.no_grad():
            steps = list(torch.split(own_RMKB, len(self.head_types)))
            for p in range(1, len(steps)):
                steps[p] = steps[p] + self.shrinkage * steps[p - 1]
            before = torch.cat((torch.zeros_like(steps[0]), *steps[:-1]))
        return own_RMKB + self.shrinkage * before

    def _type(self, head_type: str) -> _HeadsOfAType:
        return self.types[head_type]  # type: ignore[return-value]

    def _layers(self, row_name: str, blocks: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        position, _, head_type = row_name.partition(".")
        start = f"types.{head_type}."
        own = {name.removeprefix(start): value for name, value in blocks.items() if name.startswith(start)}
        return self._type(head_type).layers_at(self.positions.index(int(position)), own)

    def plain(self, row_name: str) -> PlainHead:
        """One head of the first member, as it is now, without what additive heads add."""
        layers = self._layers(row_name, self.blocks())
        # inputs first in memory: products with one sample, which wait for the weights, take two thirds of the time
        pairs = tuple((weight[0].T.contiguous().T, bias[0].clone()) for weight, bias in layers)
        return PlainHead(pairs, row_name.endswith(".linear"))


def _initialise(weight: Tensor, bias: Tensor, generator: torch.Generator, initialisation: str) -> None:
    """Draws one layer's values: nn.Linear's default, or a truncated normal of 0.02 with zero bias (DyCE)."""
    if initialisation == "uniform":
        bound = 1 / math.sqrt(weight.shape[1])
        weight.uniform_(-bound, bound, generator=generator)
        bias.uniform_(-bound, bound, generator=generator)
    else:
        nn.init.trunc_normal_(weight, std=0.02, generator=generator)
        bias.zero_()


class StackedGates(Stacked):
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

    def blocks(self) -> dict[str, Tensor]:
        return {name: parameter.detach()[None] for name, parameter in self.named_parameters()}

    def by_name(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: block[0] for name, block in blocks.items()}

    def forward(self, u_MGB4: Tensor) -> Tensor:
        """Gate logits (M, G, B) from the gate features (M, G, B, 4)."""
        if u_MGB4.device.type == "cpu":  # where products this small take three times as long; a GPU takes one kernel
            return (u_MGB4 * self.weight[:, :, None]).sum(-1) + self.bias[..., None]
        num_members, num_gates = self.bias.shape
        flat = torch.baddbmm(
            self.bias.view(-1, 1, 1), u_MGB4.flatten(0, 1), self.weight.view(num_members * num_gates, 4, 1)
        )
        return flat.view(num_members, num_gates, -1)

    def gate(self, p: int, u_MB4: Tensor) -> Tensor:
        """Logits (M, B) of the one gate number p."""
        return (u_MB4 @ self.weight[:, p, :, None]).squeeze(-1) + self.bias[:, p, None]


def _generator(seed: int, kind: int, row: int) -> torch.Generator:
    """The source of initial values of one row of one member; hashed, so that neighbouring seeds share nothing."""
    state = np.random.SeedSequence([seed, kind, row]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
