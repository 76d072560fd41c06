"""A module as a graph of torch's own operations, and what is alive between two of them.

Source: torch.export. A value counts as alive if it depends on the images; what depends on their number alone (such as
an expanded class token) can be computed again anywhere.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from dynexit.errors import UserError

SIZE = torch.ops.aten.sym_size.int
_CHECKS = ("_assert", "sym_constrain")  # in the names of operations that only check
_REASON_LENGTH = 200


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """The operations of a module. `nodes` depend on the images, in the order in which they run; the last is `logits`.

    `sources` maps the graph's other inputs to where they come from: `model.NAME` is a weight or buffer, `constants.N`
    a tensor that the module makes by itself.
    """

    image: fx.Node
    nodes: list[fx.Node]
    logits: fx.Node
    sources: dict[fx.Node, str]
    constants: dict[str, Tensor]

    @classmethod
    def of(cls, program: ExportedProgram) -> "Exported":
        """Returns that of an exported program of one image tensor and one tensor of logits."""
        graph, by_name = program.graph, {node.name: node for node in program.graph.nodes}
        sources: dict[fx.Node, str] = {}
        constants: dict[str, Tensor] = {}
        for spec in program.graph_signature.input_specs:
            node = by_name[spec.arg.name]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                sources[node] = f"model.{spec.target}"
            elif spec.kind is InputKind.CONSTANT_TENSOR:
                sources[node] = f"constants.c{len(constants)}"
                constants[f"c{len(constants)}"] = program.constants[str(spec.target)].detach().clone()
            elif spec.kind is InputKind.USER_INPUT:
                image = node
        logits = next(node for node in graph.nodes if node.op == "output").args[0]
        logits = logits[-1] if isinstance(logits, (tuple, list)) else logits
        depends = {image}
        for node in graph.nodes:
            if node.op == "call_function" and node.target is not SIZE and depends.intersection(node.all_input_nodes):
                depends.add(node)
        nodes = [node for node in graph.nodes if node in depends and node.op == "call_function" and not _is_check(node)]
        return cls(image, nodes, logits, sources, constants)

    @property
    def names(self) -> dict[str, int]:
        """By module name (as `layer1.0`) the index of the last operation in it."""
        return {name: k for k, node in enumerate(self.nodes) for name in module_names(node)}

    @property
    def first(self) -> dict[str, int]:
        """By module name the index of the first operation in it."""
        found: dict[str, int] = {}
        for k, node in enumerate(self.nodes):
            for name in module_names(node):
                found.setdefault(name, k)
        return found

    def alive(self) -> list[list[fx.Node]]:
        """For every operation the values that later ones (or the caller) read."""
        last = {self.logits: len(self.nodes)}
        for k, node in enumerate(self.nodes):
            for read in node.all_input_nodes:
                last[read] = max(k, last.get(read, 0))
        found, now = [], [self.image]
        for k, node in enumerate(self.nodes):
            now = [value for value in (*now, node) if last.get(value, -1) > k]
            found.append(now)
        return found

    def fault(self, k: int, alive: list[fx.Node]) -> str:
        """Why nothing can stop after operation k, where `alive` is what is alive there; '' if it can."""
        if len(alive) != 1:
            crossing = ", ".join(describe(node) for node in alive[:4]) + (", ..." if len(alive) > 4 else "")
            return f"{len(alive)} tensors cross it ({crossing})"
        value = alive[0].meta.get("val")
        if alive[0] is not self.nodes[k] or alive[0] is self.logits:
            return f"what crosses it ({describe(alive[0])}) is its input or the logits"
        batch = self.image.meta["val"].shape[0]
        if not isinstance(value, Tensor) or not value.is_floating_point() or not 2 <= value.dim() <= 4:
            return f"what crosses it ({describe(alive[0])}) is no map, no tokens and no vector"
        if not _same(value.shape[0], batch) or any(isinstance(size, torch.SymInt) for size in value.shape[1:]):
            return f"the first axis of what crosses it ({describe(alive[0])}) is not the batch"
        return ""


def module_names(node: fx.Node) -> list[str]:
    """Returns the names of the modules that an operation is in, outermost first, without the whole."""
    return [name for name, _ in (node.meta.get("nn_module_stack") or {}).values() if name]


def module_classes(nodes: list[fx.Node]) -> Mapping[str, str]:
    """Returns the class of every module that is in some operation's stack, by the module's name."""
    stacks = [(node.meta.get("nn_module_stack") or {}).values() for node in nodes]
    return {name: str(kind) for stack in stacks for name, kind in stack if name}


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Returns the shape of a value for one image, without the batch."""
    return tuple(int(size) for size in node.meta["val"].shape[1:])


def describe(node: fx.Node) -> str:
    """Returns a value in words: the module it comes from, the operation and the shape without the batch."""
    names, value = module_names(node), node.meta.get("val")
    shape = "x".join(str(size) for size in value.shape[1:]) if isinstance(value, Tensor) else type(value).__name__
    where = names[-1] if names else "the module itself"
    return f"{node.name} of {where}, {shape}" if node.op == "call_function" else f"the images, {shape}"


def _is_check(node: fx.Node) -> bool:
    return any(part in str(node.target) for part in _CHECKS)


def _same(size: object, batch: object) -> bool:
    if not (isinstance(size, torch.SymInt) and isinstance(batch, torch.SymInt)):
        return False
    return bool(size.node.expr == batch.node.expr)


def export(model: nn.Module, images: Tensor, name: str) -> Exported:
    """Returns the operations of the module for any number of images of that shape; `images` are at least two.

    Raises UserError with torch's reason if it cannot be exported.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own deprecations
        try:
            program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))
        except Exception as error:  # torch raises many kinds
            raise UserError(_cannot(name, _reason(error))) from error
    found = Exported.of(program)
    if wrong := next(_unsupported(found), None):
        raise UserError(_cannot(name, f"it uses {wrong}"))
    return found


def _unsupported(exported: Exported) -> Iterator[str]:
    for node in exported.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) and getattr(node.target, "__module__", "") != "_operator":
            yield f"{node.target}, which has parts of its own"


def _cannot(name: str, reason: str) -> str:
    return (
        f"{name} cannot be exported by torch ({reason}); change it, or give its parts: "
        "dynexit.cut(model, example, stages=[stem, block1, ...], tail=head)"
    )


def _reason(error: Exception) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    text = next((line for line in lines if line), type(error).__name__)
    return text if len(text) <= _REASON_LENGTH else text[:_REASON_LENGTH].rsplit(" ", 1)[0] + " ..."
