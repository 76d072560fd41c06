"""YAML text to JSON values and back. What YAML 1.1 reads as dates, octal numbers or minutes is refused or is text."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynexit.errors import UserError, shorten
from dynexit.files import read_text

REFUSED = object()  # what json_only returns for a value that it refuses
_TAG = "tag:yaml.org,2002:"
_MOST_VALUES = 100_000  # of a text with every alias written out
_MOST_LEVELS = 50  # of lists and mappings inside each other


@dataclass(frozen=True)
class _RefusedValue:
    """A value of the text that is not read, and the reason."""

    text: str
    reason: str

    def __str__(self) -> str:
        return self.text


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (1e-3 is one; 0:1:0.01 is none), no duplicate keys, and no types that JSON lacks.

    `hash_mark` is a character that replaces `#` in the text, so that it starts no comment; "" leaves comments.
    """

    hash_mark = ""
    _level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._level += 1
        if self._level > _MOST_LEVELS:
            place = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"it is nested deeper than {_MOST_LEVELS} levels", place)
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_scalar(self, node: Any) -> str:
        text = str(super().construct_scalar(node))
        return text.replace(self.hash_mark, "#") if self.hash_mark else text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            if key.tag == f"{_TAG}merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys (<<) are not supported; write the keys out", key.start_mark
                )
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key should be text", key.start_mark)
            name = self.construct_object(key)
            if name in names:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {shorten(str(name))!r}", key.start_mark
                )
            names.add(name)
        return super().construct_mapping(node, deep)


def _number(loader: _Loader, node: Any) -> int | float | _RefusedValue:
    text = loader.construct_scalar(node)
    shorter = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text)
    if shorter != text:
        return _RefusedValue(text, f"starts with a zero; write {shorter}, or put it in quotes if it is text")
    try:
        return int(text) if node.tag == f"{_TAG}int" else float(re.sub(r"\.(inf|nan)$", r"\1", text))
    except ValueError:
        return _RefusedValue(text, "is not a number, or has too many digits")


def _refused(loader: _Loader, node: Any) -> _RefusedValue:
    tag = node.tag.replace(_TAG, "!!")
    if tag == "!!timestamp":
        return _RefusedValue(loader.construct_scalar(node), "is a date in YAML; put it in quotes if it is text")
    return _RefusedValue(tag, "is not supported; write text, a number, true, false, null, a list or a mapping")


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}int", f"{_TAG}float", f"{_TAG}value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"^([-+]?([0-9]+\.[0-9]*|\.[0-9]+|([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+)|[-+]?\.inf|\.nan)$"),
    list("-+.0123456789"),
)
_Loader.yaml_constructors = {
    f"{_TAG}{name}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{name}"]
    for name in ("null", "bool", "str", "seq", "map")
}
_Loader.add_constructor(f"{_TAG}int", _number)
_Loader.add_constructor(f"{_TAG}float", _number)
_Loader.add_constructor(None, _refused)  # every other tag


def read_mapping(path: Path, what: str, hint: str, example: str, mistakes: list[str]) -> dict[str, Any]:
    """Returns the mapping in a YAML file, {} for an empty one, and adds what is wrong with its values to `mistakes`.

    Raises UserError for a file that is missing (with `hint`), cannot be read or holds no keys, as `example` is one;
    `what` it is goes into the message.
    """
    try:
        raw = json_only(parse_yaml(read_text(path)), "", mistakes)
    except FileNotFoundError:
        raise UserError(f"there is no {what} {path}; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the {what} {path} could not be read: {error}") from None
    except ValueError as error:
        raise UserError(f"the {what} {path} cannot be read as YAML: {error}") from None
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        found = "a refused value" if raw is REFUSED else type(raw).__name__
        raise UserError(f"the {what} {path} should hold keys, as `{example}`, not {found}")
    return raw


def parse_yaml(text: str, *, comments: bool = True) -> Any:
    """Returns the value that the YAML `text` holds; `json_only` finds what in it is refused.

    Without `comments` a `#` is an ordinary character. Raises ValueError with the fault and its place.
    """
    mark = "" if comments else next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
    try:
        loader = _Loader(text.replace("#", mark) if mark else text)
        loader.hash_mark = mark
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_values(node, {}) > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values once its aliases (*) are written out")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        where = error.problem_mark
        place = f" (line {where.line + 1}, column {where.column + 1})" if where else ""
        problem = str(error.problem or error.context)
        raise ValueError((problem.replace(mark, "#") if mark else problem) + place) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except KeyError as error:  # of a value with an explicit tag, as !!bool maybe
        raise ValueError(f"a value does not fit its tag: {error}") from None
    except RecursionError:
        raise ValueError("an alias (*) is inside its own anchor (&)") from None


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """The values in `node`, of an alias as many as it stands for; `known` are those of collections by identity.

    Raises RecursionError for an alias inside its own anchor.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(node)]


def json_only(value: Any, dotted: str, mistakes: list[str]) -> Any:
    """Returns `value` without what JSON cannot hold, or REFUSED; a list with a refused element is refused whole.

    Adds one mistake for each refused value, with its dotted key.
    """
    if isinstance(value, dict):
        kept = {}
        for name, item in value.items():
            place = shorten(f"{dotted}.{name}" if dotted else str(name))
            if not isinstance(name, str):
                mistakes.append(f"{place}: a key should be text; put {shorten(str(name))} in quotes")
                continue
            found = json_only(item, place, mistakes)
            if found is not REFUSED:
                kept[name] = found
        return kept
    if isinstance(value, list):
        items = [json_only(item, f"{dotted}.{i}", mistakes) for i, item in enumerate(value)]
        return REFUSED if any(item is REFUSED for item in items) else items
    reason = ""
    if isinstance(value, _RefusedValue):
        reason = value.reason
    elif isinstance(value, float) and not math.isfinite(value):
        reason = "should be a finite number"
    elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        reason, value = "holds half of a character (a surrogate); write \\U and eight digits", ascii(value)
    if not reason:
        return value
    mistakes.append(f"{dotted} = {shorten(str(value))}: {reason}")
    return REFUSED


def to_yaml(value: Any) -> str:
    """Returns a JSON value as one line of ASCII that is YAML too.

    JSON writes a character above U+FFFF as two surrogates, which YAML does not join; here it is one `\\U` escape.
    """
    return re.sub(
        r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})",
        lambda pair: f"\\U{0x10000 + (int(pair[1], 16) - 0xD800) * 0x400 + int(pair[2], 16) - 0xDC00:08X}",
        json.dumps(value),
    )
