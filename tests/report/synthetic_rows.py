"""Rows that look like a real study's: samples of varying difficulty leave a network that gets better with depth."""

import json
from collections.abc import Sequence

import numpy as np

from dynexit.report.table import mark_front
from dynexit.search.operating_points import ReportRow

POSITIONS = (0, 1, 2, 3, 4, 5, 6)
RELATIVE_COST = np.array([0.193, 0.289, 0.337, 0.386, 0.483, 0.580, 0.781, 1.0])
FULL_MACS = 3_006_144
TRADEOFFS = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
ACCURACY_WEIGHTS = tuple(float(weight) for weight in np.linspace(0.5, 0.99, 40).round(4))
_SKILL = np.array([2.1, 2.5, 2.8, 3.1, 3.5, 3.9, 4.4, 4.9])


def row(relative_macs=0.5, accuracy=0.9, split="validation", source="search", **fields):
    """A row with these figures; `fields` replaces the rest."""
    values = {"method": "jei_dnn", "seed": 0, "ce_ic_tradeoff": 1.0, "accuracy_weight": None, "point_id": "p", **fields}
    return ReportRow(
        source,
        values.pop("method"),
        values.pop("seed"),
        values.pop("ce_ic_tradeoff"),
        values.pop("accuracy_weight"),
        split,
        accuracy,
        100 * relative_macs,
        relative_macs,
        (0.25, 0.75),
        **values,
    )


def synthetic_rows(
    tradeoffs: Sequence[float] = TRADEOFFS,
    seeds: Sequence[int] = (0, 1),
    accuracy_weights: Sequence[float] = ACCURACY_WEIGHTS,
    methods: Sequence[str] = ("jei_dnn",),
) -> list[ReportRow]:
    """Backbone, gates (of the first method only) and search on both splits, the front marked."""
    rows: list[ReportRow] = []
    for index, method in enumerate(methods):
        for seed in seeds:
            splits = {"validation": _Split(900, 7, index, seed), "test": _Split(1200, 8, index, seed)}
            for tradeoff in tradeoffs if index == 0 else (None,):
                point = {"method": method, "seed": seed, "ce_ic_tradeoff": tradeoff}
                point["point_id"] = f"{method}-{seed}-{tradeoff}"
                for split, samples in splits.items():
                    if index == seed == 0 and tradeoff == tradeoffs[0]:
                        rows.append(samples.row(split, [], "backbone", {"method": "backbone", "point_id": "backbone"}))
                    if tradeoff is not None:
                        exits = [(exit_, 0.9995 - 0.45 * (tradeoff / 7) ** 0.7 - 0.003 * seed) for exit_ in range(7)]
                        rows.append(samples.row(split, exits, "gates", point, overhead=0.004))
                    rows += _search(split, samples, point, accuracy_weights)
    return mark_front(rows)


def _search(split: str, samples: "_Split", point: dict, accuracy_weights: Sequence[float]) -> list[ReportRow]:
    random = np.random.default_rng([round(100 * (point["ce_ic_tradeoff"] or 0)), point["seed"]])
    rows = []
    for weight in accuracy_weights:
        base = 0.5 + 0.4995 * ((weight - 0.5) / 0.49) ** 0.3
        exits = [
            (exit_, float(np.float32(np.clip(base + random.normal(0, 0.01), 0.2, 0.9999))))
            for exit_ in range(7)
            if random.random() < 0.6
        ]
        chosen = dict(exits)
        text = json.dumps([[0, chosen[exit_]] if exit_ in chosen else [-1, 0.0] for exit_ in range(7)])
        rows.append(samples.row(split, exits, "search", {**point, "accuracy_weight": weight, "configuration": text}))
    return rows


class _Split:
    def __init__(self, num_samples: int, *seeds: int) -> None:
        common, own = np.random.default_rng(seeds[0]), np.random.default_rng(seeds)
        difficulty_N, luck_N = common.gamma(1.1, 1.0, num_samples), common.random(num_samples)
        margin_LN = _SKILL[:, None] - difficulty_N + own.normal(0, 0.3, (8, num_samples))
        margin_LN[-1] = _SKILL[-1] - difficulty_N
        chance_LN = 1 / (1 + np.exp(-1.7 * margin_LN))
        self.confidence_LN = np.clip(chance_LN + own.normal(0, 0.01, chance_LN.shape), 0.1, 0.99999)
        self.correct_LN = luck_N < chance_LN

    def row(
        self, split: str, exits: list[tuple[int, float]], source: str, point: dict, overhead: float = 0.0
    ) -> ReportRow:
        exit_index = np.full(self.correct_LN.shape[1], 7)
        for exit_, threshold in reversed(exits):
            exit_index[self.confidence_LN[exit_] > threshold] = exit_
        relative_macs = float((RELATIVE_COST + 0.0008 * len(exits) + overhead * bool(exits))[exit_index].mean())
        fields = {"seed": None, "ce_ic_tradeoff": None, "accuracy_weight": None, **point}
        return ReportRow(
            source=source,
            split=split,
            accuracy=float(self.correct_LN[exit_index, np.arange(len(exit_index))].mean()),
            macs=relative_macs * FULL_MACS,
            relative_macs=relative_macs,
            exit_fractions=tuple(float(share) for share in np.bincount(exit_index, minlength=8) / len(exit_index)),
            **fields,
        )
