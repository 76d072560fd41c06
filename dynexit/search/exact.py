"""The best exit configuration for every accuracy weight: exact line search, coordinate descent, a pool of all it saw.

Between two neighbouring confidences nothing changes, so a prefix sum over the samples sorted by confidence finds the
best threshold of an exit, the rest of the configuration fixed (`tables.py`). All sums are integers: the same arguments
give the same configurations, whatever the number of workers.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from dynexit.core.tradeoff import Configuration, OperatingPoint
from dynexit.search.kernels import OFF
from dynexit.search.line_search import Candidate, Exits, LineSearch, no_exits
from dynexit.search.problem import Objective, Problem, objective_of, tie_breaking

_WARM_STEPS = 100  # the warm-started grid has steps of a hundredth ...
_LOWEST_WARM = 40  # ... and reaches down to 0.40, where samples leave early: better optima are found coming from there
_STARTS_UP_TO_SAMPLES = 16_384  # on 50,000 samples they lower the objective by 2e-7 on average
_STARTED_WEIGHTS = 12
_MORE_STARTS = 8
_TASKS_PER_BLOCK = 16  # neighbouring weights: their configurations lie near each other


@dataclass(frozen=True)
class SearchResult:
    """What the search chose at one accuracy weight: objective and operating point are those of the searched record."""

    accuracy_weight: float
    configuration: Configuration
    objective: float
    point: OperatingPoint


class Front:
    """The trade-off of one record, better known with every weight asked for: `pool` keeps all candidates ever seen.

    The objective is linear in the weight, so a candidate found at one weight is one for every other. Made by coordinate
    descent along a grid of weights, upwards and downwards, each started from its neighbour's answer. Where the record
    has at most 16,384 samples, also from DyCE's one-pass answer and from `starts` random configurations (up to eight
    times as many below 256 samples) at a dozen weights of the grid and a dozen of those asked for.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        lowest: float = 0.4,
        normalize: bool = False,
        starts: int = 4,
        seed: int = 0,
        workers: int = 1,
        refine: bool = True,
    ) -> None:
        """`lowest`: the least weight that will be asked for. `workers`: threads; they share the record.

        Without `refine` thresholds lie between bins of confidences alone (at most 2,048 a row, of equal numbers of
        samples): a little worse on the record searched, about as good on others.
        """
        self.problem = problem
        self.normalize = normalize
        self.refine = refine
        self.pool: dict[Exits, Candidate] = {}
        self._search = LineSearch(problem, refine=refine)
        self.rows = self._search.rows
        self._idle = [self._search]
        self._started: set[float] = set()
        self._ends: dict[tuple[Exits, float], Exits] = {}
        """Where the descent from a configuration at a weight ended."""
        self._fixed: dict[Exits, tuple[float, float]] = {}
        """The weights between which a configuration is a fixed point: every change costs something at both ends, and
        what it costs is linear in the weight."""
        self._workers = workers
        first = max(0, min(_LOWEST_WARM, int(lowest * _WARM_STEPS)))
        grid = [step / _WARM_STEPS for step in range(first, _WARM_STEPS + 1)]
        self._generator = np.random.default_rng(seed)
        self._starts = starts if problem.num_samples <= _STARTS_UP_TO_SAMPLES else 0
        self._warm_sweep(grid)
        self._start_anew(grid)

    def solve(self, accuracy_weights: Sequence[float]) -> list[Candidate]:
        """The best of the pool for each weight, descended from again while that finds something better for any.

        No change of one position improves any of them at its own weight.
        """
        objectives = tie_breaking(self.problem, accuracy_weights, self.normalize)
        self._start_anew(sorted(set(accuracy_weights) - self._started))
        while True:
            starts = [
                (candidate.exits, weight)
                for candidate, weight in zip(self._best_of_pool(objectives), accuracy_weights, strict=True)
            ]
            ends = [self._known_end(*start) for start in starts]
            unknown: dict[Exits, list[float]] = {}
            for (exits, weight), end in zip(starts, ends, strict=True):
                if end is None:
                    unknown.setdefault(exits, []).append(weight)
            if not unknown:
                return [self.pool[end] for end in ends if end is not None]
            # most often the configuration is a fixed point at its lowest and highest weight, and so in between
            self._descend_all([(e, w) for e, weights in unknown.items() for w in sorted({min(weights), max(weights)})])

    def _known_end(self, exits: Exits, weight: float) -> Exits | None:
        low, high = self._fixed.get(exits, (2.0, -1.0))
        return exits if low <= weight <= high else self._ends.get((exits, weight))

    def candidate(self, exits: Exits) -> Candidate:
        """The sums of one configuration; it joins the pool."""
        self._search.move_to(exits)
        candidate = self._search.candidate()
        return self.pool.setdefault(candidate.exits, candidate)

    def _best_of_pool(self, objectives: Iterable[Objective]) -> list[Candidate]:
        candidates = list(self.pool.values())
        correct = np.array([candidate.correct for candidate in candidates], dtype=np.float64)
        macs = np.array([candidate.macs for candidate in candidates], dtype=np.float64)
        costs = (objective.per_mac * macs - objective.per_correct * correct for objective in objectives)
        return [candidates[int(np.argmin(cost))] for cost in costs]

    def _warm_sweep(self, grid: Sequence[float]) -> None:
        exits = no_exits(self.problem)
        for weight in (*grid, *reversed(grid)):
            known = self._known_end(exits, weight)
            exits = known or self._keep(exits, weight, self._descend(self._search, exits, weight))

    def _start_anew(self, weights: Sequence[float]) -> None:
        """Descends at a dozen of the weights from DyCE's one-pass answer and from random configurations."""
        self._started.update(weights)
        if not self._starts:
            return
        confidence_PHN = self.problem.confidence_PHN
        num_positions, num_heads, count = confidence_PHN.shape
        weights = weights[:: -(-len(weights) // _STARTED_WEIGHTS) or 1]
        objectives = tie_breaking(self.problem, weights, self.normalize)
        tasks = [(self._search.pass_once(o).exits, weight) for o, weight in zip(objectives, weights, strict=True)]
        for weight in np.repeat(weights, self._starts * min(_MORE_STARTS, max(1, 256 // count))).tolist():
            heads = np.atleast_1d(self._generator.integers(OFF, num_heads, size=num_positions)).tolist()
            samples = np.atleast_1d(self._generator.integers(count, size=num_positions)).tolist()
            exits = tuple(
                (head, float(confidence_PHN[position, head, samples[position]])) if head != OFF else (OFF, 1.0)
                for position, head in enumerate(heads)
            )
            tasks.append((exits, weight))
        self._descend_all(tasks)

    def _descend_all(self, tasks: Sequence[tuple[Exits, float]]) -> None:
        blocks = [tasks[start : start + _TASKS_PER_BLOCK] for start in range(0, len(tasks), _TASKS_PER_BLOCK)]
        if self._workers == 1 or len(blocks) == 1:
            paths = [self._descend(self._search, *task) for task in tasks]
        else:
            with ThreadPoolExecutor(self._workers) as threads:
                paths = [path for block in threads.map(self._descend_block, blocks) for path in block]
        for (exits, weight), path in zip(tasks, paths, strict=True):
            self._keep(exits, weight, path)

    def _descend_block(self, block: Sequence[tuple[Exits, float]]) -> list[list[Candidate]]:
        try:
            search = self._idle.pop()
        except IndexError:
            search = LineSearch(self.problem, self.rows, self.refine)
        paths = [self._descend(search, *task) for task in block]
        self._idle.append(search)
        return paths

    def _descend(self, search: LineSearch, exits: Exits, weight: float) -> list[Candidate]:
        (objective,) = tie_breaking(self.problem, [weight], self.normalize)
        return search.descend(exits, objective)

    def _keep(self, exits: Exits, weight: float, path: Sequence[Candidate]) -> Exits:
        self.pool.update((candidate.exits, candidate) for candidate in path)
        end = path[-1].exits
        self._ends[exits, weight] = end
        low, high = self._fixed.get(end, (weight, weight))
        self._fixed[end] = (min(low, weight), max(high, weight))
        return end


def sweep(
    problem: Problem,
    accuracy_weights: Sequence[float],
    *,
    normalize: bool = False,
    starts: int = 4,
    seed: int = 0,
    workers: int = 1,
    refine: bool = True,
) -> list[SearchResult]:
    """The best configuration found for each accuracy weight, in the order given; see Front for how.

    The same arguments give the same answer; it does not depend on the number of workers.
    Raises UserError for a weight outside [0, 1] and what `objective_of` refuses.
    """
    for weight in accuracy_weights:
        objective_of(problem, weight, normalize)
    if not accuracy_weights:
        return []
    front = Front(
        problem,
        lowest=min(accuracy_weights),
        normalize=normalize,
        starts=starts,
        seed=seed,
        workers=workers,
        refine=refine,
    )
    return results(problem, accuracy_weights, front.solve(accuracy_weights), normalize)


def results(
    problem: Problem, accuracy_weights: Sequence[float], candidates: Sequence[Candidate], normalize: bool = False
) -> list[SearchResult]:
    """The candidates as results of the weights they were chosen for."""
    return [
        SearchResult(
            weight,
            Configuration(candidate.exits),
            objective_of(problem, weight, normalize)(candidate.correct, candidate.macs),
            candidate.point(problem.costs.full_macs),
        )
        for weight, candidate in zip(accuracy_weights, candidates, strict=True)
    ]
