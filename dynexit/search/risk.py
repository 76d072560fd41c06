"""The cheapest configuration whose risk is certified: Learn then Test with a fixed sequence.

The loss of a sample is 1 where the backbone is right and the configuration wrong, else 0; the risk is its mean over the
population. Source: Angelopoulos, Bates, Candès, Jordan and Lei, "Learn then Test: Calibrating predictive algorithms to
achieve risk control" (arXiv 2110.01052), fixed sequence testing with the exact binomial p-value of a 0/1 loss.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import bdtr

from dynexit.core.tradeoff import Configuration, apply_configuration, pareto_front
from dynexit.errors import UserError
from dynexit.search.exact import Front
from dynexit.search.line_search import no_exits
from dynexit.search.problem import Problem

_WEIGHTS = 201
_MOST = 500  # candidates; each is a test, and a longer sequence has more chances to stop early


@dataclass(frozen=True)
class Certificate:
    """A configuration whose risk is at most `risk` with probability `confidence` over the draw of the record."""

    configuration: Configuration
    risk: float
    confidence: float
    num_losses: int
    """Of `num_samples`, those that the backbone gets right and the configuration wrong."""
    num_samples: int
    p_value: float
    """Probability of so few losses, or fewer, were the risk just above the bound."""


def certify(
    train: Problem, certificate: Problem, risk: float, confidence: float = 0.95, workers: int = 1
) -> Certificate:
    """The cheapest configuration of the training record's front that the certificate's record proves safe.

    Candidates and their order, from no exits to the cheapest, come from `train` alone. They are tested in that order
    until one fails, so the last one that passed is safe with the confidence asked for, on data exchangeable with those
    of `certificate`; the two records must not share samples. Raises UserError for a risk or confidence outside (0, 1)
    and for a record too small to certify such a risk even without any loss, naming the least risk it can.
    """
    for name, value in (("risk", risk), ("confidence", confidence)):
        if not 0 < value < 1:
            raise UserError(f"{name} is {value}, allowed is between 0 and 1, as risk 0.01 with confidence 0.95")
    count = certificate.num_samples
    if (1 - risk) ** count > 1 - confidence:
        least = 1 - (1 - confidence) ** (1 / count)
        wanted = math.ceil(math.log(1 - confidence) / math.log(1 - risk))
        raise UserError(
            f"risk {risk} is unattainable at confidence {confidence}: {count} samples without a loss certify "
            f"{least:.4g} at best; ask for that or more, or give at least {wanted} samples"
        )
    return fixed_sequence(certificate, safest_first(train, workers), risk, confidence)


def safest_first(train: Problem, workers: int = 1) -> list[Configuration]:
    """Configurations of least cost for rising risk on `train`: no exits, which never lose, then ever cheaper ones."""
    lossless = replace(
        train,
        correct_PHN=train.correct_PHN | ~train.base_correct_N,
        base_correct_N=np.ones_like(train.base_correct_N),
    )
    front = Front(lossless, lowest=0.0, workers=workers)
    # most of a front of risk lies at weights close to 1, where a loss costs far more than the MACs of a sample
    front.solve((1 - np.geomspace(1e-5, 1, _WEIGHTS)).tolist())
    off = front.candidate(no_exits(train))
    seen = [candidate for candidate in front.pool.values() if candidate.macs < off.macs]
    mask = pareto_front([candidate.correct for candidate in seen], [candidate.macs for candidate in seen])
    chosen = sorted((candidate for candidate, best in zip(seen, mask, strict=True) if best), key=lambda c: -c.macs)
    places = np.unique(np.linspace(0, len(chosen) - 1, min(_MOST, len(chosen))).round().astype(int))
    return [Configuration(candidate.exits) for candidate in (off, *(chosen[place] for place in places))]


def fixed_sequence(problem: Problem, sequence: list[Configuration], risk: float, confidence: float) -> Certificate:
    """The last configuration before the first one whose risk is not proven to be at most `risk`.

    Each hypothesis "the risk is above the bound" is tested at the full level 1 − confidence, which is valid for all
    because testing stops at the first that is not rejected. The first of the sequence must be one without losses.
    """
    passed = None
    for configuration in sequence:
        _, correct_N = apply_configuration(
            configuration, problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N
        )
        losses = int(np.count_nonzero(problem.base_correct_N & ~correct_N))
        p_value = float(bdtr(losses, problem.num_samples, risk))
        if p_value > 1 - confidence:
            break
        passed = Certificate(configuration, risk, confidence, losses, problem.num_samples, p_value)
    if passed is None:
        raise ValueError("the first configuration of the sequence is not proven safe; it must be one without losses")
    return passed
