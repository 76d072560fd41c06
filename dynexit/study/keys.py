"""What the schema is made of: a key, a section, and the values that several keys take."""

import re
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

DATA_SETS = ("digits", "cifar10", "cifar100", "cifar100_lt", "svhn", "imagenet", "image_folder")
TIMM_DATA_SETS = ("torch", "hfds", "hfids", "tfds", "wds")  # before the slash of a name that timm knows


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


def _known_data_set(name: str) -> str:
    kind, slash, rest = name.partition("/")
    if name not in DATA_SETS and not (slash and rest and kind in TIMM_DATA_SETS):
        of_timm = ", ".join(f"{kind}/NAME" for kind in TIMM_DATA_SETS)
        raise ValueError(f"no data set of this name; known are {', '.join(DATA_SETS)}, and of timm {of_timm}")
    return name


def no_duplicates(values: Any) -> Any:
    if isinstance(values, list) and len(set(values)) != len(values):
        raise ValueError("a value stands in it twice")
    return values


def parse_weights(spec: str | list[float]) -> list[float]:
    """The weights a list holds or `LO:HI:STEP` stands for, HI included, without rounding drift (0.4:1:0.01 holds 0.7).

    Raises ValueError where the text is not of that form, the step is not positive, or a weight leaves [0, 1].
    """
    if isinstance(spec, list):
        return spec
    try:
        low, high, step = (Decimal(part) for part in spec.split(":"))
    except (ValueError, InvalidOperation):
        raise ValueError("should be LO:HI:STEP, as 0.4:1:0.01, or a list of numbers") from None
    if not (low.is_finite() and high.is_finite() and step.is_finite() and 0 <= low <= high <= 1 and step > 0):
        raise ValueError("should be LO:HI:STEP with 0 <= LO <= HI <= 1 and STEP > 0")
    return [float(low + i * step) for i in range(int((high - low) / step) + 1)]


def known_weights(spec: Any) -> Any:
    if not parse_weights(spec):
        raise ValueError("holds no value")
    return spec


DataSetName = Annotated[str, AfterValidator(_known_data_set)]
Weight = Annotated[float, Field(ge=0, le=1)]
Budgeted = Annotated[float, Field(gt=0)]
Position = Annotated[int, Field(ge=0)]


def _known_head_type(name: str) -> str:
    if not re.fullmatch(r"linear|mlp[1-9]\d*x[1-9]\d*", name):
        raise ValueError("should be linear, or mlpNxW of N layers and width W, as mlp3x500")
    return name


HeadType = Annotated[str, AfterValidator(_known_head_type)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
