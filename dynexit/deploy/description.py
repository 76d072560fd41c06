"""exits.json of a model folder: what it holds, checked when it is read.

Shapes: P positions, L = P + 1 exits, H head types.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from dynexit.arguments import number
from dynexit.core.cost import ExitCosts
from dynexit.core.tradeoff import Configuration, configuration_macs_L
from dynexit.deploy.assembly import HeadStack
from dynexit.errors import UserError
from dynexit.search.problem import with_gates
from dynexit.study.keys import ConfidenceName
from dynexit.study.schema import DataSettings, ExitsSettings

FORMAT = 2
"""The version of the folder's format. Any change of what a reader must know raises it.

Version 1 is read too: it lacks conformal levels, which are optional.
"""

Share = Annotated[float, Field(ge=0, le=1)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _DescriptionPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FilePromise(_DescriptionPart):
    """Size and SHA-256 of a file of the folder."""

    bytes: int
    sha256: Digest


class PointStatistics(_DescriptionPart):
    """How an operating point did on one split."""

    accuracy: Share
    accuracy_interval: tuple[Share, Share]
    """95 %, of a fraction of that many original images (Wilson)."""
    num_samples: int
    num_originals: int
    relative_macs: float
    exit_fractions: tuple[Share, ...]
    mean_confidence: Share
    """Of the class predicted, at the exits taken, after the temperatures."""


class SavedLatency(_DescriptionPart):
    """The mean time of a batch on validation, by the times of stages and exits on one device."""

    device: str
    """cpu or cuda."""
    device_name: str
    batch_size: int
    milliseconds: float
    relative: float
    """Over the plain backbone's."""


