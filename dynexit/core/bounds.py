"""Whether a sample's largest probability lies below a limit, from weights in 8 or 16 bits instead of 32.

At batch 1 an exit that a sample passes costs the reading of its weights. Most samples pass with a probability far from
the threshold, which a fraction of the reading tells for certain.

Shapes: D features, K classes.
"""

import functools

import numpy as np

from dynexit.compiled import compiled

_MOST = 127 * 257  # of two bytes: 127 · 256 + 127
_ROUNDING = 1e-5
"""Error of a product of float32 vectors, relative to their norms; for thousands of features it is a tenth of this."""


class ProbabilityLimit:
    """A linear layer with weights (K, D) and bias (K,), finite, in float32. It keeps two bytes of each weight.

    Weights that are wrong by a vector e_k change the logit of a class by at most |e_k| |x|. With δ the most of any
    class, no probability is wrong by more than the factor exp(2 δ).
    """

    def __init__(self, weight_KD: np.ndarray, bias_K: np.ndarray) -> None:
        step_K = np.abs(weight_KD).max(1) / np.float32(_MOST)
        step_K[step_K == 0] = 1
        both_KD = np.rint(weight_KD / step_K[:, None])
        high_KD = np.floor((both_KD + 128) / 256)
        self._bytes_2KD = np.stack([high_KD, both_KD - 256 * high_KD]).astype(np.int8, order="C")
        self._step_K, self._bias_K = step_K, np.ascontiguousarray(bias_K)
        errors = [np.linalg.norm(weight_KD - step_K[:, None] * kept, axis=1).max() for kept in (256 * high_KD, both_KD)]
        self._error_2 = np.array(errors, np.float32) + np.float32(_ROUNDING) * np.linalg.norm(weight_KD, axis=1).max()

    def is_above_all(self, limit: float, x_D: np.ndarray) -> bool:
        """Whether every probability of features (D,) in float32 is below the limit for certain."""
        return bool(_is_above_all(limit, x_D, self._bytes_2KD, self._step_K, self._bias_K, self._error_2))


@functools.partial(compiled, fastmath={"reassoc", "contract"})
def _is_above_all(
    limit: float,
    x_D: np.ndarray,
    bytes_2KD: np.ndarray,
    step_K: np.ndarray,
    bias_K: np.ndarray,
    error_2: np.ndarray,
) -> bool:
    """The upper bytes first, then the lower ones. Loops, as numba makes of them one pass over the weights."""
    _, num_classes, num_features = bytes_2KD.shape
    square = np.float32(0)
    for d in range(num_features):
        square += x_D[d] * x_D[d]
    logit_K = bias_K.copy()
    for level in range(2):
        unit = np.float32(1 if level else 256)
        largest = np.float32(-np.inf)
        for k in range(num_classes):
            product = np.float32(0)
            for d in range(num_features):
                product += np.float32(bytes_2KD[level, k, d]) * x_D[d]
            logit_K[k] += product * (step_K[k] * unit)
            largest = max(largest, logit_K[k])
        total = np.float32(0)
        for k in range(num_classes):
            if logit_K[k] > largest - 40:  # the exp of less is slow, and adds nothing
                total += np.exp(logit_K[k] - largest)
        if np.exp(2 * error_2[level] * np.sqrt(square)) < limit * total:
            return True
    return False
