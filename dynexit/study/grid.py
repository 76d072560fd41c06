"""The grid of a study: its points and their ids.

An id is a point's, never a pack's or a grid's, and covers just the sections that a job's result depends on.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dynexit.errors import shorten
from dynexit.study.keys import Section
from dynexit.study.methods import sections_of_methods
from dynexit.study.schema import Config, method_settings
from dynexit.study.stages import BENCH, METHOD, POINT_STAGES, STAGES
from dynexit.study.sweep.names import method_name
from dynexit.study.validation import all_keys, changes_results, contradictions, sentences, unknown_key

SWEEPABLE = tuple(
    name
    for section in STAGES["search"].sections
    for name in (sections_of_methods() if section == METHOD else [section])
)
_MOST_POINTS = 10**6
_SPLIT_FORMAT = "splits by class"  # of what is held out; in every id
_SMALL_FORMAT = ", not cropped"  # of small images in class folders, which earlier versions cropped
_FORMAT = 1  # of what the jobs write; a change of meaning raises it and with it every id


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of the swept keys, and the id of each stage of it."""

    config: Config
    swept: dict[str, Any]  # of the keys that the point's results can depend on
    ids: dict[str, str]
    sweep_keys: tuple[str, ...]  # all swept keys of the study
    label_keys: tuple[str, ...] | None = None  # those that tell the study's points apart; None for all
    method_keys: tuple[str, ...] = ()  # those of `exits` and the like that tell points of the same method apart
    networks: tuple[str, ...] = ()
    """Of a static network the record ids of all that it is compared with, the study's backbone last; else empty."""

    @property
    def id(self) -> str:
        """The point's id, which is that of its training."""
        return self.ids["train"]

    @property
    def study_dir(self) -> Path:
        """The folder of the point's study."""
        return self.config.study_dir

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that the point goes through, in order: all that leave a folder, bench only if it is needed."""
        return tuple(stage for stage in POINT_STAGES if stage != BENCH or self.is_by_time)

    @property
    def is_by_time(self) -> bool:
        """Whether its search reads measured times; that of a static network does not."""
        return self.config.is_by_time and not self.networks

    @property
    def method(self) -> str:
        """The method's name for tables, with what the sweep varies of it: `jei_dnn (distilled 0.02, gate)`."""
        return method_name(self)

    @property
    def values(self) -> dict[str, Any]:
        """The values of all swept keys of the study, by the shortest unique name; `-` where results do not depend on
        the key, as on those of another method.
        """
        last = [name.rpartition(".")[2] for name in self.sweep_keys]
        return {
            short if last.count(short) == 1 else name: self.swept.get(name, "-")
            for short, name in zip(last, self.sweep_keys, strict=True)
        }

    @property
    def label(self) -> str:
        """The swept values in which the study's points differ, as `ce_ic_tradeoff=0.5 seed=1`."""
        named = [
            f"{short}={json.dumps(value) if value is None or isinstance(value, bool) else value}"
            for name, (short, value) in zip(self.sweep_keys, self.values.items(), strict=True)
            if name in self.swept and (self.label_keys is None or name in self.label_keys)
        ]
        return " ".join(named) or "the only point"


@dataclasses.dataclass(frozen=True)
class Study:
    """A study as read: the file, its base configuration, the sweep, and its points in the order of the sweep."""

    path: Path
    config: Config
    sweep: dict[str, list[Any]]
    points: tuple[Point, ...]
    zipped: tuple[tuple[str, ...], ...] = ()  # groups of keys of the sweep whose values go together
    static: tuple[Point, ...] = ()
    """The static networks of section `baselines`: points of their own, which no choice of an operating point sees."""

    @property
    def directory(self) -> Path:
        return self.config.study_dir

    @property
    def is_by_time(self) -> bool:
        """Whether any point's search reads measured times."""
        return any(point.is_by_time for point in self.points)

    @property
    def all_points(self) -> tuple[Point, ...]:
        """All that has jobs: the study's points, then its static networks."""
        return (*self.points, *self.static)

    def only(self, kept: Sequence[bool]) -> "Study":
        """Returns the same study with those of `all_points` that `kept` says."""
        count = len(self.points)
        points, static = itertools.compress(self.points, kept[:count]), itertools.compress(self.static, kept[count:])
        return dataclasses.replace(self, points=tuple(points), static=tuple(static))

    def at(self, directory: Path) -> "Study":
        """Returns the same study with its results in `directory`, which may have been moved or renamed."""
        place = {"runs_dir": str(directory.parent), "name": directory.name}

        def moved(points: Sequence[Point]) -> tuple[Point, ...]:
            return tuple(dataclasses.replace(p, config=p.config.model_copy(update=place)) for p in points)

        config = self.config.model_copy(update=place)
        return dataclasses.replace(self, config=config, points=moved(self.points), static=moved(self.static))


