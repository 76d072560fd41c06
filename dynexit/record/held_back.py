"""The originals of a split's samples, and which validation samples no search sees: those that calibrate."""

import numpy as np

from dynexit.study.schema import DataSettings


def originals(data: DataSettings, split: str, num_samples: int) -> np.ndarray:
    """The original (N,) that each sample of `validation` or `test` is a view of; most data sets have one view of each.

    digits holds view after view of all originals.
    """
    num_originals = data.num_test if split == "test" else data.num_validation
    count = min(num_originals, num_samples) if data.name == "digits" else num_samples
    return np.arange(num_samples) % count


def calibration_samples(data: DataSettings, share: float, num_samples: int) -> np.ndarray:
    """Mask (N,) of the validation samples held back: `share` of the originals, drawn without the study's seeds.

    All views of an original are on one side. With a share of 0 none is held back; otherwise both sides have at least
    one original (of a single one, the search's).
    """
    origin_N = originals(data, "validation", num_samples)
    num_originals = int(origin_N.max()) + 1
    count = min(max(round(share * num_originals), 1), num_originals - 1) if share else 0
    held_back = np.zeros(num_originals, dtype=bool)
    held_back[np.random.default_rng(0).permutation(num_originals)[:count]] = True
    return np.asarray(held_back[origin_N])
