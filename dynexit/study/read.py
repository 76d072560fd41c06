"""A study: YAML and key=value in, points with ids out. All mistakes are found before any of them is reported."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dynexit.errors import UserError, shorten
from dynexit.study.baselines import static_points
from dynexit.study.grid import Study, check_sweep, expand
from dynexit.study.schema import SECTIONS, Config
from dynexit.study.sweep.names import name_points
from dynexit.study.validation import contradictions, sentences
from dynexit.study.yaml_text import REFUSED, json_only, parse_yaml, read_mapping, to_yaml


class StudyError(UserError):
    """What is wrong with a study's keys, a line each; `config` is what is right of it, None where too little is."""

    def __init__(self, mistakes: Sequence[str], config: Config | None) -> None:
        super().__init__("\n".join(mistakes))
        self.config = config


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study in the YAML file `path` after `key.path=value` overrides, every point of it validated.

    A swept key that is overridden is no longer swept, or, where the value is a list, swept over that list. An override
    has no comments: `report.title=run #2` is the title `run #2`, as the shell passed it.
    Raises UserError with one line for every mistake.
    """
    mistakes: list[str] = []
    raw = read_mapping(path, "study", "give the path of a YAML file, as configs/digits.yaml", "train:", mistakes)
    if not raw and not mistakes and not overrides:
        raise UserError(f"the study {path} is empty; name at least its data, as `data: {{name: digits}}`")
    sweep = raw.pop("sweep", None)
    sweep = {} if sweep is None else sweep
    if not isinstance(sweep, dict):
        mistakes.append(f"sweep = {shorten(repr(sweep))}: should map keys to lists, as `seed: [0, 1]`")
        sweep = {}
    zipped = sweep.pop("zip", None) or []
    groups = zipped if isinstance(zipped, list) else [zipped]
    names = [name for group in groups if isinstance(group, dict) for name in group]
    if not all(isinstance(group, dict) for group in groups) or len({*names, *sweep}) < len(names) + len(sweep):
        mistakes.append(
            f"sweep.zip = {shorten(repr(zipped))}: should map keys that are swept nowhere else to lists of "
            "equal length, or be a list of several such groups"
        )
        groups = []
    for group in groups:
        sweep |= group
    for name in [name for name in sweep if _lookup(raw, name) is not None]:
        mistakes.append(f"{name} is both set and swept; keep one of the two")
    for override in overrides:
        _apply_override(raw, sweep, override, mistakes)
    raw.setdefault("name", path.stem)
    base = _validate(raw, mistakes)
    together = tuple(filter(None, (tuple(name for name in group if name in sweep) for group in groups)))
    mistakes += check_sweep(sweep, base, together)
    if mistakes or base is None:
        raise StudyError(list(dict.fromkeys(mistakes)), base or _what_is_right(raw))
    points = name_points(tuple(expand(base, sweep, together)))
    swept = {
        name: list({repr(p.swept[name]): p.swept[name] for p in points if name in p.swept}.values()) or values
        for name, values in sweep.items()
    }
    whole = {name: sweep[name] for group in together for name in group}
    return Study(path, base, {**swept, **whole}, points, together, static_points(points))


def _lookup(raw: dict[str, Any], dotted: str) -> Any:
    value: Any = raw
    for part in str(dotted).split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _apply_override(raw: dict[str, Any], sweep: dict[str, Any], override: str, mistakes: list[str]) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        mistakes.append(f"{shorten(repr(override))} should be key.path=value, as train.num_epochs=30")
        return
    try:
        value = json_only(parse_yaml(text, comments=False), name, mistakes)
    except ValueError as error:
        hint = "; an override has no comments" if "#" in text else ""
        mistakes.append(f"{shorten(name)}: {shorten(repr(text))} is not a YAML value: {error}{hint}")
        return
    if value is REFUSED:
        return
    if name == "sweep":
        mistakes.append(f"sweep = {shorten(repr(value))}: name the key that varies, as sweep.seed=[0, 1]")
        return
    if name.startswith("sweep."):
        _remove(raw, name.removeprefix("sweep."))
        sweep[name.removeprefix("sweep.")] = value
        return
    if isinstance(value, list) and not _takes_lists(name):
        _remove(raw, name)
        sweep[name] = value
        return
    sweep.pop(name, None)
    *parents, last = name.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            mistakes.append(f"{shorten(name)}: {shorten(parent)} is a value and has no keys")
            return
    section[last] = value


def _remove(raw: dict[str, Any], dotted: str) -> None:
    parent, _, last = dotted.rpartition(".")
    section = _lookup(raw, parent) if parent else raw
    if isinstance(section, dict):
        section.pop(last, None)


def _takes_lists(dotted: str) -> bool:
    section, _, last = dotted.partition(".")
    field = SECTIONS[section].model_fields.get(last) if section in SECTIONS else None
    return section in SECTIONS and (field is None or "list[" in str(field.annotation) or "." in last)


def _validate(raw: dict[str, Any], mistakes: list[str]) -> Config | None:
    """The configuration, or None after adding what is wrong with it to `mistakes`."""
    before = len(mistakes)
    try:
        config = _config(raw)
    except ValidationError as error:
        mistakes.extend(sentences(error))
        return None
    mistakes.extend(contradictions(config))
    return config if len(mistakes) == before else None


def _config(raw: dict[str, Any]) -> Config:
    return Config.model_validate(
        {name: {} if value is None and name in SECTIONS else value for name, value in raw.items()}
    )


def _what_is_right(raw: dict[str, Any]) -> Config | None:
    """The configuration without its wrong keys; None where what decides on the model has a wrong value."""
    rest = copy.deepcopy(raw)
    try:
        return _config(rest)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            dotted = ".".join(str(part) for part in item["loc"][:2])
            if item["type"] != "extra_forbidden" and item["loc"][0] in ("data", "backbone", "exits"):
                return None
            _remove(rest, dotted)
    try:
        return _config(rest)
    except ValidationError:
        return None


def resolved_yaml(study: Study, *, with_meanings: bool = True) -> str:
    """The study with every key written out, as YAML that reads as the same study; meanings and defaults as comments."""
    lines = []
    for name, field in Config.model_fields.items():
        value = getattr(study.config, name)
        if name not in SECTIONS:
            lines.extend(_key_lines(name, value, field, "", with_meanings, name in study.sweep))
            continue
        lines.append(f"{name}:")
        for last, inner in SECTIONS[name].model_fields.items():
            lines.extend(
                _key_lines(last, getattr(value, last), inner, "  ", with_meanings, f"{name}.{last}" in study.sweep)
            )
    lines.append("sweep:" if study.sweep else "sweep: {}")
    zipped = {name for group in study.zipped for name in group}
    lines.extend(f"  {name}: {to_yaml(v)}" for name, v in study.sweep.items() if name not in zipped)
    lines += ["  zip:"] if zipped else []
    for group in study.zipped:
        keys = [f"{name}: {to_yaml(study.sweep[name])}" for name in group]
        lines += [f"    - {keys[0]}", *(f"      {line}" for line in keys[1:])]
    return "\n".join(lines) + "\n"


def _key_lines(name: str, value: Any, field: Any, indent: str, with_meanings: bool, swept: bool) -> list[str]:
    line = f"{indent}{name}: {to_yaml(value)}"
    if swept:
        line = f"{indent}# {name}: see sweep"
    if not with_meanings:
        return [] if swept else [line]
    extra = field.json_schema_extra or {}
    unit = f" [{extra['unit']}]" if extra.get("unit") else ""
    default = to_yaml(field.get_default(call_default_factory=True))
    return [f"{indent}# {field.description}{unit}; default {default}", line]
