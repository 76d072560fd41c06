"""DyCE's `macs_info` JSON, the costs that its search tool reads (Wang et al., DyCE, arXiv 2403.01695)."""

from collections.abc import Mapping
from typing import Any

from dynexit.core.cost import ExitCosts


def dyce_macs_info(report: Mapping[str, Any]) -> dict[str, Any]:
    """`macs_report`'s result as DyCE's search tool reads it (`macs_info`): the final exit is one more position."""
    full = report["full_macs"]
    return {
        "head": [{"name": t, "macs": [*macs, 0], "params": []} for t, macs in report["head_macs"].items()],
        "backbone": {"name": report["backbone"], "macs": [*report["backbone_macs"], full], "ori_macs": full},
    }


def costs_from_macs_info(content: Mapping[str, Any]) -> ExitCosts:
    """The costs in DyCE's `macs_info`, without gates. Its `shared` MACs are added to the backbone's.

    Positions have no block indices there: they count from 0. Raises ValueError, TypeError, KeyError or IndexError for
    other content.
    """
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
