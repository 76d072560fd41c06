"""The public Python API: its names, its cost, the examples of docs/api.md, and the interfaces that page freezes."""

import argparse
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dynexit
from dynexit.errors import Failure, UserError
from dynexit.study.validation import all_keys
from dynexit.version import installed_version
from launch.__main__ import build_parser, main
from tests.command_line import ENVIRONMENT, ROOT, TINY

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
# prints what a test asks of a process that ran `dynexit ARGUMENTS`
WATCHED = """
import json, resource, sys
from launch.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
usage = resource.getrusage(resource.RUSAGE_SELF)
seen = {"status": status, "torch": "torch" in sys.modules, "seconds": usage.ru_utime + usage.ru_stime}
print(json.dumps(seen), file=sys.stderr)
"""


def section(title: str) -> str:
    """The text of docs/api.md under a heading."""
    return re.split(r"^#+ ", PAGE.partition(f"# {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def watched(folder: Path, *arguments: str | Path) -> dict[str, Any]:
    """Exit status, whether torch was imported, and seconds of CPU of a `dynexit` in a process of its own."""
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    seen: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])
    return seen


def test_every_name_is_importable_and_documented() -> None:
    for name in dynexit.__all__:
        assert getattr(dynexit, name)
        assert name in dir(dynexit)
        assert f"`{name}" in section("The Python API")
    with pytest.raises(AttributeError, match="module 'dynexit' has no attribute 'no_such_name'"):
        _ = dynexit.no_such_name


def test_editors_see_the_names_that_exist() -> None:
    text = Path(dynexit.__file__).read_text(encoding="utf-8")
    seen = dict(reversed(found) for found in re.findall(r"^    from (\S+) import (\w+) as \2$", text, re.MULTILINE))
    assert seen == dynexit._MODULES


