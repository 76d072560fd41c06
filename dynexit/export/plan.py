"""Which programs the operating points of a model need, and the steps by which each point runs them.

Shapes: P positions, L exits, K classes.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynexit.core.cost import STEM
from dynexit.deploy.description import SavedPoint, SavedTraining
from dynexit.deploy.model import EarlyExitModel
from dynexit.export.convert import write_program
from dynexit.export.programs import BackboneStage, Exit


class ProgramPlan:
    """The backbone, cut at every position at which any operating point reads something, and the exits that read there.

    `exits` has the file of every exit program by training, position number and head type (None: its feature alone).
    """

    def __init__(self, model: EarlyExitModel, heads: Mapping[str, Mapping[str, Tensor]], suffix: str) -> None:
        """`heads` are the weights of heads and gates by training, as a model folder has them."""
        self.model, self.heads, self.suffix = model, heads, suffix
        self.cuts = sorted(
            {self._training(point).exit_costs.positions[p] for point in model.points for p, _ in self._reads(point)}
        )
        self.exits: dict[tuple[str, int, int | None], str] = {}
        for point in model.points:
            for p, head in self._reads(point):
                training = self._training(point)
                what = "feature" if head is None else training.stack.head_types[head]
                position = training.exit_costs.positions[p]
                place = "stem" if position == STEM else str(position)
                self.exits[point.training, p, head] = f"{what}-{place}-{point.training}{suffix}"

    @property
    def num_programs(self) -> int:
        """How many files there are."""
        return len(self.cuts) + 1 + len(self.exits)

    def point(self, point: SavedPoint) -> dict[str, Any]:
        """What router.json has of an operating point."""
        training, way = self._training(point), point.configuration
        temperature_L = training.temperature_L(way)
        macs_L = training.macs_L(way, point.confidence)
        return {
            "name": point.name,
            "training": point.training,
            "relative_macs": point.relative_macs,
            "accuracy": point.accuracy,
            "confidence": "gate" if way is None else point.confidence,
            "by_gates": way is None,
            "temperatures": [1.0] * len(macs_L) if temperature_L is None else temperature_L.tolist(),
            "macs": macs_L.tolist(),
            "steps": list(self._steps(point)),
        }

    def _steps(self, point: SavedPoint) -> Iterator[dict[str, Any]]:
        positions, way = self._training(point).exit_costs.positions, self._way(point)
        by_position = {positions[p]: (p, head) for p, head in self._reads(point)}
        for stage, cut in enumerate(self.cuts):
            yield {"program": self._stage_name(stage), "inputs": ["state"]}
            if cut in by_position:
                p, head = by_position[cut]
                step = {
                    "program": self.exits[point.training, p, head],
                    "inputs": self._exit(point.training, p, head).inputs,
                }
                yield step if head is None else {**step, "exit_index": p, "threshold": way[p][1]}
        yield {"program": self._stage_name(len(self.cuts)), "inputs": ["state"], "exit_index": len(positions)}

    def write(self, folder: Path) -> None:
        """Writes the files of all programs."""
        state = torch.zeros(2, *self.model.input_size)
        edges = [None, *self.cuts, None]
        last: dict[str, dict[str, Tensor]] = {training: {} for training in self.model.trainings}
        for stage, (start, stop) in enumerate(itertools.pairwise(edges)):
            program = BackboneStage(self.model.backbone, start, stop)
            outputs = write_program(folder / self._stage_name(stage), program, {"in_state": state})
            state = outputs.get("state", state)
            before = dict(last)  # an exit and its feature alone, of two points, both add to what was read before them
            for (training, p, head), name in self.exits.items():
                if self.model.trainings[training].exit_costs.positions[p] != stop:
                    continue
                found = {"state": state, **before[training]}
                exit_ = self._exit(training, p, head)
                outputs = write_program(folder / name, exit_, {f"in_{one}": found[one] for one in exit_.inputs})
                last[training] = {**last[training], **outputs}

    def _exit(self, training: str, p: int, head: int | None) -> Exit:
        model = self.model.engines[training].model
        if head is None:
            return Exit(model, p, None)
        own, gate = [point for point in self.model.points if point.training == training], None
        confidences = {"gate" if point.configuration is None else point.confidence for point in own}
        if "gate" in confidences:
            weights = self.heads[training]
            gate = weights["gates.weight"][p], weights["gates.bias"][p]
        shrinkage = self.model.trainings[training].shrinkage
        return Exit(model, p, self.model.engines[training].head(p, head), sorted(confidences), gate, shrinkage)

    def _stage_name(self, stage: int) -> str:
        return f"stage-{stage}{self.suffix}"

    def _training(self, point: SavedPoint) -> SavedTraining:
        return self.model.trainings[point.training]

    def _way(self, point: SavedPoint) -> Sequence[tuple[int, float | None]]:
        """(Head type or -1, threshold) of every position; if the gates decide, the first head type and None."""
        positions = self._training(point).exit_costs.positions
        return ((0, None),) * len(positions) if point.configuration is None else point.configuration.exits

    def _reads(self, point: SavedPoint) -> Iterator[tuple[int, int | None]]:
        """(Position number, head type) of what a point computes; None for a feature that later exits alone need."""
        heads = [head for head, _ in self._way(point)]
        concatenates = self._training(point).exit_settings.concatenate
        for p, head in enumerate(heads):
            if head >= 0 or (concatenates and max(heads[p:]) >= 0):
                yield p, head if head >= 0 else None
