"""Learning rates along the training, and where each member stands in JEI-DNN's schedule: warm-up, then phases in turn.

Source: JEI-DNN (arXiv 2310.09163), section 5. Members that share a seed form a group: their schedule is the same, and
their warm-up too, since it does not depend on ce_ic_tradeoff.
"""

import dataclasses
import math
from collections.abc import Sequence

from dynexit.study.methods import JeiDnnSettings
from dynexit.study.schema import TrainSettings

WARM_UP, JOINT = "warm-up", "joint"
TERMS = ("warm-up loss", "gate loss", "head loss")


def cosine_rate(step: int, num_steps: int, high: float, low: float, num_warm_up_steps: int = 0) -> float:
    """The rate of a step: linear up to `high` over the warm-up, then half a cosine that would reach `low` at the end.

    The first step of a warm-up has 1/num_warm_up_steps of `high`, the first after it all of `high`.
    """
    if step < num_warm_up_steps:
        return high * (step + 1) / num_warm_up_steps
    progress = (step - num_warm_up_steps) / max(num_steps - num_warm_up_steps, 1)
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2


@dataclasses.dataclass
class Group:
    """Members of one seed; its first member, the leader, is the one that is trained during the warm-up."""

    members: list[int]
    stage: str
    warm_up_epochs: int = 0
    joint_epochs: int = 0
    phase_step: int = 0  # joint batches since the alternation began
    best_accuracy: list[float] = dataclasses.field(default_factory=list)  # per exit, on validation, of the warm-up
    impatience: list[int] = dataclasses.field(default_factory=list)  # epochs without a better one
    frozen: list[bool] = dataclasses.field(default_factory=list)  # exits whose warm-up has ended

    @property
    def leader(self) -> int:
        return self.members[0]

    def term(self, method: JeiDnnSettings) -> int:
        """Index into TERMS of the loss that the next batch brings down."""
        if self.stage == WARM_UP:
            return 0
        return 1 + self.phase_step // method.bilevel_batch_count % 2

    def learning_rate(self, settings: TrainSettings) -> float:
        """Constant in the warm-up, then a cosine over num_epochs, stepped once per joint epoch only."""
        return cosine_rate(self.joint_epochs, settings.num_epochs, settings.learning_rate, settings.min_learning_rate)


def make_groups(seeds: Sequence[int], num_gates: int, method: JeiDnnSettings) -> list[Group]:
    """One group per seed, in order of their first members."""
    stage = WARM_UP if method.max_warm_up_epochs else JOINT
    return [
        Group(
            members=[i for i, other in enumerate(seeds) if other == seed],
            stage=stage,
            best_accuracy=[-1.0] * num_gates,
            impatience=[0] * num_gates,
            frozen=[False] * num_gates,
        )
        for seed in dict.fromkeys(seeds)
    ]
