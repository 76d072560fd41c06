"""BoostedNet on a frozen backbone: each exit learns what the exits before it left undone.

The logits of exit k are its head's plus `shrinkage` times those of exit k-1, held constant; StackedHeads adds them up,
so training, recording and inference see the same sums. With a frozen backbone the published rescaling of gradients has
nothing to act on. Source: Yu et al., Boosted Dynamic Neural Networks (arXiv 2211.16726), section 3.
"""

from dynexit.study.methods import BoostedSettings
from dynexit.train.independent import IndependentTask
from dynexit.train.pack import Pack


class BoostedTask(IndependentTask):
    """Deep supervision of the summed logits, as the loop's Task."""

    def __init__(self, pack: Pack, method: BoostedSettings) -> None:
        super().__init__(pack, shrinkage=method.shrinkage)
