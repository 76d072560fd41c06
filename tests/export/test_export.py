"""An exported model answers as the engine does, without dynexit; a check that fails leaves no folder."""

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dynexit
from dynexit.errors import Failure, UserError
from dynexit.export.folder import export_model
from dynexit.export.plan import ProgramPlan
from dynexit.export.programs import Exit
from dynexit.export.router import ExportedModel
from tests.command_line import dynexit as command
from tests.deploy.saved import make_images, save_random

TWO = {"positions": [0, 1]}
CASES: dict[str, dict[str, Any]] = {
    "gates": {"exits": {"positions": [1, 4]}, "by_gates": True, "head_types": ("linear",)},
    "additive": {"exits": TWO, "shrinkage": 0.5, "head_types": ("linear",)},
    "readers": {"exits": {"positions": [2], "reader": "average_max_std"}, "trainings": ("aa", "bb")},
    "concatenated": {"exits": {"positions": [0, 3], "stem": True, "concatenate": True}, "head_types": ("mlp2x7",)},
    "both head types": {"exits": TWO, "family": "ViT"},
    "shared state": {"exits": {"positions": [0]}, "family": "EVA mixed", "head_types": ("linear",)},
}


def exported(folder: Path, to: str, **case: Any) -> tuple[Any, ExportedModel]:
    """The model folder of a case as loaded, and the router of its export."""
    save_random(folder / "model", **case)
    _, check = export_model(folder / "model", folder / "out", to)
    assert check is not None
    assert check.difference < 1e-4
    return dynexit.load(folder / "model", verify=False), ExportedModel(folder / "out")


def assert_same_answers(model: Any, router: ExportedModel, tolerance: float = 2e-4) -> None:
    images, num_near, taken = make_images(model.input_size, 40), 0, set()
    assert list(router.points) == [point.name for point in model.points]
    for point in model.points:
        expected = model.use(point)(images)
        for size in (1, 7, 40):
            answers = [router(part.numpy(), point.name) for part in images.split(size)]
            taken_B = np.concatenate([answer.exit_index for answer in answers])
            near_B = np.concatenate([answer.near for answer in answers])
            sure_B = ~near_B & ~expected.near.numpy()
            num_near += int((~sure_B).sum())
            assert (taken_B == expected.exit_index.numpy())[sure_B].all()
            probabilities = np.concatenate([answer.probabilities for answer in answers])
            np.testing.assert_allclose(probabilities[sure_B], expected.probabilities[sure_B], atol=tolerance)
            macs_B = np.concatenate([answer.macs for answer in answers])
            assert (macs_B == expected.macs.numpy())[sure_B].all()
            taken |= {(point.name, one) for one in taken_B.tolist()}
    assert len(taken) > len(model.points)  # images left at several exits
    assert num_near < 0.05 * 3 * len(images) * len(model.points)


ALONE = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ImportError(name + " is refused")

sys.meta_path.insert(0, Refuse())
import numpy as np
import router

found = router.ExportedModel(".")
images = np.load(sys.argv[2])
answer = found(images, found.within(0.999))
print(json.dumps([answer.prediction.tolist(), answer.exit_index.tolist(), sorted(sys.modules)]))
"""


def assert_runs_without(refused: str, model: Any, router: ExportedModel) -> None:
    """The folder gives the same answers in a process that cannot import these packages."""
    images, file = make_images(model.input_size, 12).numpy(), router.folder.parent / "images.npy"
    np.save(file, images)
    command = [sys.executable, "-c", ALONE, refused, file]
    environment = {"PYTHONPATH": str(router.folder)}
    done = subprocess.run(command, cwd=router.folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    prediction, exit_index, modules = json.loads(done.stdout)
    answer = router(images, router.within(0.999))
    assert (prediction, exit_index) == (answer.prediction.tolist(), answer.exit_index.tolist())
    assert not {name.partition(".")[0] for name in modules} & set(refused.split(","))


@pytest.mark.parametrize("case", [pytest.param(one, marks=[pytest.mark.slow] * (one != "gates")) for one in CASES])
def test_archives_answer_as_the_engine(case: str, tmp_path: Path) -> None:
    model, router = exported(tmp_path, "torch", **CASES[case])
    assert_same_answers(model, router)
    for path in router.folder.glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:  # nothing in it is a pickle
            assert not [one for one in archive.namelist() if archive.read(one)[:2] in (b"PK", b"\x80\x02", b"\x80\x04")]
    if case == "gates":
        assert_runs_without("dynexit,timm", model, router)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ResNet", "ViT", "T2T-ViT", "ConvNeXt"])
def test_graphs_answer_as_the_engine(family: str, tmp_path: Path) -> None:
    import onnxruntime

    is_resnet = family == "ResNet"
    kind = ("linear",) if is_resnet else ("mlp2x7",)
    positions = {"positions": [0, 1] if is_resnet else [1]}
    model, router = exported(tmp_path, "onnx", family=family, exits=positions, by_gates=is_resnet, head_types=kind)
    # random performers divide by sums near 0
    assert_same_answers(model, router, 2e-3 if family == "T2T-ViT" else 2e-4)
    first = onnxruntime.InferenceSession(router.folder / "stage-0.onnx", providers=["CPUExecutionProvider"])
    assert not isinstance(first.get_inputs()[0].shape[0], int)
    if is_resnet:
        assert_runs_without("torch,dynexit,timm,scipy", model, router)


def test_the_router_is_short_and_imports_little() -> None:
    from dynexit.export import router

    text = Path(router.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert names == {"json", "pathlib", "typing", "numpy", "onnxruntime", "torch"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, unchecked, next to its model folder."""
    folder = tmp_path_factory.mktemp("exported")
    save_random(folder / "model", exits={"positions": [3]}, head_types=("linear",))
    assert export_model(folder / "model", folder / "out", "torch", verify=False) == (3, None)
    return folder / "out"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[:, :, :-1], r"images are float32 \(4, 3, 31, 32\); give finite float32 \(B, \(3, 32, 32\)\)"),
        (lambda x: x[0], r"images are float32 \(3, 32, 32\)"),
        (lambda x: x[:0], r"images are float32 \(0, 3, 32, 32\)"),
        (lambda x: x.astype(np.float64), "images are float64"),
        (lambda x: x * np.float32("nan"), "give finite float32"),
    ],
)
def test_the_router_refuses_bad_images(out: Path, change: Any, says: str) -> None:
    router = ExportedModel(out)
    images = make_images((3, 32, 32), 4).numpy()
    with pytest.raises(ValueError, match=says):
        router(change(images))
    with pytest.raises(ValueError, match=r"no operating point is called 'fast'; there are \['aa-"):
        router(images, "fast")
    with pytest.raises(ValueError, match=r"relative_macs=0.01 is unattainable; aa-0\.\d+ takes 0\.\d{4}$"):
        router.within(0.01)


