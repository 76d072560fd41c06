"""A study of a module of the user's own: allowed or not, trained, resumed, used, saved and loaded without its code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dynexit
from dynexit.errors import UserError
from dynexit.study.grid import Study
from dynexit.study.own_code import allowed_code, allowing_code
from tests.command_line import ENVIRONMENT, ROOT, digests
from tests.command_line import dynexit as dynexit_command

MODULE = "tests.models.cut.own"
KEYS = {
    "name": "own",
    "data": {"num_train_views": 1, "num_evaluation_views": 1, "num_validation": 150, "num_test": 160, "image_size": 24},
    "backbone": {"module": f"{MODULE}:Residual", "arguments": {"in_channels": 1, "num_classes": 10}},
    "prepare": {"num_epochs": 1, "frozen": ["stem"]},
    "train": {"method": "independent", "num_epochs": 1},
    "search": {"accuracy_weights": "0.5:1:0.25"},
    "report": {"mlflow": False},
    "dist": {"num_threads": 1},
}
REFUSED = (
    f"backbone.module = {MODULE}:Residual: runs the code of {MODULE}, which is not allowed; read it, then add "
    f"--allow-code {MODULE} to the command (in Python: allow_code=['{MODULE}'])"
)


def study_file(folder: Path, **sections: dict[str, object]) -> Path:
    path = folder / "own.yaml"
    path.write_text(json.dumps({**KEYS, "runs_dir": str(folder / "runs"), **sections}))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("own")
    study = dynexit.load_study(study_file(folder), allow_code=[MODULE])
    study.run()
    return study


def test_code_runs_only_where_it_is_allowed(finished: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        dynexit.load_study(study_file(tmp_path)).run()
    assert str(error.value) == REFUSED
    assert not (tmp_path / "runs").exists()
    shutil.copytree(finished.directory, tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / "record")
    again = dynexit.load_study(tmp_path / "own")  # a run folder allows nothing
    assert again.config.backbone.module == f"{MODULE}:Residual"
    with pytest.raises(UserError, match="is not allowed"):
        again.run()
    assert allowed_code() == ()


CODE = """
from pathlib import Path

from tests.models.cut.own import Residual

Path("imported").touch()


class Stopping(Residual):
    steps = 0

    def forward(self, x):
        Stopping.steps += self.training
        if Stopping.steps == 5 and not Path("stopped").exists():
            Path("stopped").touch()
            raise KeyboardInterrupt
        return super().forward(x)


def build():
    return Stopping(1, 10)
