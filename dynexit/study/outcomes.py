"""The sections of what is measured, compared, reported and applied once the exits are trained."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from dynexit.study.keys import (
    BatchSize,
    Section,
    key,
    no_duplicates,
)


class BenchSettings(Section):
    batch_sizes: Annotated[list[BatchSize], Field(min_length=1), AfterValidator(no_duplicates)] = key(
        lambda: [1, 8, 64], "batch sizes whose times are measured", "images"
    )
    device: Literal["auto", "cpu", "cuda"] = key("auto", "what is measured; auto takes a GPU if there is one")
    num_warm_up: int = key(2, "rounds that are run before those measured", ge=0)
    num_repeats: int = key(
        20, "rounds measured; more where they take less than a second, fewer, at least 5, where over a minute", ge=1
    )


class BaselinesSettings(Section):
    static: list[dict[str, Any]] = key(
        list,
        "static networks that the study is compared with: for each, what of backbone.arguments is another; fitted from "
        "random weights as section prepare says",
        changes_results=False,
    )
    cascade: bool = key(
        False, "whether cascades of two or three of them and the backbone are searched too", changes_results=False
    )
    one_threshold: bool = key(
        False,
        "whether every point with all exits enabled and one threshold for them is a baseline of the search",
        changes_results=False,
    )


class ReportSettings(Section):
    title: str | None = key(None, "heading of the report; null takes the study's name")
    quantile: Literal["finite_sample", "reference"] = key(
        "finite_sample",
        "rank of the score that bounds conformal sets: with its promised coverage, or as JEI-DNN's code",
    )
    published: Literal["auto", "none"] = key("auto", "auto draws what a paper's authors recorded for it beside")
    mlflow: bool | Literal["live"] = key(
        True, "whether the results are written to MLflow too; live also follows the epochs of trainings"
    )
    tracking_uri: str | None = key(None, "MLflow's store; null takes MLFLOW_TRACKING_URI, else sqlite in runs_dir")


class InferSettings(Section):
    relative_macs: float | None = key(
        None, "budget: most mean MACs on validation, relative to the backbone's; null has none", gt=0, le=2
    )
    latency_ms: float | None = key(
        None, "budget: most mean time of a batch on the device measured; null has none", "ms", gt=0
    )
    latency_batch_size: int | None = key(
        None, "batch size of latency_ms; null takes the smallest measured", "images", ge=1
    )
    risk: float | None = key(
        None,
        "most certified risk, of points that search.risk certified the one with the fewest MACs; null has none",
        gt=0,
        lt=1,
        omit_default=True,
    )
    source: Literal["search", "gates", "fixed", "any"] = key("any", "operating points to choose from")
    split: Literal["validation", "test"] = key("test", "samples to classify")
    batch_size: int | None = key(
        None,
        "images that enter together; null takes the largest batch size whose time the search read, 256 if no times "
        "were measured on the device",
        "images",
        ge=1,
    )
