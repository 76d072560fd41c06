"""What each kind of JSON file in a study's folder holds. `run_dir.read_json` checks a file against its kind."""

from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, with_config
from typing_extensions import TypedDict


def _number_text(text: str) -> str:
    float(text)
    return text


_open = with_config(ConfigDict(extra="allow"))  # later versions may add keys
Count = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NumberText = Annotated[str, AfterValidator(_number_text)]
"""Text that `float` reads, nan and inf included."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@_open
class PromisedFile(TypedDict):
    """A file as DONE lists it."""

    bytes: Count
    sha256: Digest


@_open
class Done(TypedDict):
    """DONE: the id of the finished work and the files that it promised."""

    id: str
    files: dict[str, PromisedFile]


@_open
class FailedTraining(TypedDict):
    """FAILED.json: why a point's training stopped."""

    id: str
    reason: str


@_open
class JobProgress(TypedDict):
    """progress.json: where a running job is."""

    step: Count
    num_steps: Count
    figures: dict[str, NumberText]
    images_per_second: Number
    seconds_left: Number
    images_per_second_per_rank: NotRequired[Number]
    share_waiting_for_data: NotRequired[Fraction]
    peak_memory_bytes: NotRequired[Count]


@_open
class Provenance(TypedDict):
    """provenance.json: what did a job, where and when. `seconds` are those of the attempt that finished it.

    `digests` are the SHA-256 of study.yaml and of the files that it made. Speed and memory are those of rank 0, of jobs
    that load images. Earlier versions left out what is NotRequired.
    """

    stage: str
    dynexit: str
    commit: str
    command: str
    python: str
    packages: dict[str, str]
    host: str
    slurm_job: str
    cpu: str
    instruction_set: str
    gpu: str
    num_ranks: Count
    started: str
    seconds: Number
    gpu_hours: Number
    num_points: Count
    user: NotRequired[str]
    driver: NotRequired[str]
    digests: NotRequired[dict[str, str]]
    images_per_second_per_rank: NotRequired[Number]
    share_waiting_for_data: NotRequired[Fraction]
    peak_memory_bytes: NotRequired[Count]


@_open
class Classes(TypedDict):
    """classes.json: the names of the classes by label, and by split `describe` of the images."""

    names: list[str]
    images: NotRequired[dict[str, tuple[int, str]]]


@_open
class Costs(TypedDict):
    """costs.json: the fields of ExitCosts."""

    full_macs: Count
    positions: list[int]
    backbone_macs: list[Count]
    head_types: list[str]
    head_macs: list[list[Count]]
    gate_macs: list[Count]
    reader_macs: NotRequired[list[Count]]


@_open
class Judged(TypedDict):
    """The figures of a configuration on one split."""

    accuracy: Fraction
    macs: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    relative_macs: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    exit_fractions: list[Fraction]
    risk: NotRequired[Number]
    relative_latency: NotRequired[Number]


@_open
class Found(TypedDict):
    """An entry of configurations.json, budgets.json or fixed.json; an unattainable budget has no `exits`."""

    budget: NotRequired[dict[str, Count | Number]]
    accuracy_weight: NotRequired[Number | None]
    objective: NotRequired[Number]
    exits: NotRequired[list[tuple[int, Number]]]
    validation: NotRequired[Judged]
    test: NotRequired[Judged]
    train: NotRequired[Judged]
    unattainable: NotRequired[str]
    nearest: NotRequired[Number]


@_open
class JudgedNetworks(TypedDict):
    """A static network, or a cascade of several by their ids, with one kind of classifier."""

    head: str
    validation: Judged
    test: Judged
    networks: NotRequired[list[str]]
    exits: NotRequired[list[tuple[int, Number]]]


@_open
class Networks(TypedDict):
    """networks.json of a static network's search."""

    static: list[JudgedNetworks]
    cascades: list[JudgedNetworks]


@_open
class CheckpointFacts(TypedDict):
    """The JSON file of a checkpoint."""

    sha256: Digest
    step: Count
    facts: dict[str, Any]


@_open
class MetricsRow(TypedDict):
    """A line of metrics.jsonl; the other keys are figures by name.

    `improved`: whether the weights of the epoch were the best so far, and so kept where the best are.
    """

    epoch: Count
    improved: NotRequired[bool]
    validation_accuracy: NotRequired[Number]
    validation_relative_macs: NotRequired[Number]


PackWork = dict[str, list[str]]
"""The work of a pack: by stage the ids of what is done."""
JobName = Annotated[str, Field(pattern="^[0-9]{1,18}(_[0-9]{1,9})?$")]
"""The id of a job or of an array's task, as 7_1."""


@_open
class LaunchedArray(TypedDict):
    """An array in jobs.json: its stage, and the packs of each of its tasks by job id."""

    stage: str
    tasks: dict[JobName, list[PackWork]]


@_open
class ProfileSource(TypedDict):
    """Where a site profile was, and its SHA-256."""

    path: str
    sha256: Digest


@_open
class LaunchedJobs(TypedDict):
    """jobs.json of a launch."""

    site: ProfileSource | None
    arrays: list[LaunchedArray]


@_open
class AttemptStart(TypedDict):
    """A line of a job's attempts: one begins. `node` is the list of its nodes."""

    start: str
    restart: Count
    node: str


@_open
class AttemptEnd(TypedDict):
    """A line of a job's attempts: how a pack or, without a pack, the attempt ended."""

    reason: str
    pack: NotRequired[Count | None]
    status: NotRequired[int]
    error: NotRequired[str]
    node: NotRequired[str]
    end: NotRequired[str]


@_open
class RankWord(TypedDict):
    """A rank's reason file: how it ended."""

    restart: Count
    pack: Count | None
    finished: list[AttemptEnd]
    word: str
    error: str
