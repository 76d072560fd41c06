"""The model folder: what is in it, what timm makes of it, and that nothing damaged or foreign is accepted."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch

import dynexit
from dynexit.deploy.description import FORMAT, _digest
from dynexit.deploy.model_folder import _PROMISED
from dynexit.errors import Failure, UserError
from dynexit.models.t2t_vit import VARIANTS
from tests.deploy.saved import CLASSES, make_images, save_random
from tests.models.tiny import TINY, build_tiny

FILES = {"README.md", "config.json", "exits.json", "exits.safetensors", "model.safetensors", "probe.safetensors"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    (path.parent / ".model.0a1b.tmp").mkdir()  # of a save that was killed
    save_random(path, trainings=("aa", "bb"))
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_holds_six_files_and_leaves_no_other(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("family", TINY)
def test_every_family_is_loaded_with_the_same_logits(family: str, tmp_path: Path) -> None:
    engines = save_random(tmp_path / "model", family)
    model = dynexit.load(tmp_path / "model")
    images = make_images(model.input_size, 3)
    with torch.no_grad():
        expected = build_tiny(family)(images)
        assert torch.equal(model.backbone(images), expected)
    for training, engine in engines.items():
        assert torch.equal(model.engines[training].all_logits(images)[0], engine.all_logits(images)[0])
    if TINY[family][0] in VARIANTS:
        return
    alone = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(alone(images), expected, rtol=1e-5, atol=1e-5)
    assert alone.pretrained_cfg["num_classes"] == 5


def test_config_names_the_classes_and_is_read_by_timm(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == list(CLASSES)
    resolved = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}"))
    assert resolved["input_size"] == (3, 32, 32)
    assert tuple(resolved["mean"]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", sorted(_PROMISED))
def test_refuses_a_file_that_is_missing_short_or_altered(copy: Path, name: str) -> None:
    path, content = copy / name, (copy / name).read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{name} has {len(content) - 1} bytes instead of {len(content)}; copy"):
        dynexit.load(copy)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{name} was altered"):
        dynexit.load(copy)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing; copy the folder again"):
        dynexit.load(copy)


@pytest.mark.parametrize(("version", "says"), [(FORMAT + 1, "newer than version"), (0, "older than version")])
def test_refuses_another_format_version_by_its_number(copy: Path, version: int, says: str) -> None:
    content = json.loads((copy / "exits.json").read_text())
    (copy / "exits.json").write_text(json.dumps({**content, "format": version, "unknown": 1}))
    with pytest.raises(UserError, match=f"has the format version {version}, which is {says}"):
        dynexit.load(copy)


def test_reads_a_folder_of_version_1(copy: Path) -> None:
    model = dynexit.load(copy, verify=False)
    content = json.loads((copy / "exits.json").read_text())
    del content["digest"]
    content |= {
        "format": 1,
        "points": [{k: v for k, v in one.items() if k != "conformal"} for one in content["points"]],
    }
    (copy / "exits.json").write_text(json.dumps({**content, "digest": _digest(content)}))
    old = dynexit.load(copy)
    assert [one.name for one in old.points] == [one.name for one in model.points]
    assert [one.conformal for one in old.points] == [()] * len(model.points)


def test_refuses_exits_json_that_was_altered_or_is_foreign(copy: Path, tmp_path: Path) -> None:
    path = copy / "exits.json"
    text = path.read_text()
    too_large = re.sub(r'"relative_macs": [\d.e-]+', '"relative_macs": 1e999', text, count=1)
    for altered in (text.replace('"bee"', '"bus"'), too_large):
        assert altered != text
        path.write_text(altered)
        with pytest.raises(UserError, match=r"exits.json was altered \(its digest does not fit\)"):
            dynexit.load(copy)
    for content, says in ((text[:-9], "is not JSON, or cut short"), ("[]", "has no format version")):
        path.write_text(content)
        with pytest.raises(UserError, match=says):
            dynexit.load(copy)
    path.write_bytes(pickle.dumps({"format": FORMAT}))
    with pytest.raises(UserError, match=r"exits.json cannot be read|is not JSON"):
        dynexit.load(copy)
    for place in (tmp_path, tmp_path / "nowhere", copy / "config.json"):
        with pytest.raises(UserError, match="is no model folder of dynexit"):
            dynexit.load(place)


def test_weights_are_never_unpickled(copy: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:  # type: ignore[type-arg]
            return (Path.touch, (tmp_path / "executed",))

    from dynexit.deploy.description import FilePromise, read_description
    from dynexit.run_dir import sha256_file

    path = copy / "exits.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    description = read_description((copy / "exits.json").read_text(), "copy")
    promise = FilePromise(bytes=path.stat().st_size, sha256=sha256_file(path))
    forged = description.model_copy(update={"files": {**description.files, path.name: promise}})
    (copy / "exits.json").write_text(forged.to_text())
    with pytest.raises(Failure, match=r"exits.safetensors cannot be read"):
        dynexit.load(copy)
    assert not (tmp_path / "executed").exists()


def test_does_not_overwrite_and_leaves_nothing_when_it_fails(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists; give the name of a new folder"):
        save_random(folder)
    (tmp_path / "empty").mkdir()
    save_random(tmp_path / "empty")
    assert dynexit.load(tmp_path / "empty").points
    (tmp_path / "file").write_text("")
    with pytest.raises((UserError, Failure)):
        save_random(tmp_path / "file" / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file"}


def test_the_card_may_be_edited(copy: Path) -> None:
    text = (copy / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: dynexit\npipeline_tag: image-classification\n")
    assert all(f"| {point.name} |" in text for point in dynexit.load(copy).points)
    (copy / "README.md").write_text(text.replace("---\n", "---\nlicense: mit\n", 1))
    dynexit.load(copy)


def test_verify_finds_a_model_that_computes_something_else(copy: Path) -> None:
    model = dynexit.load(copy)
    assert model.verify() < 1e-5
    model.probe["logits"][0, 0] += 0.1
    with pytest.raises(Failure, match=r"on its probe the backbone gives logits that differ by 0\.1"):
        model.verify()
    model = dynexit.load(copy)
    model.probe["exit_index"][0] = (model.probe["exit_index"][0] + 1) % 3
    with pytest.raises(Failure, match=f"the operating point {model.points[0].name} leaves at exits"):
        model.verify()
