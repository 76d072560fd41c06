"""Models put together from the settings of a study: a backbone with exits, its heads and gates."""

import dataclasses
from collections.abc import Sequence

import torch

from dynexit.core.cost import STEM, ExitCosts
from dynexit.models.backbones import Backbone
from dynexit.models.heads import StackedGates, StackedHeads
from dynexit.models.macs import exit_costs
from dynexit.models.multi_exit import MultiExit
from dynexit.models.readers import Reading
from dynexit.study.methods import METHODS
from dynexit.study.schema import Config, ExitsSettings, method_settings

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def exit_positions(backbone: Backbone, exits: ExitsSettings) -> Sequence[int]:
    """Returns the positions of the exits in rising order, STEM first if the stem has one."""
    last = backbone.num_blocks - 1
    if exits.positions == "last":
        blocks: Sequence[int] = [last]
    else:
        blocks = range(last) if exits.positions == "all" else sorted(exits.positions)
    return [*([STEM] if exits.stem else []), *blocks]


def reading_of(exits: ExitsSettings) -> Reading:
    """Returns how the exits read features."""
    return Reading(exits.reader, exits.concatenate)


def attach_exits(backbone: Backbone, positions: Sequence[int], exits: ExitsSettings) -> MultiExit:
    """Returns the backbone, frozen, with exits at `positions` that read features as `exits` says.

    Raises UserError for positions that the backbone does not have.
    """
    return MultiExit(backbone, positions, exits.head_types, reading_of(exits))


def costs_of(backbone: Backbone, config: Config) -> ExitCosts:
    """Returns the MACs of the backbone with the configuration's exits; gates cost nothing if the method has none."""
    exits = config.exits
    costs = exit_costs(backbone, exit_positions(backbone, exits), exits.head_types, reading=reading_of(exits))
    if METHODS[config.train.method].has_gates:
        return costs
    return dataclasses.replace(costs, gate_macs=(0,) * len(costs.positions))


@dataclasses.dataclass(frozen=True)
class HeadStack:
    """How heads and gates of one training are stacked: its head types, precision, shrinkage, and whether it has gates.

    `shrinkage` is that of additive heads, 0 for others.
    """

    head_types: tuple[str, ...]
    precision: str
    shrinkage: float
    has_gates: bool

    @classmethod
    def of(cls, config: Config) -> "HeadStack":
        """Returns that of a configuration."""
        method = METHODS[config.train.method]
        shrinkage = method_settings(config).shrinkage if method.is_additive else 0.0
        return cls(tuple(config.exits.head_types), config.train.precision, shrinkage, method.has_gates)

    def build(self, model: MultiExit, seeds: Sequence[int]) -> tuple[StackedHeads, StackedGates | None]:
        """Returns frozen heads and gates on the model's device, a member for each seed, with their initial values."""
        heads = StackedHeads(
            model.feature_dims,
            model.positions,
            self.head_types,
            model.backbone.num_classes,
            seeds,
            shrinkage=self.shrinkage,
        )
        gates = StackedGates(len(model.positions), seeds) if self.has_gates else None
        device = next(model.parameters()).device
        for module in (heads, gates):
            if module is not None:
                module.to(device=device, dtype=_DTYPES[self.precision]).requires_grad_(False)
        return heads, gates
