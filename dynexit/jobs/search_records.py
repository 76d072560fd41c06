"""`search-records`: configurations for weights, budgets and a certified risk, from records alone."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynexit.baselines.cascades import Network, cascade_problem, check_same_samples
from dynexit.core.confidence import CONFIDENCES
from dynexit.core.cost import ExitCosts
from dynexit.core.latency import LatencyTable
from dynexit.core.tradeoff import Configuration, pareto_front
from dynexit.dyce.inputs import parse_costs, read_json_file, read_problems
from dynexit.errors import UserError, counted
from dynexit.record.shards import Record
from dynexit.run_dir import COSTS, write_json
from dynexit.search.budgets import Unattainable, latency_costs
from dynexit.search.driver import SearchDriver, SearchEntry, SearchRequest
from dynexit.search.operating_points import ReportRow, write_csv
from dynexit.search.problem import Problem, with_gates
from dynexit.study.keys import parse_weights

SEARCHED, JUDGED = "train", "val"


@dataclass(frozen=True)
class RecordFiles:
    """The files of a search: two records, the MACs of their model, and maybe times: a latency table (see
    latency_costs), or the latency.json of stage bench with the batch size whose times count (None: the smallest).

    `train` is searched; `val` judges, and certifies a risk. A record is a directory of shards or DyCE's `.npz`, `macs`
    costs.json or DyCE's macs_info. `exit_confidence` is what thresholds are compared with.
    """

    train: Path
    val: Path
    macs: Path
    latency: Path | None = None
    exit_confidence: str = "max_probability"
    batch_size: int | None = None

    def read(self) -> tuple[dict[str, Problem], ExitCosts | None]:
        """The problems of both records, and the times if there are any. Raises UserError for what does not fit."""
        costs = parse_costs(read_json_file(self.macs, "the MACs of the model that made the records"), str(self.macs))
        problems = read_problems({SEARCHED: self.train, JUDGED: self.val}, costs, self.exit_confidence)
        if self.latency is None:
            return problems, None
        content = read_json_file(self.latency, "a table of times")
        if not isinstance(content, dict):
            raise UserError(f"{self.latency} does not hold a table of times; give stage_seconds and head_seconds")
        gates = CONFIDENCES[self.exit_confidence].reads == "gates"
        if "seconds_by_batch_size" in content:
            return problems, self._measured(content, costs, gates)
        times = latency_costs(content, problems[SEARCHED].costs)
        return problems, with_gates(times) if gates else times

    def _measured(self, content: dict[str, Any], costs: ExitCosts, gates: bool) -> ExitCosts:
        """The times of stage bench."""
        try:
            table = LatencyTable.from_json(content)
            batch = table.batch_sizes[0] if self.batch_size is None else self.batch_size
            return table.costs(batch, costs, gates=gates)
        except ValueError as error:
            raise UserError(f"{self.latency} does not fit the records: {error}") from error
        except KeyError:
            sizes = ", ".join(map(str, table.batch_sizes))
            raise UserError(f"--batch-size {batch}: {self.latency} has times of batches of {sizes}; name one") from None


@dataclass(frozen=True)
class CascadeFiles:
    """The record folders (record/ID of a study) of whole networks on the same samples, in the order in which they run.

    Their validation splits are searched, their test splits judge. Of each only its own classifier is read.
    """

    folders: Sequence[Path]
    exit_confidence: str = "max_probability"

    def read(self) -> tuple[dict[str, Problem], None]:
        """The problems of both splits. Raises UserError for what does not fit."""
        if len(set(self.folders)) < max(2, len(self.folders)):
            given = ", ".join(map(str, self.folders))
            raise UserError(f"--cascade {given}: should be two or more different folders, the first network in front")
        problems = {}
        for name, split in ((SEARCHED, "validation"), (JUDGED, "test")):
            records = {str(folder): _record_of(folder, split) for folder in self.folders}
            check_same_samples(records)
            macs = [parse_costs(read_json_file(one / COSTS, "its MACs"), str(one)).full_macs for one in self.folders]
            networks = zip(records.values(), macs, strict=True)
            problems[name] = cascade_problem([Network.of(r, -1, m, self.exit_confidence) for r, m in networks])
        return problems, None


def _record_of(folder: Path, split: str) -> Record:
    if not (folder / COSTS).is_file() or not (folder / split).is_dir():
        raise UserError(
            f"{folder} is no folder of records: it should hold {COSTS}, validation and test, as record/ID of a study"
        )
    return Record.open(folder / split)


def search_records(files: RecordFiles | CascadeFiles, settings: SearchRequest, out: Path) -> list[dict[str, Any]]:
    """Searches, writes `configurations.json` and `operating_points.csv` into `out`, and prints a table. Returns the
    entries of the former: one per accuracy weight, then one per budget, then the certified one.

    Raises UserError for what cannot be read, searched or attained; then nothing is written.
    """
    if not settings.accuracy_weights and not settings.budgets and settings.risk is None:
        raise UserError("nothing is asked for; give accuracy weights, a budget or a risk")
    problems, times = files.read()
    started = time.perf_counter()
    driver = SearchDriver(problems, settings, times)
    seconds = time.perf_counter() - started
    weights = driver.weights()
    found = [*weights, *(_attained(entry) for entry in driver.budgets())]
    if settings.risk is not None:
        found.append(driver.risk(problems[SEARCHED], problems[JUDGED]))
    entries = [_entry_json(driver, entry) for entry in found]
    write_json(out / "configurations.json", entries)
    source = "cascade" if isinstance(files, CascadeFiles) else "search"
    _write_points(out / "operating_points.csv", driver, found, source)

    print("\n".join(_table(entries, "MACs" if times is None else "time")))
    if weights:
        print(f"{counted(len(weights), 'weight')} in {seconds:.3g} s, {1000 * seconds / len(weights):.3g} ms each")
    print(f"written to {out}")
    return entries


def weights_of(given: str | Sequence[float] | None) -> list[float]:
    """The accuracy weights in a list or LO:HI:STEP; none for None. Raises UserError for anything else."""
    if given is None:
        return []
    try:
        return parse_weights(given if isinstance(given, str) else list(given))
    except ValueError as error:
        raise UserError(f"accuracy weights are {given!r}, but {error}") from error


def _attained(entry: SearchEntry | Unattainable) -> SearchEntry:
    if isinstance(entry, Unattainable):
        raise entry
    return entry


def _entry_json(driver: SearchDriver, entry: SearchEntry) -> dict[str, Any]:
    """The entry as `configurations.json` holds it, with its figures on both records.

    `objective` is of the cost searched, null without a weight and where it is undefined on a record;
    `relative_latency` is there only if time was searched.
    """
    content: dict[str, Any] = {"accuracy_weight": entry.accuracy_weight, "exits": entry.configuration.to_json()}
    for split, point in entry.points.items():
        content[split] = {"relative_macs": point.relative_macs, "accuracy": point.accuracy}
        if entry.relative_latency is not None:
            content[split]["relative_latency"] = entry.relative_latency[split]
        content[split]["objective"] = _objective(driver, entry, split)
    return content if entry.asked is None else {**content, "budget": entry.asked}


def _objective(driver: SearchDriver, entry: SearchEntry, split: str) -> float | None:
    if entry.accuracy_weight is None:
        return None
    try:
        return driver.objective(split, entry.configuration, entry.accuracy_weight)
    except UserError:
        return None


def _write_points(path: Path, driver: SearchDriver, found: Sequence[SearchEntry], source: str) -> None:
    """Writes one row per entry and record, the backbone (of a cascade its last network) first; the front is that of the
    record that was searched.
    """
    backbone = driver.entry(Configuration(((-1, 1.0),) * len(driver.searched.costs.positions)))
    entries = [backbone, *found]
    searched = [entry.points[SEARCHED] for entry in entries]
    front = pareto_front([point.accuracy for point in searched], [point.macs for point in searched])
    rows = [
        ReportRow(
            source="backbone" if entry is backbone else source,
            method="" if entry is backbone else driver.settings.method,
            seed=None,
            ce_ic_tradeoff=None,
            accuracy_weight=entry.accuracy_weight,
            split=split,
            accuracy=point.accuracy,
            macs=point.macs,
            relative_macs=point.relative_macs,
            exit_fractions=point.exit_fractions,
            on_front=bool(on_front),
            configuration=json.dumps(entry.configuration.to_json()),
            budget="" if entry.asked is None else json.dumps(entry.asked),
        )
        for entry, on_front in zip(entries, front, strict=True)
        for split, point in entry.points.items()
    ]
    write_csv(path, rows, sort=False)


def _table(entries: Iterable[Mapping[str, Any]], cost: str) -> list[str]:
    """The entries as lines of text, costs and accuracies in percent."""
    lines = [
        f"{'':34}{'train':>9}{'':>9}{'val':>9}",
        f"{'asked for':34}{cost:>9}{'accuracy':>9}{cost:>9}{'accuracy':>9}",
    ]
    for entry in entries:
        asked = f"accuracy weight {entry['accuracy_weight']:g}" if "budget" not in entry else _asked(entry["budget"])
        figures = [
            f"{100 * figure:8.2f}%"
            for split in (SEARCHED, JUDGED)
            for figure in (
                entry[split].get("relative_latency", entry[split]["relative_macs"]),
                entry[split]["accuracy"],
            )
        ]
        lines.append(f"{asked:34}{''.join(figures)}")
    return lines


def _asked(budget: Mapping[str, Any]) -> str:
    if "risk" in budget:
        return f"risk {budget['risk']:g} at confidence {budget['confidence']:g}"
    ((kind, value),) = budget.items()
    return f"{kind.replace('_', ' ')} {value:g}"
