"""Early exit that really stops early: samples that leave are dropped from the batch, the others continue.

Shapes: B batch, b samples still in it, P positions, K classes.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dynexit.core.confidence import CONFIDENCES, gate_confidence, gate_features
from dynexit.core.tradeoff import Configuration
from dynexit.models.heads import StackedGates, StackedHeads
from dynexit.models.multi_exit import MultiExit, select

NEAR = 1e-5  # batching changes the last bits of a confidence; this close to a threshold they may decide


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the engine says of a batch: class, exit taken (0..P), and whether a decision on the way was within NEAR."""

    prediction_B: Tensor
    exit_B: Tensor
    near_B: Tensor


class Engine:
    """A backbone with the heads and gates of one point, leaving early by one configuration; `configure` switches it.

    `heads` and `gates` hold one member. Not safe for use by several threads at once.
    """

    def __init__(
        self, model: MultiExit, head_types: Sequence[str], heads: StackedHeads, gates: StackedGates | None = None
    ) -> None:
        self.model, self.head_types, self.heads, self.gates = model, tuple(head_types), heads, gates
        if gates is not None:
            self.configure(None)

    def configure(self, configuration: Configuration | None, confidence: str = "max_probability") -> None:
        """Leaves by the thresholds of `configuration` on `confidence`, or, with None, by the gates, from now on.

        Raises ValueError for a configuration of other positions or head types, and for gates that are not there.
        """
        if configuration is not None and len(configuration.exits) != len(self.model.positions):
            raise ValueError(
                f"the configuration has {len(configuration.exits)} positions, the model {len(self.model.positions)}"
            )
        if configuration is not None and max(head for head, _ in configuration.exits) >= len(self.head_types):
            raise ValueError(f"the configuration uses a head type beyond the model's {', '.join(self.head_types)}")
        if self.gates is None and (configuration is None or CONFIDENCES[confidence].reads == "gates"):
            raise ValueError("the model has no gates")
        if self.heads.shrinkage and configuration is not None:
            used = [head >= 0 for head, _ in configuration.exits]
            if used != sorted(used, reverse=True):
                raise ValueError("additive heads need every exit before one that is used; give it a threshold of 1")
        self.configuration, self.confidence = configuration, confidence

    @torch.no_grad()
    def classify(self, images: Tensor) -> Answers:
        """Class and exit of every image (B, C, H, W)."""
        size, device = len(images), images.device
        prediction_B = torch.full((size,), -1, dtype=torch.int64, device=device)
        exit_B = torch.full((size,), len(self.model.positions), dtype=torch.int64, device=device)
        near_B = torch.zeros(size, dtype=torch.bool, device=device)
        inside = torch.arange(size, device=device)  # b: who is still in the batch
        used_b = torch.zeros(size, device=device)  # of the exit probabilities, by the exits passed
        state, reached = self.model.start(images), -1
        before_bK: Tensor | None = None  # logits of the exit before, for additive heads
        feature_bD: Tensor | None = None  # what the exit before read, for concatenated features
        for p in range(self._num_read()):
            reads = self.model.reading.concatenate or self._is_enabled(p)
            if not reads or not len(inside):
                continue
            state, reached = self.model.advance(state, reached, p), p
            feature_bD = self.model.feature(p, state, feature_bD)
            if not self._is_enabled(p):
                continue
            logits_bK = self._logits(p, feature_bD, before_bK)
            leaves_b, near_b, used_b = self._decide(p, logits_bK, used_b)
            near_B[inside] |= near_b
            left = inside[leaves_b]
            prediction_B[left], exit_B[left] = logits_bK[leaves_b].argmax(-1), p
            inside, used_b = inside[~leaves_b], used_b[~leaves_b]
            before_bK = logits_bK[~leaves_b] if self.heads.shrinkage else None
            if len(left):
                state, feature_bD = select(state, ~leaves_b), feature_bD[~leaves_b]
        if len(inside):
            prediction_B[inside] = self.model.tail(state, reached).argmax(-1)
        return Answers(prediction_B, exit_B, near_B)

    def _num_read(self) -> int:
        """How many positions are reached before the tail: those up to the last enabled exit."""
        return 1 + max((p for p in range(len(self.model.positions)) if self._is_enabled(p)), default=-1)

    def _is_enabled(self, p: int) -> bool:
        return self.configuration is None or self.configuration.exits[p][0] >= 0

    def _logits(self, p: int, feature_bD: Tensor, before_bK: Tensor | None) -> Tensor:
        head_type = 0 if self.configuration is None else self.configuration.exits[p][0]
        name = f"{self.model.positions[p]}.{self.head_types[head_type]}"
        before_1bK = None if before_bK is None else before_bK[None]
        return self.heads.head(name, feature_bD.to(next(self.heads.parameters()).dtype), before_1bK)[0]

    def _decide(self, p: int, logits_bK: Tensor, used_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Who leaves at position number p, who was near to deciding otherwise, and what of the probability is used."""
        if self.configuration is not None:
            kind = CONFIDENCES[self.confidence]
            if kind.reads == "gates":
                confidence_b = self._gate(p, logits_bK).float()
            else:
                confidence_b = kind.function(logits_bK.float())
            threshold = torch.tensor(self.configuration.exits[p][1], dtype=torch.float32, device=logits_bK.device)
            return confidence_b > threshold, (confidence_b - threshold).abs() <= NEAR, used_b
        gate_b = self._gate(p, logits_bK).float()
        left_b = 1 - used_b
        # the conditional probability of stopping, P_l over what is left, is at least a half
        stop_b = torch.minimum(gate_b, left_b).clamp_min(0) / left_b
        return stop_b >= 0.5, (stop_b - 0.5).abs() <= NEAR, used_b + gate_b

    def _gate(self, p: int, logits_bK: Tensor) -> Tensor:
        assert self.gates is not None
        return gate_confidence(self.gates.gate(p, gate_features(logits_bK)[None])[0])
