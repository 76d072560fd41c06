"""`dynexit search-records`: configurations for weights, budgets and a certified risk, from two records alone."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dynexit.core.tradeoff import Configuration
from dynexit.dyce.inputs import parse_costs, read_json_file, read_problems
from dynexit.errors import UserError
from dynexit.run_dir import write_json
from dynexit.search.budgets import KINDS, Budget, latency_costs, within
from dynexit.search.exact import Front, results
from dynexit.search.methods import METHODS
from dynexit.search.outputs import JUDGED, SEARCHED, Answer, Judge, table, write_points
from dynexit.search.problem import objective_of, with_gates
from dynexit.search.risk import certify
from dynexit.study.keys import parse_weights


def search_records(
    *,
    train: Path,
    val: Path,
    macs: Path,
    out: Path,
    accuracy_weights: str | Sequence[float] | None = None,
    method: str = "exact",
    normalize: bool = False,
    exit_confidence: str = "max_probability",
    workers: int = 1,
    starts: int = 4,
    seed: int = 0,
    refine: bool = True,
    latency: Path | None = None,
    relative_macs: Sequence[float] = (),
    relative_latency: Sequence[float] = (),
    min_accuracy: Sequence[float] = (),
    max_accuracy_drop: Sequence[float] = (),
    risk: float | None = None,
    confidence: float = 0.95,
) -> list[dict[str, Any]]:
    """Searches `train`, judges on `val`, writes `configurations.json` and `operating_points.csv` into `out`, and prints
    a table. Returns the entries of the former.

    One entry per accuracy weight (a list, or LO:HI:STEP), then one per budget, then the certified one; budgets are met
    by the exact search whatever the method. With `latency` (a file, see latency_costs) the cost searched is time.
    Raises UserError for what cannot be read, searched or attained; then nothing is written.
    """
    asked = dict(zip(KINDS, (relative_macs, relative_latency, min_accuracy, max_accuracy_drop), strict=True))
    weights, budgets = _weights(accuracy_weights), _budgets(asked, latency is not None)
    if method not in METHODS:
        raise UserError(f"method is {method!r}, allowed are {', '.join(METHODS)}; name one of them")
    for name, value, least in (("workers", workers, 1), ("starts", starts, 0), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} is {value}, allowed is {least} or more")
    if not weights and not budgets and risk is None:
        raise UserError("nothing is asked for; give accuracy weights, a budget or a risk")
    judge = _judge(train, val, macs, latency, exit_confidence, normalize)
    problem = judge.costed[SEARCHED]
    for weight in weights:
        objective_of(problem, weight, normalize)

    started = time.perf_counter()
    front = None
    if budgets or (weights and method == "exact"):
        options: dict[str, Any] = {
            "normalize": normalize,
            "starts": starts,
            "seed": seed,
            "workers": workers,
            "refine": refine,
        }
        front = Front(problem, lowest=0.0 if budgets else min(weights), **options)
    if front is not None and method == "exact":
        found = results(problem, weights, front.solve(weights), normalize)
    else:
        found = METHODS[method](problem, weights, normalize=normalize) if weights else []
    seconds = time.perf_counter() - started

    answers = [Answer(result.configuration, result.accuracy_weight) for result in found]
    for budget in budgets:
        assert front is not None
        weight, candidate = within(front, budget)
        answers.append(Answer(Configuration(candidate.exits), weight, {budget.kind: budget.value}))
    if risk is not None:
        certificate = certify(problem, judge.costed[JUDGED], risk, confidence, workers)
        facts = {name: value for name, value in asdict(certificate).items() if name != "configuration"}
        answers.append(Answer(certificate.configuration, None, facts))
    entries = [judge.entry(answer) for answer in answers]
    write_json(out / "configurations.json", entries)
    write_points(out / "operating_points.csv", judge.problems, answers, method)

    print("\n".join(table(judge, entries)))
    if found:
        print(f"{len(found)} weights in {seconds:.3g} s, {1000 * seconds / len(found):.3g} ms each")
    print(f"written to {out}")
    return entries


def _weights(given: str | Sequence[float] | None) -> list[float]:
    if given is None:
        return []
    try:
        return parse_weights(given if isinstance(given, str) else list(given))
    except ValueError as error:
        raise UserError(f"accuracy weights are {given!r}, but {error}") from error


def _budgets(asked: dict[str, Sequence[float]], timed: bool) -> list[Budget]:
    wrong = "relative_macs" if timed else "relative_latency"
    if asked[wrong]:
        instead = (
            "the cost is time where a latency table is given; ask for a relative latency"
            if timed
            else ("time is known only from a latency table; give one")
        )
        raise UserError(f"{wrong} is {asked[wrong][0]}, but {instead}")
    return [Budget(kind, value) for kind, values in asked.items() for value in values]


def _judge(train: Path, val: Path, macs: Path, latency: Path | None, exit_confidence: str, normalize: bool) -> Judge:
    costs = parse_costs(read_json_file(macs, "the MACs of the model that made the records"), str(macs))
    problems = read_problems({SEARCHED: train, JUDGED: val}, costs, exit_confidence)
    if latency is None:
        return Judge(problems, problems, normalize)
    content = read_json_file(latency, "a table of times")
    if not isinstance(content, dict):
        raise UserError(f"{latency} does not hold a table of times; give stage_seconds and head_seconds")
    timed = latency_costs(content, problems[SEARCHED].costs)
    timed = with_gates(timed) if exit_confidence == "gate" else timed
    return Judge(problems, {name: replace(problem, costs=timed) for name, problem in problems.items()}, normalize)