def test_router_json_holds_what_a_user_needs(out: Path) -> None:
    settings = json.loads((out / "router.json").read_text())
    assert settings["input_size"] == [3, 32, 32]
    assert (settings["mean"], settings["std"]) == ([0.5] * 3, [0.5] * 3)
    assert settings["class_names"] == ["ant", "bee", "cat", "dog", "elk"]
    assert settings["points"][-1]["name"] == "backbone"
    assert [step["program"] for step in settings["points"][-1]["steps"]] == ["stage-0.pt2", "stage-1.pt2"]


def test_other_answers_leave_no_folder(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward, point = out.parent / "model", Exit.forward, ProgramPlan.point
    with monkeypatch.context() as patch:

        def other_logits(self: Exit, *given: Any, **named: Any) -> dict[str, torch.Tensor]:
            return {name: 1.1 * values for name, values in forward(self, *given, **named).items()}

        patch.setattr(Exit, "forward", other_logits)
        with pytest.raises(Failure, match=r"linear-3-aa.pt2 gives logits that differ from the saved ones by .* of the"):
            export_model(model, tmp_path / "out", "torch")

    def other_threshold(self: ProgramPlan, saved: Any) -> dict[str, Any]:
        found = point(self, saved)
        steps = [{**step, "threshold": 2.0} if "threshold" in step else step for step in found["steps"]]
        return {**found, "steps": steps}

    monkeypatch.setattr(ProgramPlan, "point", other_threshold)
    with pytest.raises(Failure, match=r"the exported operating point aa-0.\d+ leaves at exits \[.*\] instead of \["):
        export_model(model, tmp_path / "out", "torch")
    assert list(tmp_path.iterdir()) == []


def test_wrong_requests_are_one_clear_error(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = out.parent / "model"
    with pytest.raises(UserError, match="the format is 'tflite', allowed are onnx, torch"):
        export_model(model, tmp_path / "out", "tflite")
    with pytest.raises(UserError, match="out exists; give the name of a new folder"):
        export_model(model, out, "torch")
    with pytest.raises(UserError, match="is no model folder of dynexit"):
        export_model(tmp_path, tmp_path / "out", "torch")
    monkeypatch.setattr("dynexit.export.convert.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"export to onnx needs onnxscript; run: pip install 'dynexit\[export\]'"):
        export_model(model, tmp_path / "out", "onnx")


@pytest.mark.slow
def test_the_command_says_what_was_checked(out: Path, tmp_path: Path) -> None:
    model = out.parent / "model"
    done = command(tmp_path, "export", model, "--to", "torch", "--out", "a")
    assert done.stdout == "a: 3 programs, 3 operating points, router.json and router.py\n"
    assert "nothing was checked; run again with --verify" in done.stderr
    done = command(tmp_path, "export", model, "--to", "torch", "--out", "b", "--verify")
    assert (
        "checked on the probe, 30 answers: logits differ by at most 0 of the largest (allowed 0.001); " in done.stderr
    )
