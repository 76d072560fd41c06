"""save_pretrained and from_pretrained of huggingface_hub, offline, and the card that it reads."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelHubMixin

import dynexit
from dynexit.deploy.model import EarlyExitModel
from dynexit.errors import Failure, UserError
from tests.deploy.saved import make_images, save_random
from tests.deploy.test_model_folder import FILES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    save_random(path)
    return path


def test_a_model_is_saved_and_read_by_the_mixin(folder: Path, tmp_path: Path) -> None:
    model = dynexit.load(folder)
    assert isinstance(model, ModelHubMixin)
    assert model.optimize("cpu").save_pretrained(tmp_path / "copy") is None
    assert {path.name for path in (tmp_path / "copy").iterdir()} == FILES
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()
    copy = EarlyExitModel.from_pretrained(tmp_path / "copy", verify=False)
    images = make_images(model.input_size, 5)
    for point in model.points:
        assert torch.equal(copy.use(point.name)(images).probabilities, model.use(point)(images).probabilities)


def test_a_repository_in_the_cache_is_read_offline(folder: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--someone--digits-ee"
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    model = dynexit.EarlyExitModel.from_pretrained("someone/digits-ee", cache_dir=tmp_path, local_files_only=True)
    assert [point.name for point in model.points] == [point.name for point in dynexit.load(folder).points]
    model.save_pretrained(tmp_path / "copy")
    assert dynexit.load(tmp_path / "copy").points == model.points


def test_a_folder_that_changed_is_not_saved(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    model = dynexit.load(tmp_path / "model")
    with pytest.raises(UserError, match="is the folder that the model was loaded from; give another one"):
        model.save_pretrained(tmp_path / "model")
    assert model.verify() < 1e-5
    (tmp_path / "model" / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"model\.safetensors has 14 bytes instead of"):
        model.save_pretrained(tmp_path / "copy")
    with pytest.raises((UserError, Failure)):
        EarlyExitModel.from_pretrained(tmp_path / "copy")


def test_the_hub_reads_the_card(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "dynexit"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.tags == ["image-classification", "early-exit", "timm"]
    assert "| point | relative MACs | validation accuracy |" in card.text
