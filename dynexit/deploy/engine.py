"""A backbone with the heads and gates of one point, and the ways in which it can leave early.

Shapes: B batch, P positions, H head types, K classes, G gates.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynexit.core.confidence import CONFIDENCES
from dynexit.core.tradeoff import Configuration
from dynexit.deploy.router import NEAR, Router, Stop, even_parts
from dynexit.errors import UserError, counted
from dynexit.models.cut.backbone import OwnBackbone
from dynexit.models.heads import StackedGates, StackedHeads
from dynexit.models.multi_exit import MultiExit
from dynexit.models.products import PlainHead

# glibc returns each larger block to the system when it is freed; taking it again costs a page fault for every 4 KiB
_MOST_ACTIVATION_BYTES = (32 << 20) - 4096


def largest_tile(model: MultiExit) -> int:
    """How many images at most keep every activation of the backbone below 32 MiB; runs one image to measure them."""
    most = 1
    if isinstance(model.backbone, OwnBackbone) and model.backbone.is_graph:
        return max(_MOST_ACTIVATION_BYTES // model.backbone.largest_activation(), 1)

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal most
        if isinstance(output, Tensor):
            most = max(most, output.numel() * output.element_size())

    hooks = [module.register_forward_hook(note) for module in model.backbone.model.modules()]
    parameter = next(model.parameters())
    try:
        with torch.inference_mode():
            image = torch.zeros(1, *model.backbone.input_size, dtype=parameter.dtype, device=parameter.device)
            model.tail(model.start(image), -1)
    finally:
        for hook in hooks:
            hook.remove()
    return max(_MOST_ACTIVATION_BYTES // most, 1)


def _largest_probability(logits_bK: Tensor) -> Tensor:
    """core.confidence.max_probability to the last bit or two, in two operations instead of six."""
    return logits_bK.softmax(-1).amax(-1)


class Engine:
    """A backbone with the heads and gates of one point. `heads` and `gates` hold one member."""

    def __init__(
        self,
        model: MultiExit,
        head_types: Sequence[str],
        heads: StackedHeads,
        gates: StackedGates | None = None,
        tile: int | None = None,
    ) -> None:
        """`tile` is the most images that pass at once on a CPU; None measures it (see largest_tile)."""
        self.model, self.head_types, self._shrinkage = model, tuple(head_types), heads.shrinkage
        self._heads = {name: heads.plain(name) for name in heads.row_names}
        self._gates: list[tuple[Tensor, Tensor]] | None = None
        if gates is not None:
            weight_G4, bias_G = gates.weight.detach()[0], gates.bias.detach()[0]
            self._gates = list(zip(weight_G4.unbind(), bias_G.unbind(), strict=True))
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.tile = (largest_tile(model) if tile is None else tile) if on_cpu else None

    @property
    def has_gates(self) -> bool:
        """Whether the gates can decide."""
        return self._gates is not None

    @property
    def is_additive(self) -> bool:
        """Whether the logits of an exit add to those of the exit before."""
        return self._shrinkage != 0

    def head(self, p: int, head_type: int) -> PlainHead:
        """Returns the head at position number p, of the head type with that index."""
        return self._heads[f"{self.model.positions[p]}.{self.head_types[head_type]}"]

    @torch.inference_mode()
    def plain(self, images: Tensor) -> list[Tensor]:
        """Runs the plain backbone on images (B, C, H, W), in the tiles in which a router runs it: logits of each."""
        images = images.to(next(self.model.parameters()).dtype)
        return [self.model.backbone(tile) for tile in even_parts(images, self.tile)]

    @torch.inference_mode()
    def all_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits in float32 of every head (P, H, B, K) and of the backbone (B, K), for images (B, C, H, W)."""
        features, final_BK = self.model.features(images.to(next(self.model.parameters()).dtype))
        rows: list[Tensor] = []
        for p, feature in enumerate(features):
            own_HBK = torch.stack([self.head(p, head_type)(feature) for head_type in range(len(self.head_types))])
            rows.append(own_HBK + self._shrinkage * rows[-1] if rows and self._shrinkage else own_HBK)
        return torch.stack(rows).float(), final_BK.float()

    def router(
        self, configuration: Configuration | None, confidence: str = "max_probability", tolerance: float = NEAR
    ) -> Router:
        """Returns the way to leave by the thresholds of `configuration` on `confidence`, or, with None, by the gates.

        Raises UserError for a configuration of other positions or head types, and for gates that the model lacks.
        """
        num_positions = len(self.model.positions)
        if configuration is not None and len(configuration.exits) != num_positions:
            raise UserError(
                f"the configuration has {counted(len(configuration.exits), 'position')} and the model {num_positions}; "
                "give one of this model"
            )
        if configuration is not None and max(head for head, _ in configuration.exits) >= len(self.head_types):
            raise UserError(
                f"the configuration uses head type {max(head for head, _ in configuration.exits)}, and the model has "
                f"{len(self.head_types)} ({', '.join(self.head_types)}); give one of this model"
            )
        if confidence not in (*CONFIDENCES,):  # which may have no hash
            raise UserError(f"confidence is {confidence!r}, allowed are {', '.join(CONFIDENCES)}")
        by_gate = configuration is None or CONFIDENCES[confidence].reads == "gates"
        if by_gate and self._gates is None:
            raise UserError("the model has no gates; give a configuration of thresholds on max_probability")
        exits = ((0, None),) * num_positions if configuration is None else configuration.exits
        enabled = [p for p, (head, _) in enumerate(exits) if head >= 0]
        if self._shrinkage and enabled != list(range(len(enabled))):
            raise UserError("additive heads need every exit before one that is used; give it a threshold of 1")
        by_probability = confidence == "max_probability" and not self._shrinkage
        stops = []
        for before_p, p in zip([-1, *enabled], enabled, strict=False):
            gate = self._gates[p] if by_gate and self._gates is not None else None
            head, threshold = exits[p]
            sure_limit = threshold - tolerance if by_probability and threshold is not None else None
            stops.append(Stop(p, before_p, self.head(p, head), threshold, gate, sure_limit))
        function = _largest_probability if confidence == "max_probability" else CONFIDENCES[confidence].function
        measure = None if by_gate else function
        return Router(self.model, stops, measure, self._shrinkage, self.tile, tolerance)
