"""A lower bound on what any configuration can reach: how far from the optimum an answer can be at most.

Let every sample choose at every position by itself (no exit; a head type, staying or leaving) at a price, and the
configuration choose the same at the opposite price. Whatever the prices, the two minima sum to no more than the
objective of any configuration, for there both choices agree and the prices cancel. Subgradient steps raise the bound.
(Lagrangian decomposition: Guignard and Kim, Mathematical Programming 39, 1987.)

Shapes: N samples, P positions, H head types, C = 1 + 2H choices: no exit, then per type staying and leaving.
"""

import numpy as np

from dynexit.search.problem import Objective, Problem

_ROUNDS = 300


class Bound:
    """Lower bounds on the objective of one record; prices are kept from one weight to the next.

    Worth its time on few positions only: measured against the best known, 0 to 4 % at three positions, 25 to 45 % at
    seven.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        num_positions, num_heads, count = problem.confidence_PHN.shape
        self._order_PHN = np.argsort(-problem.confidence_PHN, axis=-1, kind="stable")
        sorted_PHN = np.take_along_axis(problem.confidence_PHN, self._order_PHN, axis=-1)
        # a threshold cannot part equals: leaving may stop after a sample only where the next one is below it
        self._parted_PHN = np.concatenate(
            [sorted_PHN[..., 1:] < sorted_PHN[..., :-1], np.ones((num_positions, num_heads, 1), bool)], axis=-1
        )
        self._price_PCN = np.zeros((num_positions, 1 + 2 * num_heads, count))

    def lower(self, objective: Objective, reached: float) -> float:
        """A value that no configuration's objective is below; `reached`: the objective of a known one."""
        best = -np.inf
        for round_ in range(_ROUNDS):
            samples, chosen_PCN = self._samples(objective)
            configuration, agreed_PCN = self._configuration()
            value = samples + configuration + objective.constant
            best = max(best, value)
            step_PCN = chosen_PCN.astype(np.float64) - agreed_PCN
            length = float((step_PCN**2).sum())
            if length == 0 or reached - best <= 1e-12:
                break
            self._price_PCN += 1.5 * 0.99**round_ * (reached - value) / length * step_PCN
        return best

    def _samples(self, objective: Objective) -> tuple[float, np.ndarray]:
        """The sum over samples of their cheapest choices, and the choices, (P, C, N) bool."""
        problem, costs = self._problem, self._problem.costs
        path = [*costs.backbone_macs, costs.full_macs]
        num_positions, num_choices, count = self._price_PCN.shape
        on_N = objective.per_mac * path[-1] - objective.per_correct * problem.base_correct_N
        gone_N = np.zeros(count)
        on_choice_PN, gone_choice_PN = np.empty((2, num_positions, count), np.int64)
        for position in reversed(range(num_positions)):
            price_CN = self._price_PCN[position]
            cost_CN = price_CN + on_N
            for head, head_macs in enumerate(costs.head_macs[position]):
                paid = objective.per_mac * head_macs
                right_N = problem.correct_PHN[position, head]
                cost_CN[1 + 2 * head] += paid
                leaving = paid + objective.per_mac * path[position]
                cost_CN[2 + 2 * head] = price_CN[2 + 2 * head] + gone_N + leaving - objective.per_correct * right_N
            on_choice_PN[position] = cost_CN.argmin(axis=0)
            gone_choice_PN[position] = price_CN.argmin(axis=0)
            gone_N = gone_N + price_CN.min(axis=0)
            on_N = cost_CN.min(axis=0)
        chosen_PCN = np.zeros((num_positions, num_choices, count), bool)
        gone = np.zeros(count, bool)
        for position in range(num_positions):
            choice_N = np.where(gone, gone_choice_PN[position], on_choice_PN[position])
            chosen_PCN[position, choice_N, np.arange(count)] = True
            gone |= (choice_N > 0) & (choice_N % 2 == 0)
        return float(on_N.sum()), chosen_PCN

    def _configuration(self) -> tuple[float, np.ndarray]:
        """The cheapest configuration at the opposite prices: its value, and its choices (P, C, N) bool."""
        agreed_PCN = np.zeros(self._price_PCN.shape, bool)
        total = 0.0
        for position, price_CN in enumerate(self._price_PCN):
            lowest, chosen_CN = -price_CN[0].sum(), agreed_PCN[position]
            choice: tuple[int, int] | None = None
            for head in range((len(price_CN) - 1) // 2):
                stay_N, leave_N = price_CN[1 + 2 * head], price_CN[2 + 2 * head]
                order_N = self._order_PHN[position, head]
                value_N = -stay_N.sum() + np.append(0.0, (stay_N - leave_N)[order_N].cumsum())
                value_N[1:][~self._parted_PHN[position, head]] = np.inf
                leaving = int(value_N.argmin())
                if value_N[leaving] < lowest:
                    lowest, choice = float(value_N[leaving]), (head, leaving)
            total += float(lowest)
            if choice is None:
                chosen_CN[0] = True
            else:
                head, leaving = choice
                order_N = self._order_PHN[position, head]
                chosen_CN[2 + 2 * head, order_N[:leaving]] = True
                chosen_CN[1 + 2 * head, order_N[leaving:]] = True
        return total, agreed_PCN