def test_import_is_cheap() -> None:
    code = "import time; t = time.process_time(); import dynexit; dynexit.__version__; print(time.process_time() - t)"
    out = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, capture_output=True, check=True)
    assert float(out.stdout) < 0.1


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dynexit {dynexit.__version__}\n"
    assert re.match(r"\d+\.\d+", dynexit.__version__)
    assert installed_version("dynexit-that-is-not-installed") == "unknown"


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), ("config", TINY), ("status", TINY), ("aggregate", "--help")],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_need_no_torch_import_none(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    seen = watched(tmp_path, *arguments)
    assert (seen["status"], seen["torch"]) == (0, False)


@pytest.mark.parametrize(
    "mistake",
    ["train.num_epoch=3", "sweep.seed=[]", "backbone.weights=none.pth", "data.name=cifar10", "backbone.name=5"],
)
def test_mistakes_in_the_study_are_reported_without_torch(tmp_path: Path, mistake: str) -> None:
    seen = watched(tmp_path, "run", TINY, mistake)
    assert (seen["status"], seen["torch"]) == (2, False)
    assert seen["seconds"] < 1
    assert not list(tmp_path.iterdir())


def test_a_missing_study_or_site_is_reported_without_torch(tmp_path: Path) -> None:
    for arguments in (("run", "none.yaml"), ("run", TINY, "--on", "slurm", "--site", "none.yaml"), ("run", ".")):
        seen = watched(tmp_path, *arguments)
        assert (seen["status"], seen["torch"]) == (2, False)


def test_overrides_are_values_or_texts(tmp_path: Path) -> None:
    values = {
        "train.num_epochs": 3,
        "seed": [4, 5],
        "report.title": "übung: 1",
        "runs_dir": tmp_path,
        "data.noise": 1e-5,
    }
    study = dynexit.load_study(str(TINY), values)
    assert (study.config.train.num_epochs, study.sweep["seed"], study.config.data.noise) == (3, [4, 5], 1e-5)
    assert (study.directory.parent, study.config.report.title) == (tmp_path, "übung: 1")
    texts = ["train.num_epochs=3", "seed=[4, 5]", "report.title='übung: 1'", f"runs_dir={tmp_path}", "data.noise=1e-5"]
    assert dynexit.load_study(TINY, texts).points == study.points
    with pytest.raises(UserError, match=r"give a dictionary, or a list of texts as \['seed=1'\]"):
        dynexit.load_study(TINY, "seed=1")


def test_requests_that_cannot_be_met_say_what_is_allowed(tmp_path: Path) -> None:
    study = dynexit.load_study(TINY, {"runs_dir": tmp_path})
    with pytest.raises(
        UserError, match="until is 'trian', allowed are prepare, train, record, bench, search, report, infer"
    ):
        study.run(until="trian")
    with pytest.raises(UserError, match="on is 'there', allowed are here, local, slurm"):
        study.run(on="there")
    with pytest.raises(UserError, match="split is 'train', allowed are validation, test"):
        study.operating_points("train")
    with pytest.raises(UserError, match=r"tiny_study has no report of these points; make it with run\(\) first"):
        study.operating_points()
    with pytest.raises(UserError, match=r"is no study's run folder: it has no study\.yaml"):
        dynexit.load_study(tmp_path)
    assert not list(tmp_path.iterdir())


def options_of(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """By command the options that it takes."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {
        name: {text for action in command._actions for text in action.option_strings} - {"-h", "--help"}
        for name, command in commands.choices.items()
    }


def test_commands_are_documented_and_keep_their_options() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) ?\|$", section("Commands"), re.MULTILINE)
    found = options_of(build_parser())
    assert [name for name, _ in rows] == list(found)
    for name, options in rows:
        assert set(re.findall(r"`(--[\w-]+)`", options)) <= found[name], name


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (None, 0, ""),
        (Failure("NaN"), 1, "dynexit: NaN\n"),
        (OSError("disk full"), 1, "dynexit: disk full; fix it, then run the same command again\n"),
        (UserError("no such key"), 2, "dynexit: no such key\n"),
        (KeyboardInterrupt(), 130, "dynexit: interrupted; the same command resumes from there\n"),
    ],
    ids=repr,
)
def test_exit_statuses_are_the_documented_ones(
    error: BaseException | None,
    status: int,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def convert(*_: Path) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("dynexit.dyce.npz.convert", convert)
    assert main(["convert", "a.npz", "b"]) == status
    assert capsys.readouterr().err == printed
    assert re.search(rf"\b{status} \w", section("Commands").partition("Exit statuses:")[2])


def test_no_key_of_a_study_has_disappeared() -> None:
    documented = []
    for name, keys in re.findall(r"^- `(\w+)`(?:: (`.*`))?$", section("Keys of a study"), re.MULTILINE):
        documented += [f"{name}.{last}" for last in re.findall(r"`(\w+)`", keys)] if keys else [name]
    assert len(documented) > 100
    assert set(documented) <= set(all_keys())


def test_published_names_of_dyce_are_importable() -> None:
    from dynexit.record import OutputRecorder
    from dynexit.search import search_and_eval

    assert callable(OutputRecorder)
    assert callable(search_and_eval)


def test_the_first_example_fits_the_study_that_it_names() -> None:
    (overrides,) = re.findall(r'load_study\("configs/digits.yaml", overrides=(\{.*?\})\)', EXAMPLES[0])
    study = dynexit.load_study(ROOT / "configs" / "digits.yaml", overrides=json.loads(overrides))
    assert len(study.points) == 30


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder in which the examples of docs/api.md ran on a small study, and the variables that they left."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "configs").mkdir()
    (folder / "configs" / "digits.yaml").write_text(TINY.read_text(encoding="utf-8").replace("[0, 1]", "[0]"))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mlflow's and its dependencies' own
        patch.chdir(folder)
        variables: dict[str, Any] = {}
        for number, example in enumerate(EXAMPLES):
            exec(compile(example, f"docs/api.md, example {number}", "exec"), variables)
        yield folder, variables


@pytest.mark.slow
def test_the_examples_run(ran: tuple[Path, dict[str, Any]]) -> None:
    _, variables = ran
    front, everything = variables["front"], variables["everything"]
    assert 0 < len(front) < len(everything)
    assert all(point.split == "test" and point.on_front for point in front)
    assert {point.split for point in everything} == {"validation"}
    assert {point.key for point in front} == {point.key for point in everything if point.on_front}
    assert list(variables["table"]["accuracy"]) == [point.accuracy for point in everything]
    assert variables["logits"].shape == (1, 10)
    assert 0 < variables["best"].point.relative_macs <= 1


@pytest.mark.slow
def test_a_run_leaves_the_documented_files_and_columns(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = ran
    text = section("Files in `runs/NAME/`")
    files = re.findall(r"^- `(\S+)`$", text, re.MULTILINE)
    assert len(files) > 10
    for name in files:
        assert list((folder / "runs" / "digits_short").glob(name.replace("ID", "*"))), name
    assert (folder / "runs" / "mlflow.db").is_file()
    (documented,) = re.findall(r"^    (source,.*)$", text, re.MULTILINE)
    header = (folder / "runs/digits_short/report/operating_points.csv").read_text().splitlines()[0]
    assert re.fullmatch(re.escape(documented).replace(r"exit_1,\.\.\.", r"exit_1(,exit_\d+)*"), header)


@pytest.mark.slow
def test_a_moved_run_folder_is_the_same_study(ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, variables = ran
    (tmp_path / "kept").mkdir()
    moved = (folder / "runs" / "digits_short").rename(tmp_path / "kept" / "renamed")
    try:
        study = dynexit.load_study(moved)
        assert (study.directory, study.config.name) == (moved, "renamed")
        assert study.operating_points() == variables["front"]
        strange = moved.rename(tmp_path / "kept" / "a copy")
        assert dynexit.load_study(strange).operating_points() == variables["front"]
        with pytest.raises(UserError, match=r"name = 'a copy': string should match pattern .*; rename the folder"):
            dynexit.load_study(strange).run()
        strange.rename(moved)
    finally:
        moved.rename(folder / "runs" / "digits_short")


@pytest.mark.slow
def test_run_raises_failure_with_the_reason(ran: tuple[Path, dict[str, Any]]) -> None:
    heads = next(Path("runs/digits_short/train").glob("*/heads.safetensors"))
    content = heads.read_bytes()
    heads.write_bytes(content[:100])
    try:
        with pytest.raises(Failure, match=r"heads\.safetensors has 100 bytes instead of"):
            dynexit.load_study("runs/digits_short").run()
    finally:
        heads.write_bytes(content)
