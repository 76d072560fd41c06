"""Cards for those who deploy: a budget, the best point within it, and the commands that save and run that point."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dynexit.report.judged.front import FrontEntry
from dynexit.search.operating_points import ReportRow

_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
_DROPS = (0.0, 0.005, 0.01, 0.02)
SAVE, PREDICT, INFER = "save it as a model folder", "classify images with it", "measure it on the test split"


class HasRows(Protocol):
    """An operating point on both splits."""

    @property
    def validation(self) -> ReportRow: ...

    @property
    def test(self) -> ReportRow: ...


@dataclass(frozen=True)
class Card:
    """A budget in words, the point chosen for it on validation, and shell commands by what they do."""

    budget: str
    label: str
    entry: FrontEntry
    commands: dict[str, str]


def cards(
    entries: Sequence[FrontEntry], shares: Sequence[float], labels: dict[str, str], study_dir: Path
) -> list[Card]:
    """A card for each budget of relative MACs (`shares`, by default some) and for some losses of accuracy.

    `entries` by rising cost on validation, `labels` the points' by their ids. Budgets that buy the same point share a
    card; those that only the whole backbone keeps have none.
    """
    front = [one for one in entries if one.validation.on_front and one.validation.source != "backbone"]
    base = max((one.validation.accuracy for one in entries if one.validation.source == "backbone"), default=None)
    found: dict[int, tuple[list[str], FrontEntry]] = {}
    for words, entry in (*_by_share(front, shares or _SHARES), *_by_drop(front, base)):
        found.setdefault(id(entry), ([], entry))[0].append(words)
    chosen = sorted(found.values(), key=lambda item: item[1].validation.relative_macs)
    costs = [one.validation.relative_macs for one in front]
    made = []
    for budgets, entry in chosen:
        share = budget_text_of(entry.validation.relative_macs, costs)
        label = labels.get(entry.test.point_id, "")
        made.append(Card(", ".join(budgets), label, entry, commands(entry, share, study_dir)))
    return made


def _by_share(front: Sequence[FrontEntry], shares: Sequence[float]) -> Iterator[tuple[str, FrontEntry]]:
    for share in shares:
        within = [one for one in front if one.validation.relative_macs <= share]
        if within:
            yield f"at most {100 * share:.6g} % of the MACs", within[-1]


def _by_drop(front: Sequence[FrontEntry], base: float | None) -> Iterator[tuple[str, FrontEntry]]:
    for drop in _DROPS if base is not None else ():
        kept = [one for one in front if base is not None and one.validation.accuracy >= base - drop]
        if kept:
            yield (
                f"at most {100 * drop:g} point{'s' if drop != 0.01 else ''} lost" if drop else "no accuracy lost",
                kept[0],
            )


def commands(chosen: HasRows, share: str, study_dir: Path) -> dict[str, str]:
    """The commands that save, run and measure a point of the front within a share of the MACs, by what they do."""
    share_option = f"--relative-macs {share}"
    study, folder = shlex.quote(str(study_dir)), shlex.quote(f"{study_dir.name}-{share}")
    return {
        SAVE: f"dynexit save {study} {folder} --point {chosen.test.point_id} {share_option}",
        PREDICT: f"dynexit predict {folder} IMAGE_OR_FOLDER {share_option}",
        INFER: f"dynexit infer {study} infer.relative_macs={share}",
    }


def commands_by_time(chosen: HasRows, limit: str, batch_size: int, study_dir: Path) -> dict[str, str]:
    """The same for a point of the front by the time of a batch, within a limit in milliseconds."""
    study, folder = shlex.quote(str(study_dir)), shlex.quote(f"{study_dir.name}-{limit}ms")
    option = f"--latency-ms {limit} --batch-size {batch_size}"
    return {
        SAVE: f"dynexit save {study} {folder} --point {chosen.test.point_id} {option}",
        PREDICT: f"dynexit predict {folder} IMAGE_OR_FOLDER --point macs-{chosen.validation.relative_macs:.3f}",
        INFER: f"dynexit infer {study} infer.latency_ms={limit} infer.latency_batch_size={batch_size}",
    }


def commands_by_risk(identity: str, risk: float, study_dir: Path) -> dict[str, str]:
    """The same for the certified point of one search; its folder holds the front of that search too."""
    study, folder = shlex.quote(str(study_dir)), shlex.quote(f"{study_dir.name}-{identity}")
    return {
        SAVE: f"dynexit save {study} {folder} --point {identity}",
        PREDICT: f"dynexit predict {folder} IMAGE_OR_FOLDER --risk {risk:.15g}",
        INFER: f"dynexit infer {study} infer.risk={risk:.15g}",
    }


def budget_text_of(cost: float, costs: Sequence[float]) -> str:
    """The shortest number within which the point of this cost is the dearest of `costs`, rounded up."""
    dearer = min((one for one in costs if one > cost), default=math.inf)
    for decimals in range(2, 16):
        scale = 10**decimals
        budget = math.ceil(cost * scale) / scale
        if cost <= budget < dearer:
            return f"{budget:.{decimals}f}"
    return repr(cost)