class SavedPoint(_DescriptionPart):
    """An operating point: whose heads, how they leave, and what that gave on validation, where it was chosen."""

    name: str
    training: str
    """The id of the training whose heads it uses."""
    source: Literal["backbone", "gates", "search", "fixed"]
    confidence: ConfidenceName
    exits: tuple[tuple[int, float], ...] | None
    """The configuration, (P,) of (head type index or -1, threshold); None if the gates decide."""
    validation: PointStatistics
    test: PointStatistics
    certified_risk: Share | None = None
    latency: tuple[SavedLatency, ...] = ()
    """By batch size, rising; empty where no times were measured."""
    conformal: tuple[tuple[Share, Share], ...] = ()
    """(alpha, threshold): sets of the classes whose probability, unscaled, is at least 1 - threshold at the exit taken
    hold the label of a share 1 - alpha of images."""

    def times_of(self, batch_size: int, device: str) -> list[SavedLatency]:
        """Those of `latency` for a batch size and a device type."""
        return [one for one in self.latency if (one.batch_size, one.device) == (batch_size, device)]

    @property
    def configuration(self) -> Configuration | None:
        """Enabled exits with head type and threshold; None if the gates decide."""
        return None if self.exits is None else Configuration.from_json(self.exits)

    @property
    def relative_macs(self) -> float:
        """Mean MACs on validation over the backbone's."""
        return self.validation.relative_macs

    @property
    def accuracy(self) -> float:
        """Accuracy on validation."""
        return self.validation.accuracy

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy on validation."""
        return self.validation.accuracy_interval

    @property
    def exit_fractions(self) -> tuple[float, ...]:
        """(L,) share of the validation samples that leave at each exit."""
        return self.validation.exit_fractions


class SavedTraining(_DescriptionPart):
    """Exits of one training: how they are put together and what they cost."""

    label: str
    method: str
    exits: dict[str, Any]
    """The section `exits` of its study."""
    precision: Literal["float32", "float64"]
    shrinkage: float
    has_gates: bool
    costs: dict[str, Any]
    """ExitCosts as JSON."""
    temperatures: tuple[tuple[float, ...], ...] | None
    """(P, H) of the heads, then one row with the backbone's; None if the record did not hold all classes."""

    @field_validator("exits")
    @classmethod
    def _known_exits(cls, value: dict[str, Any]) -> dict[str, Any]:
        ExitsSettings.model_validate(value)
        return value

    @field_validator("costs")
    @classmethod
    def _known_costs(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            ExitCosts.from_json(value)
        except TypeError as error:
            raise ValueError(str(error)) from None
        return value

    @property
    def exit_settings(self) -> ExitsSettings:
        """Head types, and how features are read."""
        return ExitsSettings.model_validate(self.exits)

    @property
    def exit_costs(self) -> ExitCosts:
        """MACs of everything, and the positions."""
        return ExitCosts.from_json(self.costs)

    @property
    def stack(self) -> HeadStack:
        """How its heads and gates are stacked."""
        return HeadStack(tuple(self.exit_settings.head_types), self.precision, self.shrinkage, self.has_gates)

    def macs_L(self, configuration: Configuration | None, confidence: str) -> np.ndarray:  # noqa: N802
        """MACs (L,) of leaving at each exit, with the gates' where they decide."""
        if configuration is None:
            return self.exit_costs.macs_L()
        costs = with_gates(self.exit_costs) if confidence == "gate" else self.exit_costs
        return configuration_macs_L(configuration, costs)

    def temperature_L(self, configuration: Configuration | None) -> np.ndarray | None:  # noqa: N802
        """Temperatures (L,) of the exits of a configuration, 1 where there is no exit; None if they are unknown."""
        if self.temperatures is None:
            return None
        *rows, (last,) = self.temperatures
        heads = [0] * len(rows) if configuration is None else [head for head, _ in configuration.exits]
        return np.array([*(row[head] if head >= 0 else 1.0 for row, head in zip(rows, heads, strict=True)), last])


class Preprocessing(_DescriptionPart):
    """How image files become inputs: the section `data` of the study, without folders."""

    data: dict[str, Any]

    @field_validator("data")
    @classmethod
    def _known_data(cls, value: dict[str, Any]) -> dict[str, Any]:
        DataSettings.model_validate(value)
        return value

    @property
    def settings(self) -> DataSettings:
        """The section `data`."""
        return DataSettings.model_validate(self.data)


class Description(_DescriptionPart):
    """Everything in exits.json but its own digest."""

    format: int
    dynexit: str
    """The version of the program that wrote the folder."""
    files: dict[str, FilePromise]
    trainings: dict[str, SavedTraining]
    """By the id of the training."""
    points: tuple[SavedPoint, ...]
    """By rising relative MACs; the last is the backbone alone."""
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    tolerance: float
    """How far confidences of the same image may lie apart where it was saved, by batch size or thread."""
    provenance: dict[str, Any]
    backbone_precision: Literal["float32", "tf32", "bf16"] = "float32"
    """In which the exits were trained and recorded; in bf16 the backbone runs in it here too."""

    @model_validator(mode="after")
    def _shares_of_all_exits(self) -> "Description":
        for point in self.points:
            training = self.trainings.get(point.training)
            if training is None:
                continue
            count = len(training.exit_costs.positions) + 1
            if {len(one.exit_fractions) for one in (point.validation, point.test)} != {count}:
                raise ValueError(f"the exit shares of {point.name} are not those of the {count} exits of its training")
        return self

    def to_text(self) -> str:
        """JSON with a digest of all of it."""
        content = self.model_dump(mode="json")
        if self.backbone_precision == "float32":  # as readers before this key know it
            del content["backbone_precision"]
        return json.dumps({**content, "digest": _digest(content)}, indent=1, allow_nan=False) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def read_description(text: str, folder: str) -> Description:
    """Returns the description in the text of an exits.json. Raises UserError, naming `folder`, for any other text."""
    foreign = f"{folder} is no model folder of dynexit (exits.json %s); give a folder that `dynexit save` wrote"
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise UserError(foreign % "is not JSON, or cut short") from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise UserError(foreign % "has no format version")
    if content["format"] not in (1, FORMAT):
        age = "newer" if content["format"] > FORMAT else "older"
        advice = "install a newer dynexit" if age == "newer" else "save the study again with this dynexit"
        raise UserError(
            f"{folder} has the format version {content['format']}, which is {age} than version {FORMAT} of this "
            f"program; {advice}"
        )
    digest = content.pop("digest", None)
    try:
        is_whole = digest == _digest(content)
    except ValueError:  # a number beyond floats, which no saved folder has
        is_whole = False
    if not is_whole:
        raise UserError(f"{folder}/exits.json was altered (its digest does not fit); copy the folder again")
    content["format"] = FORMAT
    try:
        # as JSON: lists are taken for tuples then
        return TypeAdapter(Description).validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(foreign % f"is wrong at {where}: {first['msg']}") from None


_MOST = {"relative_macs": 2, "max_accuracy_drop": 1, "risk": 1}  # exits and heads may cost more than the backbone alone


def choose_by_time(points: Sequence[SavedPoint], target: float | tuple[float, int], device: str) -> SavedPoint:
    """Returns the most accurate operating point whose mean time for a batch is at most the target.

    `target` is milliseconds for the smallest batch size measured, or (milliseconds, batch size); `device` is cpu or
    cuda. Raises UserError for a time that no point attains, naming the nearest, and where none was measured.
    """
    if isinstance(target, tuple) and len(target) != 2:
        raise UserError(f"latency_ms is {target!r}; give milliseconds, or (milliseconds, batch size)")
    latency_ms, batch_size = target if isinstance(target, tuple) else (target, None)
    sizes = sorted({one.batch_size for point in points for one in point.latency if one.device == device})
    if not sizes:
        raise UserError(
            f"latency_ms = {latency_ms!r}: the folder has no times measured on a {device}; run the study with "
            "search.latency=measured there and save it again"
        )
    batch = sizes[0] if batch_size is None else batch_size
    if batch not in sizes:
        raise UserError(
            f"the batch size of latency_ms is {batch!r}; times were measured for {', '.join(map(str, sizes))}"
        )
    if isinstance(latency_ms, bool) or not isinstance(latency_ms, Real) or not latency_ms > 0:
        raise UserError(f"latency_ms is {latency_ms!r}; give milliseconds above 0")
    timed = [(one.milliseconds, point) for point in points for one in point.times_of(batch, device)]
    within = [(milliseconds, point) for milliseconds, point in timed if milliseconds <= latency_ms]
    if not within:
        milliseconds, fastest = min(timed, key=lambda one: one[0])
        raise UserError(
            f"latency_ms = {latency_ms:g} is unattainable at batch size {batch}: the fastest operating point, "
            f"{fastest.name}, takes {milliseconds:.4g} ms (accuracy {fastest.accuracy:.4f})"
        )
    return min(within, key=lambda one: (-one[1].accuracy, one[0]))[1]


def choose(points: Sequence[SavedPoint], target: str, value: float) -> SavedPoint:
    """Returns the operating point for a target of `EarlyExitModel.use` but time; targets are about validation.

    Raises UserError for a target out of range, and for one that no point attains, naming the nearest.
    """
    if number(target, value) > _MOST[target]:
        share = min(value, 100) / 100
        raise UserError(f"{target} is {value!r}, which is more than {_MOST[target]}; give a share, as {share:g}")
    cheapest = min(points, key=lambda point: point.relative_macs)
    if target == "relative_macs":
        within = [point for point in points if point.relative_macs <= value]
        if not within:
            raise UserError(
                f"relative_macs = {value:g} is unattainable: the cheapest operating point, {cheapest.name}, takes "
                f"{cheapest.relative_macs:.4f} of the backbone's MACs (accuracy {cheapest.accuracy:.4f})"
            )
        return min(within, key=lambda point: (-point.accuracy, point.relative_macs))
    if target == "max_accuracy_drop":
        backbone = next(point for point in points if point.source == "backbone")
        within = [point for point in points if backbone.accuracy - point.accuracy <= value + 1e-12]
        return min(within, key=lambda point: (point.relative_macs, -point.accuracy))
    certified = [point for point in points if point.certified_risk is not None]
    within = [point for point in certified if point.certified_risk <= value]  # type: ignore[operator]
    if not within:
        least = min((point.certified_risk for point in certified if point.certified_risk is not None), default=None)
        nearest = "no operating point has a certificate; search the study with search.risk"
        if least is not None:
            nearest = f"the least risk that an operating point is certified for is {least:g}"
        raise UserError(f"risk = {value:g} is unattainable: {nearest}")
    return min(within, key=lambda point: (point.relative_macs, -point.accuracy))
