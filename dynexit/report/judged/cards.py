"""Cards for those who deploy: a budget, the best point within it, and the commands that save and run that point."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynexit.report.judged.front import FrontEntry
from dynexit.report.table import percent

_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.75)
_DROPS = (0.0, 0.005, 0.01, 0.02)


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
    return [
        Card(", ".join(words), labels.get(entry.test.point_id, ""), entry, _commands(entry, front, study_dir))
        for words, entry in chosen
    ]


def _by_share(front: Sequence[FrontEntry], shares: Sequence[float]) -> Iterator[tuple[str, FrontEntry]]:
    for share in shares:
        within = [one for one in front if one.validation.relative_macs <= share]
        if within:
            yield f"at most {percent(share, 0)} of the MACs", within[-1]


def _by_drop(front: Sequence[FrontEntry], base: float | None) -> Iterator[tuple[str, FrontEntry]]:
    for drop in _DROPS if base is not None else ():
        kept = [one for one in front if base is not None and one.validation.accuracy >= base - drop]
        if kept:
            yield f"at most {100 * drop:g} points lost" if drop else "no accuracy lost", kept[0]


def _commands(entry: FrontEntry, front: Sequence[FrontEntry], study_dir: Path) -> dict[str, str]:
    share, folder = _share(entry, front), shlex.quote(str(study_dir))
    share_option = f"--relative-macs {share}"
    saved = shlex.quote(f"{study_dir.name}-{share}")
    return {
        "save it as a model folder": f"dynexit save {folder} {saved} --point {entry.test.point_id} {share_option}",
        "classify images with it": f"dynexit predict {saved} IMAGE_OR_FOLDER {share_option}",
        "measure it on the test split": f"dynexit infer {folder} infer.relative_macs={share}",
    }


def _share(entry: FrontEntry, front: Sequence[FrontEntry]) -> str:
    """The shortest share of the MACs within which the point is the best, rounded up."""
    cost = entry.validation.relative_macs
    dearer = [one.validation.relative_macs for one in front if one.validation.relative_macs > cost]
    for decimals in range(2, 16):
        scale = 10**decimals
        share = math.ceil(cost * scale) / scale
        if cost <= share < min(dearer, default=math.inf):
            return f"{share:.{decimals}f}"
    return repr(cost)
