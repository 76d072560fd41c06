"""What the schema is made of: a key, a section, and the values that several keys take."""

import re
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from dynexit.core.confidence import CONFIDENCES
from dynexit.core.search_methods import SEARCH_METHODS
from dynexit.study.data.names import data_set_name
from dynexit.study.own_code import FUNCTION

_MOST_STEPS, _MOST_DIGITS = 10**6, 12  # of a range; of a step that a message proposes


def key(
    default: Any,
    meaning: str,
    unit: str = "",
    *,
    changes_results: bool = True,
    omit_default: bool = False,
    **limits: Any,
) -> Any:
    """A field of the schema: default, one-line meaning, unit, limits (ge, gt, le, lt, min_length).

    With `omit_default` the default is no part of an id: a key that is added later leaves the ids of older studies.
    """
    extra: dict[str, Any] = {"unit": unit, "changes_results": changes_results, "omit_default": omit_default}
    arguments = {"description": meaning, "json_schema_extra": extra, **limits}
    return Field(default_factory=default, **arguments) if callable(default) else Field(default, **arguments)


def no_duplicates(values: Any) -> Any:
    if isinstance(values, list) and len(set(values)) != len(values):
        raise ValueError("has a duplicate value")
    return values


def none_as_null(value: Any) -> Any:
    return None if value == "none" else value


def parse_weights(spec: str | list[float]) -> list[float]:
    """The weights a list holds or `LO:HI:STEP` stands for, HI included, without rounding drift (0.4:1:0.01 holds 0.7).

    Raises ValueError where the text is not of that form, the step is not positive, a weight leaves [0, 1], the steps
    do not end at HI, or there are more than 10^6 of them.
    """
    if isinstance(spec, list):
        return spec
    try:
        low, high, step = (Decimal(part) for part in spec.split(":"))
    except (ValueError, InvalidOperation):
        raise ValueError("should be LO:HI:STEP, as 0.4:1:0.01, or a list of numbers") from None
    if not (low.is_finite() and high.is_finite() and step.is_finite() and 0 <= low <= high <= 1 and step > 0):
        raise ValueError("should be LO:HI:STEP with 0 <= LO <= HI <= 1 and STEP > 0")
    span = high - low
    if span > step * _MOST_STEPS:
        raise ValueError(f"has more than {_MOST_STEPS:,} steps; give a larger STEP")
    num_steps = int(span / step)
    if span % step:
        last = low + num_steps * step
        nearest = " or ".join(f"{one:f}" for one in _nearest_steps(span, num_steps))
        step_to_give = f"a STEP of {nearest}, or " if nearest else ""
        raise ValueError(f"its steps end at {last}, not at {high}; give {step_to_give}{last} as HI")
    return [float(low + i * step) for i in range(num_steps + 1)]


def _nearest_steps(span: Decimal, num_steps: int) -> list[Decimal]:
    """The nearest steps with few digits, below and above span / num_steps, that divide the span."""

    found = []
    for counts in (range(num_steps + 1, 2 * num_steps + 10), range(num_steps, 0, -1)):
        steps = ((span / count).normalize() for count in counts)
        found += [next((step for step in steps if len(step.as_tuple().digits) <= _MOST_DIGITS), None)]
    return [step for step in found if step is not None]


def known_weights(spec: Any) -> Any:
    if not parse_weights(spec):
        raise ValueError("holds no value")
    return spec


def _one_of(names: Iterable[str]) -> Callable[[Any], Any]:
    """A check that a value is one of the names, with the error message of a Literal."""
    *most, last = [repr(name) for name in names]

    def check(value: Any) -> Any:
        if value not in (*names,):
            raise ValueError(f"should be {', '.join(most)} or {last}")
        return value

    return check


def _mean_and_std(values: list[list[float]]) -> list[list[float]]:
    if len(values) != 2 or len(values[0]) != len(values[1]) or len(values[0]) not in (1, 3) or min(values[1]) <= 0:
        raise ValueError(
            "should be the means and the standard deviations of 1 or 3 channels, as [[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]]"
        )
    return values


ConfidenceName = Annotated[str, BeforeValidator(_one_of(CONFIDENCES))]
SearchMethodName = Annotated[str, BeforeValidator(_one_of(SEARCH_METHODS))]
DataSetName = Annotated[str, AfterValidator(data_set_name)]
MeanAndStd = Annotated[list[list[float]], AfterValidator(_mean_and_std)]
Weight = Annotated[float, Field(ge=0, le=1)]
Budgeted = Annotated[float, Field(gt=0)]
BatchSize = Annotated[int, Field(ge=1)]
Position = Annotated[int, Field(ge=0)]


def _known_head_type(name: str) -> str:
    if not re.fullmatch(r"linear|mlp[1-9]\d*x[1-9]\d*", name):
        raise ValueError("should be linear, or mlpNxW of N layers and width W, as mlp3x500")
    return name


def _known_function(text: str) -> str:
    if not re.match(FUNCTION, text):
        raise ValueError("should be package.module:function")
    return text


FunctionName = Annotated[str, AfterValidator(_known_function)]
HeadType = Annotated[str, AfterValidator(_known_head_type)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