def check_sweep(sweep: dict[Any, Any], base: Config | None, groups: Sequence[Sequence[str]] = ()) -> Iterator[str]:
    """What is wrong with the sweep, value by value, as sentences.

    The keys of each of `groups` go together, and in their lists a value may come again.
    """
    zipped = {name for group in groups for name in group}
    axes = [len(values) for name, values in sweep.items() if isinstance(values, list) and name not in zipped]
    for group in groups:
        lengths = {name: len(sweep[name]) for name in group if isinstance(sweep[name], list)}
        axes.append(max(lengths.values(), default=1))
        if len(set(lengths.values())) > 1:
            lengths_text = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            yield f"sweep.zip: its lists go together and should be equally long, but {lengths_text}"
    num_points = math.prod(axes)
    if num_points > _MOST_POINTS:
        yield f"sweep: {num_points:,} points; at most {_MOST_POINTS:,} are allowed; shorten a list, or make two studies"
        return
    for name, values in sweep.items():
        if name not in all_keys():
            yield f"sweep.{unknown_key(str(name))}"
        elif name.partition(".")[0] not in SWEEPABLE:
            yield f"sweep.{shorten(name)}: the sections that can be swept are {', '.join(SWEEPABLE)}"
        elif not isinstance(values, list):
            yield f"sweep.{name} = {shorten(repr(values))}: should be a list of values"
        elif not values:
            yield f"sweep.{name} = []: the grid is empty; give at least one value or remove the key"
        elif len(values) > 1 and not changes_results(name):
            yield f"sweep.{name}: results do not depend on this key; give one value, or make a study for each"
        elif name not in zipped and len(set(map(_hashable, values))) < len(values):
            yield f"sweep.{name} = {shorten(repr(values))}: has a duplicate value"
        else:
            for value in values:
                try:
                    changed = _with_value(base or Config(), name, value)
                except ValidationError as error:
                    yield from ("sweep." + text for text in sentences(error, f"{name.rpartition('.')[0]}.".lstrip(".")))
                else:
                    if name not in zipped:
                        wrong = f"sweep.{name} = {shorten(repr(value))}"
                        yield from (f"{wrong}: {text}" for text in contradictions(changed) if base)
    for group in groups:
        if base is not None and set(group) <= set(all_keys()) and all(isinstance(sweep[name], list) for name in group):
            yield from _zip_contradictions(base, {name: sweep[name] for name in group})


def _zip_contradictions(base: Config, zipped: dict[str, list[Any]]) -> Iterator[str]:
    """What does not go together in an entry of the zip, where each of its values is right by itself."""
    for number, values in enumerate(zip(*zipped.values(), strict=False), 1):
        config = base
        try:
            for name, value in zip(zipped, values, strict=True):
                config = _with_value(config, name, value)
        except ValidationError:
            continue
        yield from (f"sweep.zip, entry {number}: {text}" for text in contradictions(config))


def _hashable(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, dict)) else value


def _with_value(config: Config, dotted: str, value: Any) -> Config:
    """`config` with one key changed, validated."""
    name, _, last = dotted.partition(".")
    if not last:
        return config.model_copy(update={name: getattr(Config.model_validate({name: value}), name)})
    section = getattr(config, name)
    return config.model_copy(update={name: type(section).model_validate({**section.model_dump(), last: value})})


