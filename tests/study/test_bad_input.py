"""A user's mistake is reported in one line, with exit status 2, before anything is trained."""

from pathlib import Path

import pytest
import torch
import yaml

from dynexit.jobs.planning.checks import folders_elsewhere
from dynexit.models.backbones import build_backbone
from dynexit.study.read import load_study
from launch.__main__ import main
from tests.data.on_disk import write_folders

NARROW = {"layers": [1, 1, 1, 1], "channels": [6, 8, 10, 12]}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A study of three classes of images, whose backbone starts from good.pth, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_folders(tmp_path / "pets", {"": {"cat": 5, "dog": 6, "emu": 5}})
    state = build_backbone("resnet18", arguments=NARROW, num_classes=3).model.state_dict()
    torch.save(state, "good.pth")
    torch.save({name: value for name, value in state.items() if not name.startswith("layer2.")}, "cut.pth")
    content = {
        "data": {"name": "image_folder", "dir": "pets", "image_size": 24, "num_validation": 3, "num_test": 3},
        "backbone": {"name": "resnet18", "arguments": NARROW, "weights": "good.pth"},
        "prepare": {"num_epochs": 1, "num_warm_up_epochs": 0},
        "dist": {"device": "cpu"},
    }
    Path("study.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return "study.yaml"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is said of a command that is refused and leaves no prepared backbone."""
    assert main(arguments) == 2
    assert not list(Path().glob("runs/*/prepare/*/*.safetensors"))
    return capsys.readouterr().err


CUT = (
    "dynexit: weights file 'cut.pth' is not of backbone 'resnet18': 15 weights are missing (first: "
    "layer2.0.conv1.weight, layer2.0.bn1.weight, layer2.0.bn1.bias); give that model's own weights, or the name and "
    "arguments of the model that the file is of\n"
)


def test_weights_that_do_not_fit_are_refused_by_the_plan_and_before_the_first_job(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, "run", study, "--dry-run", "backbone.weights=cut.pth") == CUT
    none = "backbone.weights=none.pth"
    assert main(["run", study, "--dry-run", none]) == 0  # a plan can be made where the weights are not
    assert refused(capsys, "run", study, none).startswith("dynexit: weights file 'none.pth' does not exist: give the ")
    swept = Path(study).read_text(encoding="utf-8").replace("  weights: good.pth\n", "")
    Path("swept.yaml").write_text(swept + "sweep: {backbone.weights: [good.pth, cut.pth]}\n", encoding="utf-8")
    assert refused(capsys, "run", "swept.yaml") == CUT


def test_a_last_batch_of_one_image_is_known_before_training(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    alone = ("prepare.global_batch_size=3", "data.image_size=8", "data.num_test=3", "data.num_validation=3")
    message = refused(capsys, "prepare", study, "backbone.weights=null", *alone)
    assert message == (
        "dynexit: prepare.global_batch_size = 3: leaves a rank with a single image at once, from which a batch norm "
        "learns nothing; change it, or prepare.micro_batch_size\n"
    )
    assert not list(Path().glob("runs/*/prepare/*/progress.json"))


def test_an_image_cut_short_is_named_before_training(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("pets/dog/2.JPEG")
    path.write_bytes(path.read_bytes()[:-400])
    assert refused(capsys, "prepare", study, "data.check_images=pixels") == (
        "dynexit: 1 of 16 images in pets do not decode: pets/dog/2.JPEG; replace them or remove them\n"
    )


def test_overrides_may_follow_options_and_nothing_else_may(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--dry-run", study, "--on", "local", "name=other"]) == 0
    assert "study other: 1 point in " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["run", study, "--dry-run", "--onn", "local"])
    assert "unrecognized arguments: --onn local" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["macs", "resnet18", "--image-size", "0"])
    assert "argument --image-size: '0' should be a whole number of at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["macs", "resnet18", "--json", "name=other"])
    assert "unrecognized arguments: name=other" in capsys.readouterr().err


def test_a_data_folder_is_asked_for_before_anything_starts_and_may_be_on_the_nodes_alone(
    study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(Path(study).read_text(encoding="utf-8"))
    content["data"] = {"name": "cifar10"}
    del content["backbone"]["weights"]
    Path("cifar.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert main(["run", "cifar.yaml", "--dry-run"]) == 0
    capsys.readouterr()
    assert (
        refused(capsys, "run", "cifar.yaml")
        == "dynexit: data.dir is not set; cifar10 needs it: the folder with the files of cifar10\n"
    )
    assert not Path("runs").exists()
    given = load_study(Path("cifar.yaml"), ["data.dir=scratch"])
    there = "data.dir = scratch: there is no such folder here; the jobs will look for it on their nodes"
    assert folders_elsewhere(given) == [there]
    Path("scratch").mkdir()
    assert folders_elsewhere(given) == []


def test_what_is_for_a_cluster_is_not_passed_over(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "run", study, "--site", "mine.yaml")
    assert said == "dynexit: --site is for --on slurm, and this is --on here\n"
    said = refused(capsys, "retry", study)
    assert said == "dynexit: runs/study was never submitted; `dynexit run STUDY.yaml --on slurm` does that\n"


def test_status_of_a_study_that_was_never_run(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", study]) == 0
    there = "dynexit: runs/study is not there: nothing of this study was run yet, or not with this folder"
    assert capsys.readouterr().out.splitlines()[0] == there
    assert not Path("runs").exists()


def test_more_ranks_than_images_in_a_batch_are_refused(study: str, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = ("dist.nodes=2", "dist.tasks_per_node=4")
    assert refused(capsys, "run", study, *ranks, "train.global_batch_size=7") == (
        "dynexit: train.global_batch_size = 7: should be at least 8, the number of ranks (dist.nodes x "
        "dist.tasks_per_node, or those that a launcher started), which divide each batch; raise it or start fewer "
        "ranks\n"
    )
    assert main(["run", study, "--dry-run", *ranks, "train.global_batch_size=8"]) == 0
