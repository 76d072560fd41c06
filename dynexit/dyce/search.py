"""`search_and_eval` as DyCE published it (Wang et al., arXiv 2403.01695): its arguments, files and CSV columns."""

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynexit.core.tradeoff import Configuration, OperatingPoint
from dynexit.dyce.inputs import parse_costs, read_json_file, read_problems
from dynexit.errors import UserError
from dynexit.run_dir import atomic_write
from dynexit.search.exact import SearchResult
from dynexit.search.methods import METHODS
from dynexit.search.problem import Problem

COLUMNS = (
    "relative_macs",
    "raw_macs",
    "relative_acc",
    "raw_acc",
    "relative_macs_tr",
    "raw_macs_tr",
    "relative_acc_tr",
    "raw_acc_tr",
    "config",
    "exit_ratio",
    "lambda",
)


def search_and_eval(
    sim_index: str,
    macs_info: str | Path | Mapping[str, Any],
    train_record_path: str | Path,
    val_record_path: str | Path,
    search_range: Sequence[float] = (0.5, 1.01),
    search_step: float = 0.01,
    save_dir: str | Path = "./eval/sim_results/",
    save_name: str | None = None,
    method: str = "onepass",
    calibration: bool = False,
    device: str | None = None,
    refresh: bool = False,
) -> None:
    """Searches the training record for every λ of the grid (normalised objective), judges on the other record, writes
    `save_dir/save_name.csv` (what is better at more MACs) and `save_dir/unfiltered/save_name.csv` (all).

    `save_name` is `{sim_index}_{method}` where none is given; nothing is done where its file exists, without `refresh`.
    `method`: `onepass`, `circular`, `samethres` (λ is the threshold, as published), and `exact`. A λ above 1, which
    would reward MACs, becomes 1, with one warning. Relative MACs and accuracies are over the backbone's, 1 being equal.
    `device` is accepted and has no effect: the search runs on the CPU. Raises UserError for `calibration`: exact search
    has no pessimistic accuracy (see `certify` for a guarantee), and for input that cannot be searched.
    """
    del device
    if method not in METHODS:
        raise UserError(f"method is {method!r}, allowed are {', '.join(METHODS)}; name one of them")
    if calibration:
        raise UserError(
            "calibration=True asks for DyCE's pessimistic accuracy, which the exact search does not have; leave it "
            "out, or certify a risk (search-records --risk)"
        )
    path = Path(save_dir) / f"{save_name or f'{sim_index}_{method}'}.csv"
    if path.exists() and not refresh:
        print(f"{path} exists, skip")
        return
    weights = _weights(search_range, search_step)
    content, source = (macs_info, "macs_info") if isinstance(macs_info, Mapping) else _read(Path(macs_info))
    costs = parse_costs(content, source)
    base_macs = int(content["backbone"].get("ori_macs", costs.full_macs)) if "backbone" in content else costs.full_macs
    problems = read_problems({"train": train_record_path, "val": val_record_path}, costs)
    rows = [_row(problems, result, base_macs) for result in _search(problems["train"], weights, method)]
    rows.sort(key=lambda row: row["relative_macs"])
    better = rows[:1]
    for row in rows[1:]:
        if row["relative_acc"] > better[-1]["relative_acc"]:
            better.append(row)
    _write(path.parent / "unfiltered" / path.name, rows)
    _write(path, better)
    print(f"[{sim_index}] {len(rows)} configurations, {len(better)} of them in {path}")


def _weights(search_range: Sequence[float], step: float) -> list[float]:
    if len(search_range) != 2 or not step > 0 or not 0 <= search_range[0] <= search_range[1]:
        raise UserError(
            f"search_range is {list(search_range)} and search_step {step}, allowed are two rising numbers from 0 up "
            "and a step above 0"
        )
    # DyCE's own default range ends at 1.0000000000000004 without rounding
    weights = np.arange(search_range[0], search_range[1], step).round(12).tolist()
    if not weights:
        raise UserError(f"search_range {list(search_range)} holds no λ; give an upper end above the lower one")
    if weights[-1] > 1:
        above = sum(weight > 1 for weight in weights)
        warnings.warn(
            f"{above} of {len(weights)} values of λ are above 1 (up to {weights[-1]}), where more MACs would count as "
            "better; they are taken as 1",
            stacklevel=3,
        )
    return [min(weight, 1.0) for weight in weights]


def _read(path: Path) -> tuple[Any, str]:
    return read_json_file(path, "DyCE's macs_info"), str(path)


def _search(problem: Problem, weights: Sequence[float], method: str) -> list[SearchResult]:
    if method != "samethres":
        return METHODS[method](problem, weights, normalize=True)
    found = []
    for weight in weights:
        threshold = float(np.float32(weight))
        configuration = Configuration(((0, threshold),) * len(problem.costs.positions))
        found.append(SearchResult(weight, configuration, float("nan"), problem.evaluate(configuration)))
    return found


def _row(problems: Mapping[str, Problem], result: SearchResult, base_macs: int) -> dict[str, Any]:
    point = problems["val"].evaluate(result.configuration)
    figures = {
        **_figures(point, problems["val"], base_macs, ""),
        **_figures(result.point, problems["train"], base_macs, "_tr"),
    }
    exits = [list(exit_) for exit_ in result.configuration.exits]
    found = (exits, figures["relative_macs_tr"], figures["relative_acc_tr"])
    last = max(place for place, fraction in enumerate(point.exit_fractions) if fraction)
    return {
        **figures,
        "config": {"exit_config": found, "lambda": result.accuracy_weight},
        "exit_ratio": list(point.exit_fractions[: last + 1]),
        "lambda": result.accuracy_weight,
    }


def _figures(point: OperatingPoint, problem: Problem, base_macs: int, suffix: str) -> dict[str, float]:
    base_accuracy = problem.base_correct / problem.num_samples
    return {
        f"relative_macs{suffix}": point.macs / base_macs,
        f"raw_macs{suffix}": point.macs,
        f"relative_acc{suffix}": point.accuracy / base_accuracy,
        f"raw_acc{suffix}": point.accuracy,
    }


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["", *COLUMNS])
        for index, row in enumerate(rows):
            writer.writerow([index, *(row[name] for name in COLUMNS)])