def expand(base: Config, sweep: dict[str, list[Any]], groups: Sequence[Sequence[str]] = ()) -> Iterator[Point]:
    """Every point of a checked grid, the first swept key varying slowest, the keys of each of `groups` together, after
    the others.

    A section is made once per value it takes. Settings that differ only in keys of methods they do not use are one
    point.
    """
    sections: dict[str, tuple[Any, str]] = {}
    hashes: dict[tuple[str, ...], str] = {}
    seen: set[str] = set()
    for setting in _settings(sweep, groups):
        parts = {name: _section(name, base, setting, sections) for name in SWEEPABLE}
        config = base.model_copy(update={name: value for name, (value, _) in parts.items()})
        ids = {
            stage: _identity(stage, [parts[name][1] for name in _sections(stage, config)], hashes)
            for stage in POINT_STAGES
        }
        if ids["search"] not in seen:
            seen.add(ids["search"])
            swept = {name: _value(config, name) for name in sweep if is_used(name.partition(".")[0], config)}
            yield Point(config, swept, ids, tuple(sweep))


def _settings(sweep: dict[str, list[Any]], groups: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    zipped = {name for group in groups for name in group}
    axes = [[{name: value} for value in values] for name, values in sweep.items() if name not in zipped]
    for group in groups:
        together = zip(*(sweep[name] for name in group), strict=True)
        axes.append([dict(zip(group, values, strict=True)) for values in together])
    for parts in itertools.product(*axes):
        yield {name: value for part in parts for name, value in part.items()}


def _sections(stage: str, config: Config) -> list[str]:
    """The sections (or `seed`) that the stage's result depends on, of the methods' the configuration's own."""
    names = [config.train.method if name == METHOD else name for name in STAGES[stage].sections]
    if stage != BENCH and not config.is_by_time:
        names = [name for name in names if name != BENCH]
    return [name for name in names if name != config.train.method or method_settings(config) is not None]


def is_used(section: str, config: Config) -> bool:
    """Whether results can depend on the section: those of other methods than the configuration's own cannot, nor those
    of bench where the search is by MACs alone.
    """
    if section == BENCH:
        return config.is_by_time
    return section not in sections_of_methods() or section == config.train.method


def _section(name: str, base: Config, setting: dict[str, Any], cache: dict[str, tuple[Any, str]]) -> tuple[Any, str]:
    """A section (or `seed`) with the swept values in it, and the JSON of what of it changes results."""
    mine = {dotted: value for dotted, value in setting.items() if dotted.partition(".")[0] == name}
    cache_key = f"{name} {mine!r}"
    if cache_key not in cache:
        config = base
        for dotted, value in mine.items():
            config = _with_value(config, dotted, value)
        cache[cache_key] = (getattr(config, name), _part(name, config))
    return cache[cache_key]


def _part(name: str, config: Config) -> str:
    """What a section (or `seed`) adds to the ids that cover it."""
    part = canonical_json(getattr(config, name))
    if name != "data":
        return part
    data = config.data
    is_as_before = data.test_transform and (data.transform or data.train_transform)
    return part + _SPLIT_FORMAT + (_SMALL_FORMAT if data.is_small and data.is_folder and not is_as_before else "")


def ids_of(config: Config) -> dict[str, str]:
    """The id of each stage of a configuration."""
    return {
        stage: _identity(stage, [_part(name, config) for name in _sections(stage, config)], {})
        for stage in POINT_STAGES
    }


def _value(config: Config, dotted: str) -> Any:
    section, _, last = dotted.partition(".")
    value = getattr(config, section)
    return getattr(value, last) if last else value


def canonical_json(value: Any) -> str:
    """JSON of what in a section changes results: keys sorted, no spaces."""
    if isinstance(value, Section):
        dumped = value.model_dump(mode="json")
        for name, field in type(value).model_fields.items():
            extra = field.json_schema_extra
            if not isinstance(extra, dict):
                continue
            is_omitted = extra["omit_default"] and getattr(value, name) == field.get_default(call_default_factory=True)
            if is_omitted or not extra["changes_results"]:
                del dumped[name]
        value = dumped
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _identity(job: str, parts: Sequence[str], hashes: dict[tuple[str, ...], str]) -> str:
    cache_key = (job, *parts)
    if cache_key not in hashes:
        hashes[cache_key] = digest([_FORMAT, job, *parts])
    return hashes[cache_key]


def digest(content: Any) -> str:
    """Twelve hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def fixed_values(study: Study) -> dict[str, Any]:
    """By dotted key the values that all prepared backbones of the study share: neither swept nor without effect."""
    return {
        f"{section}.{name}": value
        for section in STAGES["prepare"].sections
        for name, value in json.loads(canonical_json(getattr(study.config, section))).items()
        if f"{section}.{name}" not in study.sweep
    }
