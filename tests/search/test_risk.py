"""The certificate holds as often as it says, in a simulation, and is what its definition says."""

import numpy as np
import pytest
from scipy.stats import binom

from dynexit.core.tradeoff import apply_configuration
from dynexit.errors import UserError
from dynexit.search.problem import Problem
from dynexit.search.risk import certify, fixed_sequence, safest_first
from tests.reference.exit_problems import random_problem


def part(problem: Problem, samples: np.ndarray) -> Problem:
    return Problem(
        problem.correct_PHN[..., samples],
        problem.confidence_PHN[..., samples],
        problem.base_correct_N[samples],
        problem.costs,
    )


def losses_of(problem: Problem, configuration) -> np.ndarray:
    _, correct_N = apply_configuration(
        configuration, problem.confidence_PHN, problem.correct_PHN, problem.base_correct_N
    )
    return problem.base_correct_N & ~correct_N


@pytest.fixture(scope="module")
def population() -> Problem:
    return random_problem(np.random.default_rng(0), 40_000, 4, 1)


def test_coverage_in_simulation(population):
    generator = np.random.default_rng(1)
    train, rest = np.split(generator.permutation(40_000), [1000])
    sequence = safest_first(part(population, train))
    rest = part(population, rest)
    losses_CN = np.array([losses_of(rest, configuration) for configuration in sequence])
    true_risk_C = losses_CN.mean(axis=1)
    risk, confidence, repeats = 0.05, 0.9, 1500
    chosen = []
    for _ in range(repeats):
        drawn = generator.integers(losses_CN.shape[1], size=400)
        p_value_C = binom.cdf(losses_CN[:, drawn].sum(axis=1), 400, risk)
        failed = np.flatnonzero(p_value_C > 1 - confidence)
        chosen.append((failed[0] if len(failed) else len(sequence)) - 1)
    violated = np.mean(true_risk_C[chosen] > risk)
    # three standard deviations of a fraction of `repeats`; and the guarantee is not met by choosing nothing
    assert violated <= 1 - confidence + 3 * np.sqrt(0.1 * 0.9 / repeats)
    assert violated > 0.01
    assert np.median(true_risk_C[chosen]) > 0.5 * risk
    # the simulation chose what the function chooses
    for index in range(3):
        drawn = np.random.default_rng(index).integers(losses_CN.shape[1], size=400)
        certificate = fixed_sequence(part(rest, drawn), sequence, risk, confidence)
        p_value_C = binom.cdf(losses_CN[:, drawn].sum(axis=1), 400, risk)
        failed = np.flatnonzero(p_value_C > 1 - confidence)
        assert certificate.configuration == sequence[(failed[0] if len(failed) else len(sequence)) - 1]


def test_the_sequence_starts_without_losses_and_gets_cheaper(population):
    train = part(population, np.arange(800))
    sequence = safest_first(train)
    assert all(head == -1 for head, _ in sequence[0].exits)
    macs = [train.evaluate(configuration).macs for configuration in sequence]
    assert macs == sorted(macs, reverse=True)
    assert len(sequence) > 50


def test_the_certificate_is_proven_by_its_own_figures(population):
    train, val = part(population, np.arange(1000)), part(population, np.arange(1000, 3000))
    certificate = certify(train, val, 0.02, 0.95)
    assert certificate.num_losses == losses_of(val, certificate.configuration).sum()
    # the chance of as few losses as these were the risk 0.02
    chance = sum(binom.pmf(k, 2000, 0.02) for k in range(certificate.num_losses + 1))
    assert certificate.p_value == pytest.approx(chance)
    assert chance <= 0.05
    assert val.evaluate(certificate.configuration).relative_macs < 0.9
    loose = certify(train, val, 0.1, 0.95)
    assert val.evaluate(loose.configuration).macs < val.evaluate(certificate.configuration).macs


def test_a_backbone_that_is_never_beaten_is_left_alone(population):
    wrong = part(population, np.arange(500))
    wrong = Problem(np.zeros_like(wrong.correct_PHN), wrong.confidence_PHN, wrong.base_correct_N, wrong.costs)
    certificate = certify(wrong, wrong, 0.01, 0.95)
    assert all(head == -1 for head, _ in certificate.configuration.exits) or certificate.num_losses == 0


def test_too_few_samples_name_the_least_risk_and_the_samples_needed(population):
    few = part(population, np.arange(100))
    with pytest.raises(
        UserError, match=r"risk 0.01 is unattainable .* certify 0.02951 at best; .* at least 299 samples"
    ):
        certify(few, few, 0.01, 0.95)
    certify(few, few, 0.02952, 0.95)


@pytest.mark.parametrize(("risk", "confidence"), [(0, 0.95), (1.0, 0.95), (0.01, 1.0), (float("nan"), 0.9)])
def test_a_risk_or_confidence_out_of_range_is_refused(population, risk, confidence):
    few = part(population, np.arange(100))
    with pytest.raises(UserError, match="allowed is between 0 and 1"):
        certify(few, few, risk, confidence)
