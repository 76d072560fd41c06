"""The exact search beside a scalar minimiser, in one process: seconds per weight, for 550 weights, peak memory.

    python tests/benchmarks/search.py [--case 50k|1.28m|both] [--weights W] [--minimiser-weights N] [--workers N]

Records are synthetic: 7 positions x 2 head types at 50,000 samples, 16 x 5 at 1,280,000. The minimiser is DyCE's
one-pass search (scipy's fminbound per position and head type), with three ways to price a threshold: by the project's
evaluator of configurations; by a bare one that does nothing else; and from the samples that arrive alone. DyCE's own
code took 0.62 and 122 s a weight on such records. Targets: 100 times faster per weight, and a better objective.
`share of bandwidth`: the time that reading every bin of the record once takes at the speed this machine reads an
array, over the time of a weight. With one worker all seconds are of processor time, so that other work on the machine
does not count.
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from scipy.optimize import fminbound

sys.path.insert(0, str(Path(__file__).parents[2]))

from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import Configuration
from dynexit.search.exact import Front
from dynexit.search.kernels import OFF
from dynexit.search.line_search import LineSearch
from dynexit.search.problem import Problem, objective_of
from tests.reference.exit_search import Exits, dyce_onepass, evaluate_fast

CASES = {"50k": (50_000, 7, 2), "1.28m": (1_280_000, 16, 5)}


def synthetic(num_samples: int, num_positions: int, num_heads: int) -> Problem:
    """A record like a good classifier's: 80 % right at the end, 30 % at the first exit, calibrated but for noise."""
    random = np.random.default_rng(0)
    shape = (num_positions, num_heads, num_samples)
    confidence_PHN, correct_PHN = np.empty(shape, np.float32), np.empty(shape, bool)
    hardness_N = random.standard_normal(num_samples, dtype=np.float32)
    for position in range(num_positions):
        for head in range(num_heads):
            skill = -0.6 + 1.4 * (position + 1) / (num_positions + 1) + 0.1 * head
            lead_N = skill - hardness_N + 0.5 * random.standard_normal(num_samples, dtype=np.float32)
            correct_PHN[position, head] = lead_N > 0
            noise_N = 0.6 * random.standard_normal(num_samples, dtype=np.float32)
            confidence_PHN[position, head] = 1 / (1 + np.exp(-1.6 * lead_N - noise_N))
    base_correct_N = 0.95 - hardness_N + 0.5 * random.standard_normal(num_samples, dtype=np.float32) > 0
    full = 4_000_000_000
    costs = ExitCosts(
        full_macs=full,
        positions=tuple(range(num_positions)),
        backbone_macs=tuple(full * (place + 1) // (num_positions + 1) for place in range(num_positions)),
        head_types=tuple(f"mlp{head}" for head in range(num_heads)),
        head_macs=tuple(tuple(500_000 * (1 + 2 * head) for head in range(num_heads)) for _ in range(num_positions)),
        gate_macs=(0,) * num_positions,
    )
    return Problem(correct_PHN, confidence_PHN, base_correct_N, costs)


def evaluator_onepass(problem: Problem, weight: float) -> Exits:
    """DyCE's one-pass search over the project's own evaluator."""
    objective, count = objective_of(problem, weight), problem.num_samples
    exits: Exits = [(OFF, 1.0)] * len(problem.costs.positions)

    def cost(threshold: float, position: int, head: int) -> float:
        exit_ = (head, float(np.float32(threshold)))
        point = problem.evaluate(Configuration((*exits[:position], exit_, *exits[position + 1 :])))
        return objective(point.accuracy * count, point.macs * count)

    for position in range(len(exits)):
        found = [(cost(1.0, position, OFF), OFF, 1.0)]
        for head in range(len(problem.costs.head_types)):
            threshold, value = fminbound(cost, 0, 1, (position, head), full_output=True)[:2]
            found.append((float(value), head, float(np.float32(threshold))))
        exits[position] = min(found)[1:]
    return exits


def lean_onepass(problem: Problem, weight: float) -> Exits:
    """The same one-pass search, each threshold priced on the samples that arrive alone."""
    costs, objective = problem.costs, objective_of(problem, weight)
    exits: Exits = [(OFF, 1.0)] * len(costs.positions)
    arrived_A = np.arange(problem.num_samples)
    for position in range(len(exits)):
        saved = objective.per_mac * (costs.full_macs - costs.backbone_macs[position])
        base_A = problem.base_correct_N[arrived_A]
        best = (0.0, OFF, 1.0)
        for head, head_macs in enumerate(costs.head_macs[position]):
            confidence_A = problem.confidence_PHN[position, head][arrived_A]
            gain_A = problem.correct_PHN[position, head][arrived_A].astype(np.int8) - base_A
            change_A = -(saved + objective.per_correct * gain_A)

            def cost(threshold: float, confidence_A: np.ndarray, change_A: np.ndarray) -> float:
                return float(change_A @ (confidence_A > np.float32(threshold)))

            threshold, value = fminbound(cost, 0, 1, (confidence_A, change_A), full_output=True)[:2]
            value += objective.per_mac * head_macs * len(arrived_A)
            best = min(best, (value, head, float(threshold)))
        exits[position] = best[1:]
        if best[1] != OFF:
            confidence_A = problem.confidence_PHN[position, best[1]][arrived_A]
            arrived_A = arrived_A[confidence_A <= np.float32(best[2])]
    return exits


def read_bandwidth() -> float:
    """Bytes a second that one thread reads from memory."""
    array = np.ones(64 << 20, np.float32)
    seconds = []
    for _ in range(7):
        start = time.process_time()
        array.max()
        seconds.append(time.process_time() - start)
    return float(array.nbytes / min(seconds))


def run(name: str, num_weights: int, num_minimised: int, workers: int) -> None:
    """One case: the exact search for all weights, the minimisers for a few of them."""
    size = CASES[name]
    clock = time.process_time if workers == 1 else time.perf_counter
    problem = synthetic(*size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    weights = np.linspace(0.45, 0.999, num_weights).tolist()
    Front(synthetic(200, *size[1:])).solve([0.7])  # compiles

    start = clock()
    search = LineSearch(problem)
    prepared = clock() - start
    cold = []
    for weight in (0.5, 0.7, 0.9):
        search.move_to(((OFF, 1.0),) * size[1])
        search.tables.fresh_P[:] = False
        start = clock()
        search.descend(((OFF, 1.0),) * size[1], objective_of(problem, weight))
        cold.append(clock() - start)
    exits = search.candidate().exits
    warm = []
    for weight in np.linspace(0.9, 0.92, 21).tolist():
        start = clock()
        exits = search.descend(exits, objective_of(problem, weight))[-1].exits
        warm.append(clock() - start)
    del search
    start = clock()
    front = Front(problem, lowest=weights[0], workers=workers)
    found = front.solve(weights)
    total = clock() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    per_weight = total / num_weights

    bandwidth = read_bandwidth()
    reading = 2 * np.prod(size) / bandwidth
    shares = [100 * reading / seconds for seconds in (statistics.median(warm), per_weight)]
    print(f"{size[0]:,} samples, {size[1]} positions x {size[2]} head types, {workers} worker(s)")
    print(f"  sorting and cutting the rows, once    {prepared:9.3f} s")
    print(f"  {num_weights} weights, all included          {total:9.3f} s   {1000 * per_weight:9.3f} ms a weight")
    print(f"  one weight from nothing (median)      {statistics.median(cold):9.3f} s")
    print(f"  one weight from its neighbour         {statistics.median(warm):9.4f} s   (a step of 0.001)")
    print(f"  peak memory {peak:.2f} GB, of which the record and all before the search {before:.2f} GB")
    print(
        f"  read bandwidth {bandwidth / 1e9:.1f} GB/s, every bin once {1000 * reading:.2f} ms: share of it "
        f"{shares[0]:.0f} % from its neighbour, {shares[1]:.0f} % overall"
    )
    chosen = np.linspace(num_weights // 3, num_weights - 1, num_minimised).astype(int)
    minimisers = {
        "fminbound, evaluator": evaluator_onepass,
        "fminbound, bare": dyce_onepass,
        "fminbound, arrivals alone": lean_onepass,
    }
    for title, method in minimisers.items():
        seconds, better = [], []
        for index in chosen:
            start = clock()
            exits = method(problem, weights[index])
            seconds.append(clock() - start)
            objective = objective_of(problem, weights[index])
            theirs = objective(*evaluate_fast(problem, exits))
            better.append((theirs - objective(found[index].correct, found[index].macs)) / abs(theirs))
        typical = statistics.median(seconds)
        print(
            f"  {title:25} {typical:9.3f} s a weight ({num_minimised} tried): {typical / per_weight:7.0f} times ours; "
            f"our objective is lower by {100 * min(better):.2f} to {100 * max(better):.2f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=(*CASES, "both"), default="both")
    parser.add_argument("--weights", type=int, default=550)
    parser.add_argument("--minimiser-weights", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    for name in CASES if options.case == "both" else (options.case,):
        run(name, options.weights, options.minimiser_weights, options.workers)


if __name__ == "__main__":
    main()
