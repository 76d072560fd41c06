"""What leaving at each exit costs, in multiply-accumulates (MACs) per sample.

Shapes: P positions, H head types, L = P + 1 exits when every position has one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_MACS = 10**15
"""More than any model has; beyond it sums of MACs would lose digits."""
STEM = -2
"""The position of an exit before the first block; -1 is the backbone's own classifier in records."""


def place_name(position: int) -> str:
    """The position in words: `block 3`, or `the stem`."""
    return "the stem" if position == STEM else f"block {position}"


@dataclass(frozen=True)
class ExitCosts:
    """MACs of a backbone cut into blocks and of everything that can be attached to it; all counts are per sample.

    Raises ValueError where lengths disagree, head types are missing or duplicated, a count is not an integer from 0 to
    MOST_MACS, a position is neither that nor STEM, positions do not increase, or backbone_macs decrease or exceed
    full_macs.
    """

    full_macs: int
    """The whole backbone with its own classifier and no exits."""
    positions: tuple[int, ...]
    """(P,) indices of the blocks after which an exit may sit; STEM is before the first block."""
    backbone_macs: tuple[int, ...]
    """(P,) the backbone alone from the input up to each position."""
    head_types: tuple[str, ...]
    """(H,) names of the exit heads."""
    head_macs: tuple[tuple[int, ...], ...]
    """(P, H) one exit head."""
    gate_macs: tuple[int, ...]
    """(P,) the gate at each position."""
    reader_macs: tuple[int, ...] = ()
    """(P,) reading the features at each position that all later exits read too, or () for none.

    Every sample that passes the position pays it, also where its exit is disabled, if a later exit is enabled.
    """

    def __post_init__(self) -> None:
        num_positions, num_types = len(self.positions), len(self.head_types)
        if len(set(self.head_types)) < max(num_types, 1):
            raise ValueError(f"head types are distinct names, at least one, got {list(self.head_types)}")
        for name in ("backbone_macs", "head_macs", "gate_macs", *(["reader_macs"] if self.reader_macs else [])):
            if len(getattr(self, name)) != num_positions:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, but there are {num_positions} positions"
                )
        for row in self.head_macs:
            if len(row) != num_types:
                raise ValueError(f"head_macs has a row of {len(row)} entries, but there are {num_types} head types")
        heads = tuple(macs for row in self.head_macs for macs in row)
        places = self.positions[1:] if self.positions[:1] == (STEM,) else self.positions
        for count in (self.full_macs, *places, *self.backbone_macs, *heads, *self.gate_macs, *self.reader_macs):
            if type(count) is not int or not 0 <= count <= MOST_MACS:
                raise ValueError(f"positions and MACs are integers from 0 to {MOST_MACS:.0e}, got {count!r}")
        if any(a >= b for a, b in pairwise(self.positions)):
            raise ValueError(f"positions must increase, got {list(self.positions)}")
        path = (*self.backbone_macs, self.full_macs)
        if any(a > b for a, b in pairwise(path)):
            raise ValueError(f"MACs must not decrease with depth, got {list(path)} (the last is the full backbone)")

    def macs_L(self, head_types: Sequence[str] | None = None, gates: bool = True) -> NDArray[np.int64]:  # noqa: N802
        """MACs (L,) of leaving at each exit when every position has one head and, with `gates`, a gate.

        The backbone up to there plus every head and gate passed, its own included; last the full backbone plus all of
        them. head_types names the head at each position, and may be left out where there is only one type.
        Raises ValueError on an unknown type, a wrong number of them, or none given where there are several.
        """
        if head_types is None:
            if len(self.head_types) != 1:
                raise ValueError(f"there are {len(self.head_types)} head types; say which one sits at each position")
            head_types = self.head_types * len(self.positions)
        if len(head_types) != len(self.positions):
            raise ValueError(f"{len(head_types)} head types were given for {len(self.positions)} positions")
        unknown = [name for name in head_types if name not in self.head_types]
        if unknown:
            raise ValueError(f"head type {unknown[0]!r} is unknown; it is one of {', '.join(self.head_types)}")
        chosen = [row[self.head_types.index(name)] for row, name in zip(self.head_macs, head_types, strict=True)]
        extra_P = np.array(chosen, dtype=np.int64) + (np.array(self.gate_macs, dtype=np.int64) if gates else 0)
        return self.path_macs(extra_P)

    def relative_cost_L(self) -> NDArray[np.float64]:  # noqa: N802
        """macs_L() over its last entry, (L,) in [0, 1], the last 1: the cost that JEI-DNN's gate targets weigh.

        Not the relative MACs of an operating point, which are over the bare backbone.
        """
        macs_L = self.macs_L()
        return np.asarray(macs_L / macs_L[-1])

    def path_macs(self, extra_P: NDArray[np.int64], last: int | None = None) -> NDArray[np.int64]:
        """MACs (P+1,) of stopping at each position, last the end, when passing position p adds extra_P[p].

        Features are read up to position number `last`, that of the last enabled exit: -1 for none, None for all.
        """
        path = np.array((*self.backbone_macs, self.full_macs), dtype=np.int64)
        read_P = self.read_macs()
        read_P[len(read_P) if last is None else last + 1 :] = read_P[last] if last is not None and last >= 0 else 0
        path[:-1] += np.cumsum(extra_P) + read_P
        path[-1] += extra_P.sum() + (read_P[-1] if len(read_P) else 0)
        return path

    def read_macs(self) -> NDArray[np.int64]:
        """MACs (P,) of reading all features up to and with each position."""
        return np.cumsum(self.reader_macs or (0,) * len(self.positions), dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON knows them (lists, integers, strings), no `reader_macs` if none; from_json inverts it."""
        return {name: _lists(value) for name, value in asdict(self).items() if name != "reader_macs" or value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ExitCosts":
        """The costs that to_json wrote. Raises ValueError on missing or unknown keys and on what the class refuses."""
        names = {field.name for field in fields(cls)} - {"reader_macs"}
        if set(data) - {"reader_macs"} != names:
            raise ValueError(f"exit costs need the keys {sorted(names)}, got {sorted(data)}")
        return cls(**{name: _tuples(value) for name, value in data.items()})


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
