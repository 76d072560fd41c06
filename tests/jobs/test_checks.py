"""What is refused before anything starts: missing files first, then models that do not fit, all of a kind together."""

from pathlib import Path

import pytest
import yaml

from dynexit.errors import UserError
from dynexit.jobs.planning.checks import check_models
from dynexit.study.read import load_study
from tests.command_line import TINY, start

NOT_FITTING = (
    "exit positions [0, 9] do not fit resnet18: give block indices in rising order from 0 to 2 (it has 4 blocks, and "
    "its own classifier sits after the last)"
)


def test_all_missing_files_are_reported_together(tmp_path: Path) -> None:
    content = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    content["data"] = {"name": "cifar10", "dir": str(tmp_path / "none")}
    content["sweep"] = {"backbone.weights": ["a.pth", "b.pth", str(tmp_path)]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    study = load_study(tmp_path / "study.yaml", [f"runs_dir={tmp_path}"])
    ask = "give the path of a .safetensors or .pth file, or 'pretrained'"
    weights = [f"weights file '{name}' does not exist: {ask}" for name in ("a.pth", "b.pth")]
    weights.append(f"weights file '{tmp_path}' is no file: {ask}")
    folder = f"data.dir = {tmp_path}/none: there is no such folder; it should be the folder with the files of cifar10"
    with pytest.raises(UserError) as caught:
        check_models(study, dry_run=False)
    assert sorted(str(caught.value).splitlines()) == sorted([*weights, folder])
    with pytest.raises(UserError) as caught:
        check_models(study, dry_run=False, data_is_here=False)
    assert sorted(str(caught.value).splitlines()) == sorted(weights)


def test_all_models_that_do_not_fit_are_reported_together(tmp_path: Path) -> None:
    sweep = "sweep.exits.positions=[[0, 1], [0, 9], [1, 9]]"
    study = load_study(TINY, [sweep, "record.topk=11", f"runs_dir={tmp_path}"])
    with pytest.raises(UserError) as caught:
        check_models(study, dry_run=True)
    too_many = "record.topk = 11: should be at most the classes, 10"
    assert sorted(str(caught.value).splitlines()) == [NOT_FITTING, NOT_FITTING.replace("[0, 9]", "[1, 9]"), too_many]


def test_budgets_below_the_cheapest_exit_are_refused(tmp_path: Path) -> None:
    study = load_study(TINY, ["search.relative_macs=[0.01, 0.02, 0.9]", f"runs_dir={tmp_path}"])
    with pytest.raises(
        UserError, match=r"^search.relative_macs = 0.01, 0.02: the cheapest exit takes (0\.\d{4}) "
    ) as caught:
        check_models(study, dry_run=True)
    least = str(caught.value).partition(" takes ")[2].split()[0]
    check_models(load_study(TINY, [f"search.relative_macs=[{least}]", f"runs_dir={tmp_path}"]), dry_run=True)
    (study.directory / "train").mkdir(parents=True)
    check_models(study, dry_run=True)  # what is trained already may attain it


def test_a_static_network_that_cannot_be_built_is_named(tmp_path: Path) -> None:
    wrong = ["baselines.static=[{chanels: [4, 5, 6, 7]}, {channels: [4]}]", f"runs_dir={tmp_path}"]
    with pytest.raises(UserError) as caught:
        check_models(load_study(TINY, wrong), dry_run=True)
    first, second = sorted(str(caught.value).splitlines(), reverse=True)
    assert first.startswith("baselines.static {channels: [4]}: backbone 'resnet18' with {")
    assert second.startswith("baselines.static {chanels: [4, 5, 6, 7]}: backbone 'resnet18' cannot be built with {")
    assert second.endswith("got an unexpected keyword argument 'chanels'")


@pytest.mark.slow
@pytest.mark.parametrize("where", [["--dry-run"], ["--on", "local"]], ids=["plan", "local"])
def test_a_model_that_does_not_fit_stops_the_command(tmp_path: Path, where: list[str]) -> None:
    process = start(tmp_path, "run", TINY, *where, "exits.positions=[0,9]")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err) == (2, "", f"dynexit: {NOT_FITTING}\n")
    assert not list(tmp_path.iterdir())
