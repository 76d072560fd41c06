"""JEI-DNN and MSDNet's thresholds once more, one sample at a time in plain Python: slow and obvious."""

import math

Row = list[float]


def softmax(logits: Row) -> Row:
    largest = max(logits)
    powers = [math.exp(a - largest) for a in logits]
    return [power / sum(powers) for power in powers]


def entropy(probabilities: Row) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def features(logits: Row) -> Row:
    p = softmax(logits)
    squares = [x * x for x in p]
    first, second = sorted(p, reverse=True)[:2]
    return [first, entropy(p), first - second, entropy([x / sum(squares) for x in squares])]


def cross_entropy(logits: Row, label: int) -> float:
    return -math.log(softmax(logits)[label])


def exit_probabilities(gates: Row) -> Row:
    """gates of one sample, in order of depth."""
    return [max(0.0, min(gate, 1 - sum(gates[:l]))) for l, gate in enumerate(gates)]  # noqa: E741


def exit_index(gates: Row, single: bool) -> int:
    mass = gates if single else exit_probabilities(gates)
    conditional: Row = []
    for p in mass:
        remaining = math.prod(1 - k for k in conditional)
        if remaining == 0:
            break  # this sample has left for certain
        conditional.append(min(max(p / remaining, 0.0), 1.0))
    leaving = [l for l, k in enumerate(conditional) if k >= 0.5]  # noqa: E741
    return leaving[0] if leaving else len(gates)


def prediction_error(logits: Row, label: int, objective: str) -> float:
    if objective == "ce":
        return cross_entropy(logits, label)
    correct = logits.index(max(logits)) == label
    return -(max(softmax(logits)) if objective == "prob" else 1.0) if correct else 0.0


def gate_target(errors: Row, cost: Row, tradeoff: float) -> int:
    totals = [error + tradeoff * c for error, c in zip(errors, cost, strict=True)]
    return totals.index(min(totals))


def gate_loss(gate_logits: list[Row], targets: list[int], weights: Row) -> float:
    """gate_logits[gate][sample]."""
    total = 0.0
    for gate, row in enumerate(gate_logits):
        for logit, target in zip(row, targets, strict=True):
            chance = 1 / (1 + math.exp(-logit))
            total -= weights[gate] * math.log(chance) if target <= gate else math.log(1 - chance)
    return total / (len(gate_logits) * len(targets))


def fixed_thresholds(confidences: list[Row], fractions: Row) -> Row:
    """confidences[exit][sample]."""
    num_samples = len(confidences[0])
    taken: set[int] = set()
    thresholds: Row = []
    for row, fraction in zip(confidences[:-1], fractions[:-1], strict=True):
        free = sorted((row[n] for n in range(num_samples) if n not in taken), reverse=True)
        wanted = math.floor(num_samples * fraction)
        thresholds.append(free[wanted - 1] if 1 <= wanted <= len(free) else 1e8)
        taken |= {n for n in range(num_samples) if row[n] >= thresholds[-1]}
    return [*thresholds, -1e8]
