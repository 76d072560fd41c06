"""Parts of a module's graph as functions that read its weights where they are, and as JSON.

A part takes the state at its beginning (the images, for the first) and returns the state at its end.
"""

import dataclasses
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dynexit.models.cut.graph import SIZE, Exported

Part = Callable[[Any, Tensor], Tensor]
_NUMBERS = {  # of the batch's size
    name: getattr(operator, name) for name in ("add", "floordiv", "getitem", "mod", "mul", "neg", "sub", "truediv")
}
_FILES = {"from_file"}  # the operations of aten that open files
_PATH = re.compile(r"(model|constants)(\.(?!__)\w+)+")


class PartError(ValueError):
    """A description of parts that is not one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The parts of one module, which do not depend on its weights. Copies share them."""

    graphs: tuple[fx.Graph, ...]
    constants: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_functions", [_compile(graph) for graph in self.graphs])

    def __deepcopy__(self, memo: object) -> "Parts":
        return self

    @classmethod
    def of(cls, exported: Exported, ends: Sequence[int]) -> "Parts":
        """Returns the parts between the operations with these rising indices, and the one from the last to the end."""
        bounds = [-1, *ends, len(exported.nodes) - 1]
        graphs = tuple(_part(exported, a, b) for a, b in itertools.pairwise(bounds))
        return cls(graphs, exported.constants)

    def bind(self, model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
        """Returns the parts as functions that read the weights of `model` each time."""
        owner = SimpleNamespace(model=model, constants=SimpleNamespace(**self.constants))
        functions: list[Part] = vars(self)["_functions"]
        return [_Bound(function, owner) for function in functions]

    def weights(self) -> list[list[str]]:
        """Returns by part the names of the weights and buffers that it reads."""
        return [
            [str(node.target).removeprefix("model.") for node in graph.nodes if _is_weight(node)]
            for graph in self.graphs
        ]

    @property
    def are_portable(self) -> bool:
        """Whether they can be written as JSON: all operations are torch's own."""
        try:
            self.to_json()
        except PartError:
            return False
        return True

    def to_json(self) -> list[Any]:
        """Returns the parts as JSON, without the constants. Raises PartError for operations that are not torch's."""
        return [[_step(node) for node in graph.nodes] for graph in self.graphs]

    @classmethod
    def from_json(cls, content: Any, constants: Mapping[str, Tensor]) -> "Parts":
        """Returns the parts that `to_json` wrote. Raises PartError for anything else; runs nothing."""
        try:
            return cls(tuple(_graph(steps) for steps in content), constants)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise PartError(f"{type(error).__name__}: {error}") from error


class _Bound:
    """A part with its owner. A class, since a copy of a `partial` would not share the owner."""

    def __init__(self, function: Part, owner: SimpleNamespace) -> None:
        self.function, self.owner = function, owner

    def __call__(self, h: Tensor) -> Tensor:
        return self.function(self.owner, h)


def _is_weight(node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).startswith("model.")


def _compile(graph: fx.Graph) -> Part:
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(code.src, namespace)  # fx's own text of a graph whose operations and names were checked
    function: Part = namespace["forward"]
    return function


def _part(exported: Exported, start: int, stop: int) -> fx.Graph:
    """The operations after `start` up to `stop`, as a graph of the state at `start`."""
    graph = fx.Graph()
    h = graph.placeholder("h")
    nodes = exported.nodes[start + 1 : stop + 1]
    source = exported.image if start < 0 else exported.nodes[start]
    if _is_changed(source, nodes):  # in place: the caller may still need it
        h = graph.call_function(torch.ops.aten.clone.default, (h,))
    made: dict[fx.Node, fx.Node] = {source: h}
    inside, device = set(nodes), list[fx.Node]()

    def leaf(value: Any) -> Any:
        if isinstance(value, torch.device):  # that of the state, wherever the module was exported
            if not device:
                device.append(graph.call_function(getattr, (h, "device")))
            return device[0]
        return get(value) if isinstance(value, fx.Node) else value

    def get(node: fx.Node) -> fx.Node:
        if node not in made:
            made[node] = make(node)
        return made[node]

    def make(node: fx.Node) -> fx.Node:
        if node in exported.sources:
            weight = graph.get_attr(exported.sources[node])
            if exported.sources[node].startswith("constants."):
                place = leaf(torch.device("cpu"))
                weight = graph.call_function(torch.ops.aten.to.device, (weight, place, weight_type(node)))
            return weight
        if node.target is SIZE and node.args[0] not in inside:
            return size_of(node)
        args: Any = fx.node.map_aggregate(node.args, leaf)
        kwargs: Any = fx.node.map_aggregate(node.kwargs, leaf)
        # attention leaves other strides on other devices and versions of torch, and a view may fail there
        target = torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target
        return graph.create_node("call_function", target, args, kwargs, name=node.name)

    def weight_type(node: fx.Node) -> torch.dtype:
        return exported.constants[exported.sources[node].removeprefix("constants.")].dtype

    def size_of(node: fx.Node) -> fx.Node:
        """The number of images, times the constant that an axis holds of it."""
        size: Any = node.meta["val"].node.expr
        times = size.subs(dict.fromkeys(size.free_symbols, 1))
        number = graph.call_function(SIZE, (h, 0))
        return number if times == 1 else graph.call_function(operator.mul, (number, int(times)))

    for node in nodes:
        get(node)
    last = exported.logits if stop == len(exported.nodes) - 1 else exported.nodes[stop]
    graph.output(get(last))
    return graph


def _is_changed(source: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    """Whether an operation changes the source in place, or what shares its memory."""
    shared = {source}
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not node.args or node.args[0] not in shared:
            continue
        first = schema.arguments[0].alias_info
        if first is not None and first.is_write:
            return True
        if first is not None or "dropout" in schema.name:  # which returns its input where it does nothing
            shared.add(node)
    return False


def _step(node: fx.Node) -> list[Any]:
    """[name, operation, args, kwargs]."""
    if node.op == "placeholder":
        return [node.name, "state", [], {}]
    if node.op == "get_attr":
        return [node.name, "weight", [node.target], {}]
    if node.op == "output":
        return [node.name, "output", [_encode(node.args[0])], {}]
    if node.target is getattr:
        return [node.name, "device", [_encode(node.args[0])], {}]
    kwargs = {key: _encode(value) for key, value in node.kwargs.items()}
    return [node.name, _operation_name(node.target), [_encode(arg) for arg in node.args], kwargs]


def _operation_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)  # aten.conv2d.default
    name = getattr(target, "__name__", "")
    if _NUMBERS.get(name) is not target:
        raise PartError(f"{target} is no operation of torch's own")
    return str(name)


_WORDS = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if type(value) in _WORDS:
        return {_WORDS[type(value)]: str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PartError(f"{value!r} cannot be written as JSON")


def _graph(steps: Any) -> fx.Graph:
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for name, operation, args, kwargs in steps:
        if not re.fullmatch(r"\w+", name):
            raise PartError(f"{name!r} is no name")
        values = tuple(_decode(arg, made) for arg in args)
        if operation == "state":
            made[name] = graph.placeholder("h")
        elif operation == "weight":
            if not _PATH.fullmatch(args[0]):
                raise PartError(f"{args[0]!r} is no weight")
            made[name] = graph.get_attr(args[0])
        elif operation == "output":
            graph.output(*values)
        elif operation == "device":
            made[name] = graph.call_function(getattr, (*values, "device"))
        else:
            named = {key: _decode(value, made) for key, value in kwargs.items()}
            if not all(re.fullmatch(r"\w+", key) for key in named):
                raise PartError(f"{list(named)} are no names")
            made[name] = graph.create_node("call_function", _operation(operation), values, named, name=name)
    return graph


def _operation(name: str) -> Any:
    if name in _NUMBERS:
        return _NUMBERS[name]
    match = re.fullmatch(r"aten\.(\w+)\.(\w+)", name)
    if match is None or match[1] in _FILES:
        raise PartError(f"{name!r} is no operation of torch's own")
    found = getattr(getattr(torch.ops.aten, match[1]), match[2])
    if not isinstance(found, torch._ops.OpOverload):
        raise PartError(f"{name!r} is no operation of torch's own")
    return found


def _decode(value: Any, made: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return made[content]
    if kind == "float":
        return float(content)
    found = getattr(torch, str(content))
    if kind not in _WORDS.values() or _WORDS.get(type(found)) != kind:
        raise PartError(f"{value!r} is no {kind}")
    return found