"""


@pytest.mark.slow
def test_commands_import_only_what_is_allowed_and_resume(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "interrupted")]
    for folder in folders:
        folder.mkdir()
        (folder / "mine.py").write_text(CODE)
        study_file(folder, backbone={"module": "mine:build"}, dist={"num_threads": 1, "checkpoint_seconds": 0})
    whole, interrupted = folders
    assert "runs the code of mine" in dynexit_command(whole, "prepare", "own.yaml", status=2).stderr
    assert not (whole / "imported").exists()
    (whole / "stopped").touch()
    dynexit_command(whole, "prepare", "own.yaml", "--allow-code", "mine")
    (whole / "imported").unlink()
    for words in (("config",), ("status",), ("aggregate",), ("train", "--allow-code", "other")):
        dynexit_command(whole, words[0], "runs/own", *words[1:], status=2 if words[1:] else 0)
    assert not (whole / "imported").exists()
    dynexit_command(interrupted, "prepare", "own.yaml", "--allow-code", "mine", status=130)
    assert "resuming" in dynexit_command(interrupted, "prepare", "own.yaml", "--allow-code", "mine").stdout
    assert digests(interrupted / "runs") == digests(whole / "runs") != {}


def test_exits_of_an_own_module_are_trained_and_used(finished: Study, capsys: pytest.CaptureFixture[str]) -> None:
    study = dynexit.load_study(finished.directory, allow_code=[MODULE])
    sources = {point.source for point in study.operating_points(front=False)}
    assert {"backbone", "search"} <= sources
    costs = json.loads((folder_of(study, "record") / "costs.json").read_text())
    assert costs["positions"] == [0, 1]
    study.run("infer")
    assert "0 other differences" in capsys.readouterr().out


def folder_of(study: Study, stage: str) -> Path:
    return study.directory / stage / study.points[0].ids[stage]


@pytest.mark.slow
def test_local_processes_are_allowed_the_same(finished: Study, tmp_path: Path) -> None:
    shutil.copytree(finished.directory, tmp_path / "own")
    for stage in ("train", "record", "search", "report"):
        shutil.rmtree(tmp_path / "own" / stage)
    before = load_file(folder_of(finished, "train") / "heads.safetensors")
    again = dynexit.load_study(tmp_path / "own", allow_code=[MODULE])
    again.run("train", on="local")
    after = load_file(folder_of(again, "train") / "heads.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_saved_folder_needs_no_code(finished: Study, tmp_path: Path) -> None:
    from dynexit.jobs.save import run_save

    with allowing_code([MODULE]):
        run_save(finished.points, tmp_path / "saved")
    assert {"stages.json", "stages.safetensors"} <= {path.name for path in (tmp_path / "saved").iterdir()}
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "`stages.json`\nhas the backbone's stages" in card
    assert "not self-contained" not in card
    code = (
        "import sys, dynexit, torch\n"
        f"model = dynexit.load({str(tmp_path / 'saved')!r})\n"
        f"assert not [name for name in sys.modules if name.startswith({MODULE!r})]\n"
        "print(model.verify(), model.backbone.places)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, stdout=-1
    )
    assert done.stdout.decode().split(maxsplit=1)[1].strip() == "('blocks.0', 'blocks.1')"
    assert dynexit.export_model(tmp_path / "saved", tmp_path / "onnx")[1].num_other == 0
    model = dynexit.load(tmp_path / "saved")
    assert model.optimize().backbone.places == model.backbone.places
    stages = tmp_path / "saved" / "stages.json"
    stages.write_text(stages.read_text().replace("aten.relu.default", "aten.gelu.default"))
    with pytest.raises(UserError, match=r"stages\.json was altered"):
        dynexit.load(tmp_path / "saved")


def test_a_folder_that_is_not_self_contained_says_so(tmp_path: Path) -> None:
    from dynexit.jobs.save import run_save

    module = "tests.models.cut.staged"
    backbone = {"module": f"{module}:staged", "arguments": {"in_channels": 1, "num_classes": 10}}
    study = dynexit.load_study(study_file(tmp_path, backbone=backbone), allow_code=[module])
    study.run()
    with allowing_code([module]):
        run_save(study.points, tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "**This folder is not self-contained.**" in card
    assert f"dynexit.load(\".\", allow_code=['{module}'])" in card
    with pytest.raises(UserError) as error:
        dynexit.load(tmp_path / "saved")
    assert str(error.value) == (
        f"{tmp_path}/saved/config.json = {module}:staged: runs the code of {module}, which is not allowed; read it, "
        f"then add --allow-code {module} to the command (in Python: allow_code=['{module}'])"
    )
    assert dynexit.load(tmp_path / "saved", allow_code=[module]).verify() < 1e-6
    for words in (
        ["export", "saved", "--to", "torch", "--out", "programs", "--verify"],
        ["bench", "saved", "--batch=1", "--out=times"],
    ):
        assert "is not allowed" in dynexit_command(tmp_path, *words, status=2).stderr
        dynexit_command(tmp_path, *words, "--allow-code", module)
    assert (tmp_path / "programs" / "router.json").is_file()
    assert (tmp_path / "times" / "bench.csv").is_file()


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"module": "no_such.module:build"}, "backbone.module: there is no module no_such.module, in "),
        ({"module": f"{MODULE}:Resdual"}, f"backbone.module: {MODULE} has no function Resdual; did you mean Residual?"),
        (
            {"module": f"{MODULE}:images"},
            f"backbone.module: {MODULE}:images returned a Tensor; return an nn.Module, or",
        ),
        (
            {"module": f"{MODULE}:Residual", "arguments": {"depth": 3}},
            f"backbone.module: Residual(depth=3) of {MODULE} failed: TypeError: Residual.__init__() got an unexpected",
        ),
        (
            {"module": f"{MODULE}:Residual", "arguments": {"in_channels": 1}},
            f"{MODULE}:Residual gives 5 classes, and the data set has 10; build the module for as many, as through",
        ),
        (
            {"module": f"{MODULE}:Residual"},
            f"{MODULE}:Residual takes no images of 1x24x24 (Given groups=1",
        ),
        (
            {"module": f"{MODULE}:Residual", "arguments": {"in_channels": 1, "num_classes": 10}, "at": ["blocks.7"]},
            f"{MODULE}:Residual runs no module 'blocks.7' on the images; legal places near it are blocks.2, blocks.1",
        ),
        ({"module": "a.b"}, "backbone.module = 'a.b': should be package.module:function"),
        ({"at": ["layer1"]}, "backbone.at = ['layer1']: needs backbone.module; timm's families have their own places"),
        (
            {"module": f"{MODULE}:Residual", "weights": "pretrained"},
            "backbone.weights = 'pretrained': should be a file or null where backbone.module makes the model",
        ),
    ],
)
def test_mistakes_in_a_study_of_an_own_module(backbone: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        dynexit.load_study(study_file(tmp_path, backbone=backbone), allow_code=[MODULE, "no_such.module"]).run()
    assert str(error.value).startswith(message)


def test_ids_of_other_studies_do_not_change(tmp_path: Path) -> None:
    plain = {"name": "resnet18", "arguments": {}}
    before = dynexit.load_study(study_file(tmp_path, backbone=plain)).points[0].ids
    explicit = {**plain, "module": None, "at": "auto", "feature": None}
    assert dynexit.load_study(study_file(tmp_path, backbone=explicit)).points[0].ids == before
