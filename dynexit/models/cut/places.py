"""The places where a module's graph can be cut, by name, and which of them are taken by themselves."""

import collections
import dataclasses
import difflib
import itertools
from collections.abc import Sequence

from dynexit.errors import UserError
from dynexit.models.cut.graph import Exported, module_classes, module_names, shape_of

_CONTAINERS = "torch.nn.modules.container."
_BUILDING = "torch.nn.modules."  # layers; of these only a whole transformer layer is a block
_PRODUCTS = ("conv", "linear", "mm", "matmul", "attention", "einsum")


@dataclasses.dataclass(frozen=True)
class Place:
    """A place where one tensor alone is alive: the end of the modules `names`, of which `name` is shown."""

    name: str
    names: tuple[str, ...]
    index: int
    shape: tuple[int, ...]
    """Of one image's state, without the batch."""
    is_auto: bool = False


class Places:
    """The legal places of a module, in the order in which they are reached."""

    def __init__(self, exported: Exported, title: str) -> None:
        self.exported, self.title = exported, title
        self._alive, self._ends = exported.alive(), exported.names
        legal = [k for k in range(len(exported.nodes)) if not exported.fault(k, self._alive[k])]
        self.indices = legal
        by_index: dict[int, list[str]] = {k: [] for k in legal}
        for name, k in self._ends.items():
            if k in by_index:
                by_index[k].append(name)
        blocks = self._blocks(set(legal))
        found = [
            Place(next((name for name in names if name in blocks), names[0]), tuple(names), k, self._shape(k))
            for k, names in by_index.items()
            if names
        ]
        automatic = {p.index for p in found if p.name in blocks} if blocks else self._segments([p.index for p in found])
        self.all = [dataclasses.replace(place, is_auto=place.index in automatic) for place in found]

    def _shape(self, k: int) -> tuple[int, ...]:
        return shape_of(self.exported.nodes[k])

    def _blocks(self, legal: set[int]) -> set[str]:
        """The modules of classes that occur several times and all end at legal places, but those that hold others."""
        instances = collections.defaultdict(list)
        working = {name for k in self._products() for name in module_names(self.exported.nodes[k])}
        for name, kind in module_classes(self.exported.nodes).items():
            is_block = not kind.startswith(_BUILDING) or kind.startswith(f"{_BUILDING}transformer.")
            if is_block and name in working and not kind.startswith(_CONTAINERS):
                instances[kind].append(name)
        good = [names for names in instances.values() if len(names) > 1 and all(self._ends[n] in legal for n in names)]
        every = {name for names in good for name in names}
        holders = [names for names in good if any(o.startswith(f"{n}.") for n in names for o in every)]
        return {name for names in good if names not in holders for name in names}

    def _products(self) -> list[int]:
        """The operations that take MACs."""
        return [k for k, node in enumerate(self.exported.nodes) if any(w in str(node.target) for w in _PRODUCTS)]

    def _segments(self, indices: Sequence[int]) -> set[int]:
        """Where nothing repeats: the last place before each further product."""
        products = self._products()
        pairs = zip(indices, [*indices[1:], len(self.exported.nodes)], strict=True)
        return {a for a, b in pairs if any(k <= a for k in products) and any(a < k <= b for k in products)}

    def before(self, place: Place) -> int | None:
        """Returns the last operation before the place's module where one tensor alone is alive; None if none is."""
        begin = self.exported.first[place.name]
        return max((k for k in self.indices if k < begin), default=None)

    def last_after(self, index: int) -> int | None:
        """Returns the last operation after `index` where a map or tokens alone are alive; None if there is none."""
        return max((k for k in self.indices if k > index and len(self._shape(k)) > 1), default=None)

    def automatic(self) -> list[Place]:
        """Returns the ends of the blocks, or of the layers if no block repeats. Raises UserError if there is none."""
        found = [place for place in self.all if place.is_auto]
        if not found:
            raise UserError(
                f"{self.title} has no place where one tensor alone is alive, as the end of a block; give its parts: "
                "dynexit.cut(model, example, stages=[stem, block1, ...], tail=head)"
            )
        return found

    def named(self, names: Sequence[str]) -> list[Place]:
        """Returns the places at the ends of these modules, which must be in order. Raises UserError for others."""
        return self._rising([self._place(name) for name in names])

    def _place(self, name: str) -> Place:
        found = next((place for place in self.all if name in place.names), None)
        if found is not None:
            return dataclasses.replace(found, name=name)
        near = ", ".join(place.name for place in self._near(name))
        if name not in self._ends:
            raise UserError(f"{self.title} runs no module {name!r} on the images; legal places near it are {near}")
        k = self._ends[name]
        fault = self.exported.fault(k, self._alive[k])
        raise UserError(f"{name} is no place for an exit: {fault}; legal places near it are {near}")

    def _near(self, name: str) -> list[Place]:
        if name in self._ends:
            return sorted(sorted(self.all, key=lambda place: abs(place.index - self._ends[name]))[:3], key=_index)
        names = [known for place in self.all for known in place.names]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
        return [dataclasses.replace(p, name=n) for n in close for p in self.all if n in p.names]

    def _rising(self, places: list[Place]) -> list[Place]:
        for one, other in itertools.pairwise(places):
            if other.index <= one.index:
                raise UserError(
                    f"{self.title} reaches {other.name} before {one.name}, or at once; give places in rising order"
                )
        return places


def _index(place: Place) -> int:
    return place.index
