"""How what an exit reads is standardised, by its sums over the training images of all ranks."""

from collections.abc import Callable

from dynexit.core.cost import place_name
from dynexit.core.standardisation import Moments, Standardisation
from dynexit.dist import Ranks
from dynexit.errors import Failure
from dynexit.models.multi_exit import MultiExit


def empty_moments(model: MultiExit, p: int, ranks: Ranks, *, whiten: bool) -> Moments:
    """Empty sums for what the exit at position number p reads."""
    return Moments(model.feature_dims[p], ranks.device, whiten=whiten)


def standardisation_by(
    moments: Moments, model: MultiExit, p: int, ranks: Ranks, say: Callable[[str], None]
) -> Standardisation:
    """The standardisation by the sums of all ranks; says which features are ignored as they are constant.

    Raises Failure for features that are not finite.
    """
    ranks.all_reduce(moments.sums)
    where, num_own = place_name(model.positions[p]), model.own_dims[p]
    if bad := moments.num_not_finite():
        raise Failure(
            f"exit after {where}: {bad} of {model.feature_dims[p]} features are not finite on the training split; look "
            "at the backbone's weights and at the images"
        )
    standardisation = moments.standardisation()
    if constant := int(standardisation.is_constant_D[-num_own:].sum()):
        say(f"exit after {where}: {constant} of {num_own} features are constant on the training split and are ignored")
    return standardisation
