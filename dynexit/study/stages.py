"""The stages of a study: their order, what each needs, what its id covers, and how many processes do it together.

Ids, the plan, the command line and the workers all read this table. A stage's function is named and not imported: a
search or a report starts without the seconds that the backbones' library takes.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Literal

METHOD = "method"  # in `Stage.sections`: the section of the point's own method, if it has one

_PREPARE = ("data", "backbone", "prepare")
_TRAIN = (*_PREPARE, "seed", "exits", "train", METHOD)
_RECORD = (*_TRAIN, "record")
BENCH = "bench"  # the stage that is done only where the search needs times, and the section of its keys


@dataclasses.dataclass(frozen=True)
class Stage:
    """One kind of work. Its function takes points, can be called again at any time, and does only what is missing."""

    name: str
    run: str
    """`module:function` of the job, called with the points that are done together."""
    needs: str | None
    """The stage whose finished work it reads. A search needs the times of `bench` too where it is by time."""
    sections: tuple[str, ...]
    """What its result depends on, and so what its id covers; empty where points have no result of their own."""
    ranks: Literal["all", "one", "study"]
    """Who does it: all ranks together, one process, or as the study's `dist` section says."""
    help: str
    batch_key: str = ""
    """The key that decides how many images take memory at once; empty where none do."""

    def runner(self) -> Callable[..., Any]:
        """Returns the job's function. Imports what it needs."""
        module, _, name = self.run.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "prepare",
            "dynexit.jobs.prepare:run_prepare",
            None,
            _PREPARE,
            "study",
            "fit the backbone to the data set",
            "prepare.micro_batch_size",
        ),
        Stage(
            "train",
            "dynexit.jobs.train:run_train",
            "prepare",
            _TRAIN,
            "all",
            "train exit heads and gates of every point",
            "train.micro_batch_size",
        ),
        Stage(
            "record",
            "dynexit.jobs.record:run_record",
            "train",
            _RECORD,
            "all",
            "record what every exit says of validation and test",
            "record.batch_size",
        ),
        Stage(
            BENCH,
            "dynexit.bench.stage:run_bench",
            "prepare",
            (*_PREPARE, "exits", BENCH),
            "one",
            "measure what every stage, head and gate takes on the device",
            "bench.batch_sizes",
        ),
        Stage(
            "search",
            "dynexit.jobs.search:run_search",
            "record",
            (*_RECORD, "search", BENCH),
            "one",
            "find the best exit configuration for every preference",
        ),
        Stage(
            "report",
            "dynexit.jobs.report:run_report",
            "search",
            (),
            "one",
            "put all points side by side: table, figures, page, MLflow",
        ),
    )
}
"""By name, in the order in which `dynexit run` does them."""

INFER = Stage(
    "infer",
    "dynexit.jobs.infer:run_infer",
    "report",
    (),
    "one",
    "classify with the best configuration within infer.relative_macs",
    "infer.batch_size",
)
"""Asked for by its own command only."""

POINT_STAGES = tuple(stage.name for stage in STAGES.values() if stage.sections)
"""The stages that leave a folder per point, in order."""


def stage_of(name: str) -> Stage:
    """Returns the stage of that name, `infer` included. Raises KeyError for another."""
    return INFER if name == INFER.name else STAGES[name]


def inputs_of(name: str, *, by_time: bool) -> tuple[str, ...]:
    """Returns the stages whose finished work a job of the stage `name` reads; `by_time` is that of its points."""
    needs = stage_of(name).needs
    return ((needs,) if needs is not None else ()) + ((BENCH,) if by_time and name == "search" else ())


def stages_until(name: str, *, by_time: bool = False) -> tuple[str, ...]:
    """Returns the names of the stages up to `name`, in order; up to the last for `infer`, which follows them.

    `bench` is among them if it is asked for by name or the study searches `by_time`.
    """
    needed = [stage_of(name)]
    while needed[0].needs is not None:
        needed.insert(0, STAGES[needed[0].needs])
    names = {stage.name for stage in needed} | ({BENCH} if by_time and "search" in (s.name for s in needed) else set())
    return tuple(stage for stage in STAGES if stage in names)
