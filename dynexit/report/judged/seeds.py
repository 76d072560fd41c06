"""Answers of several seeds on test images: the paired difference of two sides, and how many seeds differ at all.

Shapes: N samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynexit.core.statistics import Interval, mean_interval

SAME_ANSWERS = (
    " Equal seeds gave the same answers and are one run: where data and optimum are the same, as of method probe, a "
    "seed changes nothing, and there is no spread to show."
)


@dataclass(frozen=True)
class SeedAnswers:
    """Of one seed on test: what names its images, whether it is right, and the original of each."""

    images: str
    correct_N: np.ndarray
    origin_N: np.ndarray


def gain(ours: SeedAnswers, theirs: SeedAnswers) -> float:
    """Returns by how much the first is more accurate, in [-1, 1]."""
    return float(ours.correct_N.mean() - theirs.correct_N.mean())


def paired(ours: Sequence[SeedAnswers], theirs: Sequence[SeedAnswers]) -> Interval | None:
    """Returns the difference of the means over seeds, image by image; None if no images are shared."""
    values: list[np.ndarray] = []
    origins: list[np.ndarray] = []
    for images in dict.fromkeys(one.images for one in ours):
        sides = [[one for one in side if one.images == images] for side in (ours, theirs)]
        if all(sides):
            ours_N, theirs_N = (np.mean([one.correct_N for one in side], axis=0) for side in sides)
            values.append(ours_N - theirs_N)
            origins.append(sides[0][0].origin_N + (origins[-1].max() + 1 if origins else 0))
    return mean_interval(np.concatenate(values), np.concatenate(origins)) if values else None


def num_distinct(seeds: Sequence[SeedAnswers]) -> int:
    """Returns how many of the seeds differ: a training without randomness gives each of them the same answers."""
    return len({(one.images, np.packbits(one.correct_N).tobytes()) for one in seeds})


def count_text(count: int, distinct: int) -> str:
    """The number of seeds in words; those with the same answers are one run."""
    return str(count) if distinct == count else f"{count}, {'' if distinct == 1 else 'some '}equal"
