"""A whole study of every family of other people's modules: fitted, interrupted and resumed, trained, used early."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dynexit
from dynexit.study.grid import Study
from tests.command_line import digests
from tests.models.cut.own import MODELS, NUM_CLASSES
from tests.models.cut.stopping import STOP, Stopping

MODULE = "tests.models.cut.stopping"
KEYS = {
    "name": "family",
    "data": {"name": "image_folder", "image_size": 32, "num_validation": 20, "num_test": 20},
    "prepare": {"num_epochs": 1, "num_warm_up_epochs": 0, "global_batch_size": 16},
    "train": {"method": "independent", "num_epochs": 1, "global_batch_size": 20},
    "search": {"accuracy_weights": "0.5:1:0.25"},
    "report": {"mlflow": False},
    "dist": {"num_threads": 1, "checkpoint_seconds": 0},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        (folder / str(label)).mkdir()
        for i in range(20):
            pixels = generator.normal(50 * label, 30, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{i}.png")
    return folder


def study_of(family: str, folder: Path, images: Path) -> Study:
    content = {**KEYS, "backbone": {"module": f"{MODULE}:build", "arguments": {"family": family}}}
    content["data"] = {**KEYS["data"], "dir": str(images)}  # type: ignore[dict-item]
    folder.mkdir()
    (folder / "family.yaml").write_text(json.dumps({**content, "runs_dir": str(folder / "runs")}))
    return dynexit.load_study(folder / "family.yaml", allow_code=[MODULE])


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_a_study_of_the_family_resumes_and_leaves_early(
    family: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stopping, "num_steps", 0)
    whole, interrupted = (study_of(family, tmp_path / name, images) for name in ("whole", "interrupted"))
    whole.run("infer")
    assert "0 other differences" in capsys.readouterr().out
    assert {point.source for point in whole.operating_points(front=False)} >= {"backbone", "search"}
    STOP.touch()
    with pytest.raises(KeyboardInterrupt):
        interrupted.run("prepare")
    assert not STOP.exists()
    interrupted.run("prepare")
    assert "resuming" in capsys.readouterr().out
    found = digests(interrupted.directory)
    assert len(found) >= 2
    (backbone,) = (load_file(path) for path in interrupted.directory.glob("prepare/*/backbone.safetensors"))
    if family == "tied weights":
        assert torch.equal(backbone["model.blocks.0.conv.weight"], backbone["model.blocks.2.conv.weight"])
    assert found == {name: digest for name, digest in digests(whole.directory).items() if name in found}
