"""Records and costs as files, in this project's formats or DyCE's (Wang et al., DyCE, arXiv 2403.01695)."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynexit.core.cost import ExitCosts
from dynexit.dyce.macs_info import costs_from_macs_info
from dynexit.dyce.npz import read_npz
from dynexit.errors import UserError
from dynexit.files import read_text
from dynexit.record.shards import Record
from dynexit.search.problem import Problem


def read_json_file(path: Path, what: str) -> Any:
    """The JSON that a user gave; UserError, naming the file, where it is missing or is no JSON."""
    try:
        return json.loads(read_text(Path(path)))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; give {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); give {what}") from error


def parse_costs(content: Any, source: str) -> ExitCosts:
    """ExitCosts from their own JSON or from DyCE's `macs_info`, recognised by their keys.

    `content` is left as it is; `source` names it in errors. Raises UserError for anything else and for what ExitCosts
    refuses, as MACs that decrease.
    """
    try:
        if isinstance(content, Mapping) and {"head", "backbone"} <= set(content):
            return costs_from_macs_info(content)
        if isinstance(content, Mapping) and "head_macs" in content:
            return ExitCosts.from_json(content)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        if isinstance(error, TypeError | IndexError):
            reason = f"its lists do not fit together or are none ({error})"
        raise UserError(f"{source}: {reason}; give the MACs of the model that made the records") from error
    raise UserError(
        f"{source} holds neither the costs that `record` writes (head_macs, backbone_macs, ...) nor DyCE's macs_info "
        "(head, backbone); give one of them"
    )


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
