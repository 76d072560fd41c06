"""Parts of an early-exit network as separate programs: stages of the backbone, and exits that read their states.

Shapes: B batch, P positions, K classes, D features.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dynexit.core.confidence import CONFIDENCES, gate_features
from dynexit.models.backbones import Backbone
from dynexit.models.families import State
from dynexit.models.multi_exit import MultiExit


class _Program(nn.Module):
    """Maps named tensors to named tensors. `inputs` are what it reads; arguments have the prefix `in_`.

    Weights are not registered as those of the module: an export then holds those that it uses, and no others.
    """

    inputs: tuple[str, ...] = ("state",)

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        with torch.no_grad():
            parameter = next(backbone.parameters())
            image = torch.zeros(1, *backbone.input_size, dtype=parameter.dtype, device=parameter.device)
            state = backbone.stem(image)
        self._shared = [t if t is None else t.clone() for t in state[1:]] if isinstance(state, tuple) else None

    def whole_state(self, tensor: Tensor) -> State:
        """The state whose first tensor this is, with those that all samples share."""
        return tensor if self._shared is None else (tensor, *self._shared)


class BackboneStage(_Program):
    """The backbone from one position to another: `state`, or after the last block `logits` (B, K)."""

    def __init__(self, backbone: Backbone, start: int | None, stop: int | None) -> None:
        """`start` is the position that it begins after, None for images; `stop` that it ends at, None for the end."""
        super().__init__(backbone)
        self._unregistered, self.start, self.stop = (backbone,), start, stop

    def forward(self, in_state: Tensor) -> dict[str, Tensor]:
        """Runs the blocks in between."""
        (backbone,) = self._unregistered
        h = backbone.stem(in_state) if self.start is None else self.whole_state(in_state)
        first = 0 if self.start is None else self.start + 1
        last = backbone.num_blocks - 1 if self.stop is None else self.stop
        for i in range(max(first, 0), last + 1):
            h = backbone.run_block(i, h)
        if self.stop is None:
            return {"logits": backbone.tail(h).float()}
        return {"state": h[0] if isinstance(h, tuple) else h}


class Exit(_Program):
    """What an exit computes from a state: `logits` (B, K), the confidences (B,) by name, and `feature` (B, D).

    Without a head only the feature, which concatenated features of later exits need.
    """

    def __init__(
        self,
        model: MultiExit,
        p: int,
        head: Callable[[Tensor], Tensor] | None,
        confidences: Sequence[str] = (),
        gate: tuple[Tensor, Tensor] | None = None,
        shrinkage: float = 0.0,
    ) -> None:
        """`p` is the position number, `gate` weight (4,) and bias (), `shrinkage` that of additive heads."""
        super().__init__(model.backbone)
        self._unregistered, self.p, self.head, self.confidences = (model,), p, head, tuple(confidences)
        self.gate, self.shrinkage, self.concatenates = gate, shrinkage, model.reading.concatenate
        reads_feature, reads_logits = p > 0 and self.concatenates, p > 0 and head is not None and shrinkage > 0
        self.inputs = ("state", *["feature"] * reads_feature, *["logits"] * reads_logits)

    def forward(
        self, in_state: Tensor, in_feature: Tensor | None = None, in_logits: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Reads the state; adds the logits of the exit before where heads are additive."""
        (model,) = self._unregistered
        feature = model.feature(self.p, self.whole_state(in_state), in_feature)
        outputs = {"feature": feature} if self.concatenates else {}
        if self.head is None:
            return outputs
        logits = self.head(feature)
        if in_logits is not None:
            logits = logits + self.shrinkage * in_logits
        outputs["logits"] = logits.float()
        for name in self.confidences:
            kind = CONFIDENCES[name]
            outputs[name] = kind.function(logits.float() if kind.reads == "logits" else self._gate(logits)).float()
        return outputs

    def _gate(self, logits: Tensor) -> Tensor:
        assert self.gate is not None
        weight, bias = self.gate
        return gate_features(logits) @ weight + bias
