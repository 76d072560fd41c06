"""The validation samples that no search sees, so that what is calibrated on them keeps its promise on new samples."""

import numpy as np

from dynexit.study.schema import DataSettings


def calibration_samples(data: DataSettings, share: float, num_samples: int) -> np.ndarray:
    """Mask (N,) of the validation samples held back: `share` of the originals, drawn without the study's seeds.

    All views of an original are on one side. With a share of 0 none is held back; otherwise both sides have at least
    one original (of a single one, the search's).
    """
    num_originals = min(data.num_validation, num_samples) if data.name == "digits" else num_samples
    count = min(max(round(share * num_originals), 1), num_originals - 1) if share else 0
    held_back = np.zeros(num_originals, dtype=bool)
    held_back[np.random.default_rng(0).permutation(num_originals)[:count]] = True
    return held_back[np.arange(num_samples) % num_originals]  # digits: view after view of all originals
