"""Records and costs as files, in this project's formats or DyCE's (Wang et al., DyCE, arXiv 2403.01695)."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynexit.core.cost import ExitCosts
from dynexit.dyce.npz import read_npz
from dynexit.errors import UserError
from dynexit.record.shards import Record
from dynexit.search.problem import Problem


def read_json_file(path: Path, what: str) -> Any:
    """The JSON that a user gave; UserError, naming the file, where it is missing or is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give {what}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); give {what}") from error


def parse_costs(content: Any, source: str) -> ExitCosts:
    """ExitCosts from their own JSON or from DyCE's `macs_info`, told apart by their keys.

    DyCE's positions have no block indices: they count from 0. Its `shared` MACs are added to the backbone's. `content`
    is left as it is; `source` names it in errors. Raises UserError for anything else and for what ExitCosts refuses, as
    MACs that decrease.
    """
    try:
        if isinstance(content, Mapping) and {"head", "backbone"} <= set(content):
            return _dyce_costs(content)
        if isinstance(content, Mapping) and "head_macs" in content:
            return ExitCosts.from_json(content)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        if isinstance(error, TypeError | IndexError):
            reason = f"its lists do not fit together or are none ({error})"
        raise UserError(f"{source}: {reason}; give the MACs of the model that made the records") from error
    raise UserError(
        f"{source} holds neither the costs that `record` writes (head_macs, backbone_macs, ...) nor DyCE's macs_info "
        "(head, backbone); give one of them"
    )


def _dyce_costs(content: Mapping[str, Any]) -> ExitCosts:
    path = [_whole(macs) for macs in content["backbone"]["macs"]]
    for place, shared in enumerate(content["shared"]["macs"] if "shared" in content else []):
        path[place] += _whole(shared)
    heads = [[_whole(macs) for macs in head["macs"]] for head in content["head"]]
    num_positions = len(path) - 1
    for head, macs in zip(content["head"], heads, strict=True):
        if len(macs) not in (num_positions, num_positions + 1):
            raise ValueError(
                f"head {head['name']!r} has {len(macs)} MACs, the backbone {len(path)} (the last is the end)"
            )
    return ExitCosts(
        full_macs=path[-1],
        positions=tuple(range(num_positions)),
        backbone_macs=tuple(path[:-1]),
        head_types=tuple(str(head["name"]) for head in content["head"]),
        head_macs=tuple(tuple(macs[position] for macs in heads) for position in range(num_positions)),
        gate_macs=(0,) * num_positions,
    )


def _whole(macs: Any) -> int:
    if isinstance(macs, bool) or not isinstance(macs, int | float) or not float(macs).is_integer():
        raise ValueError(f"MACs are whole numbers, got {macs!r}")
    return int(macs)


def _open_record(path: Path | str, costs: ExitCosts) -> Record:
    """A record in shards (a directory) or in DyCE's `.npz`, whose exits are those of the costs."""
    is_npz = Path(path).suffix == ".npz"
    return read_npz(path, costs.head_types, len(costs.positions)) if is_npz else Record.open(path)


def read_problems(
    paths: Mapping[str, Path | str], costs: ExitCosts, confidence: str = "max_probability"
) -> dict[str, Problem]:
    """The problem of every record, by name. Errors name the record they are about.

    DyCE's costs and `.npz` count positions from 0 instead of naming blocks; they fit the other's as many.
    """
    problems = {}
    for name, path in paths.items():
        try:
            record = _open_record(path, costs)
            counted = tuple(range(len(costs.positions)))
            unnamed = costs.positions == counted or (Path(path).suffix == ".npz" and record.positions == counted)
            if unnamed and len(record.positions) == len(counted):
                problems[name] = Problem.from_record(record, replace(costs, positions=record.positions), confidence)
            else:
                problems[name] = Problem.from_record(record, costs, confidence)
        except UserError as error:
            text = str(error)
            raise UserError(text if str(path) in text else f"{path}: {text}") from error
    return problems
