"""The public Python API that starts work: `dynexit.load_study` and what it returns."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynexit.errors import Failure, UserError
from dynexit.jobs.finished import SPLITS, report_is_done
from dynexit.run_dir import STUDY
from dynexit.search.operating_points import ReportRow, read_csv
from dynexit.study.data.names import OWN
from dynexit.study.grid import Study
from dynexit.study.own_code import allowing_code
from dynexit.study.read import load_study as read_study
from launch.run import dry_run, run_study


class OperatingPoints(list[ReportRow]):
    """Operating points, each a dataclass whose fields are the columns of operating_points.csv."""

    def to_pandas(self) -> Any:
        """Returns them as a pandas.DataFrame, a column per field. Raises UserError if pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise UserError("pandas is not installed; install it with `pip install pandas`") from None
        names = [field.name for field in dataclasses.fields(ReportRow)]
        return pandas.DataFrame([dataclasses.asdict(row) for row in self], columns=names)


@dataclasses.dataclass(frozen=True)
class LoadedStudy(Study):
    """A study that can be run. `allow_code` names the modules whose code its jobs may run (see backbone.module).

    `data` holds the data sets that the program gave it, train, validation and test, `data_name` their name.
    """

    allow_code: tuple[str, ...] = ()
    data: tuple[Any, Any, Any] | None = dataclasses.field(default=None, compare=False, repr=False)
    data_name: str = ""

    def run(self, until: str = "report", on: str = "here", site: str | Path | None = None) -> None:
        """Does all missing jobs up to `until`: prepare, train, record, search, report or infer.

        `on` is here (this process), local (processes of their own) or slurm, which submits the jobs to the cluster of
        the profile `site` and returns. Prints what `dynexit run` prints. Raises UserError for a mistake in the request,
        the study or its files, and Failure with a line for each job that failed.
        """
        with self._allowances(on):
            failures = run_study(self, until, on, _path(site))
        if failures:
            raise Failure("\n".join(failures))

    def dry_run(self, until: str = "report", on: str = "here", site: str | Path | None = None) -> str:
        """Returns points, packs, ids and resources of what `run` would do, as text. Starts nothing."""
        with self._allowances(on):
            return dry_run(self, until, on, _path(site))

    def save(self, directory: str | Path, *, relative_macs: float | None = None) -> None:
        """Writes the finished study's operating points as a model folder, as `dynexit save` does.

        With `relative_macs` only the best within that share of the backbone's MACs. Raises UserError for a study
        without a report and for a folder that exists.
        """
        from dynexit.jobs.save import run_save

        with self._allowances("here"):
            run_save(self.points, Path(directory), relative_macs=relative_macs)

    @contextlib.contextmanager
    def _allowances(self, on: str) -> Iterator[None]:
        """Within it, jobs may run the allowed code and read the program's data sets."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(allowing_code(self.allow_code))
            if self.data is not None:
                if on != "here":
                    raise UserError(f"on is {on!r}: a program's data sets are in its own process; run on='here'")
                from dynexit.data.sources.python import offering

                stack.enter_context(offering(self.data_name, self.data))
            yield

    def operating_points(self, split: str = "test", *, front: bool = True) -> OperatingPoints:
        """Returns the finished study's operating points on a split (validation or test), as the report has them.

        With `front` those on the front, which is chosen on validation whatever the split, else all. Raises UserError
        for another split, and if there is no report of exactly these points.
        """
        if split not in SPLITS:
            raise UserError(f"split is {split!r}, allowed are {', '.join(SPLITS)}; name one of them")
        if not report_is_done(self.points):
            raise UserError(f"{self.directory} has no report of these points; make it with run() first")
        rows = read_csv(self.directory / "report" / "operating_points.csv")
        return OperatingPoints(row for row in rows if row.split == split and (row.on_front or not front))


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def load_study(
    source: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    allow_code: Sequence[str] = (),
    data: Sequence[Any] | None = None,
    data_name: str | None = None,
) -> LoadedStudy:
    """Returns the study in a YAML file, or the one that was run in a run folder (runs/NAME), every key checked.

    `overrides` map dotted keys to values, as {"train.num_epochs": 5}, or are texts as ["train.num_epochs=5"]; a list
    sweeps a key that takes none. Jobs may run the code of the modules in `allow_code`, and of no others, where the
    study names a function in them (backbone.module). Imports none of them, and no torch.

    `data` are three data sets in place of data.name, train, validation and test: any torch.utils.data.Dataset of (PIL
    image or tensor, class index) with a length. Ids hold `data_name`, a name with a version as cats-v2: give other
    images another one. Such a study runs on="here". Raises UserError with a line for every mistake.
    """
    source = Path(source)
    if isinstance(allow_code, str):
        raise UserError(f"allow_code is {allow_code!r}; give a list of modules, as [{allow_code!r}]")
    if isinstance(overrides, str):
        raise UserError(f"overrides are {overrides!r}; give a dictionary, or a list of texts as [{overrides!r}]")
    if isinstance(overrides, Mapping):
        overrides = [f"{name}={_yaml_text(value)}" for name, value in overrides.items()]
    datasets = _checked_datasets(data, data_name)
    if datasets is not None:
        overrides = [*overrides, f"data.name={OWN}{data_name}"]
    if source.is_dir():
        study = _study_of_folder(source, overrides)
    else:
        study = read_study(source, overrides)
    parts = {field.name: getattr(study, field.name) for field in dataclasses.fields(Study)}
    return LoadedStudy(**parts, allow_code=tuple(allow_code), data=datasets, data_name=data_name or "")


def _checked_datasets(data: Sequence[Any] | None, name: str | None) -> tuple[Any, Any, Any] | None:
    if data is None:
        if name is not None:
            raise UserError(f"data_name is {name!r} and data is not given; give data=(train, validation, test)")
        return None
    if not (isinstance(data, tuple | list) and len(data) == 3):
        raise UserError("data should be three data sets: data=(train, validation, test)")
    if name is None or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"data_name is {name!r}; give a name with a version, of letters, digits, . _ -, as 'cats-v2'")
    return data[0], data[1], data[2]


def _yaml_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # JSON is YAML; paths become texts


def _study_of_folder(folder: Path, overrides: Sequence[str]) -> Study:
    if not (folder / STUDY).is_file():
        raise UserError(
            f"{folder} is no study's run folder: it has no {STUDY}; give a study's YAML file, or a folder that "
            "`dynexit run` made"
        )
    for name in (override.partition("=")[0] for override in overrides):
        if name in ("name", "runs_dir"):
            raise UserError(f"{name} cannot be set for a run folder, whose name and place it is; move {folder} instead")
    if folder.name in ("", ".."):
        folder = folder.resolve()  # `.` has no name
    return read_study(folder / STUDY, overrides).at(folder)
