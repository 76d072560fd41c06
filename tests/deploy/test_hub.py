"""save_pretrained, from_pretrained and push_to_hub of huggingface_hub, offline, and the card that it reads."""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelHubMixin, constants

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


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as one commit needs: files of any size travel inside it."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            answer: dict[str, object] = {"url": f"http://{self.headers['Host']}/someone/digits-ee"}
        elif self.path == "/api/models/someone/digits-ee/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif self.path == "/api/validate-yaml":  # of the card
            answer = {"errors": [], "warnings": []}
        else:
            assert self.path == "/api/models/someone/digits-ee/commit/main"
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"http://{self.headers['Host']}/someone/digits-ee/commit/1", "commitOid": "1"}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


def test_a_model_is_pushed_byte_for_byte(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Hub.files = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        try:
            dynexit.load(folder).push_to_hub("someone/digits-ee", token="a-token")
        finally:
            server.shutdown()
            thread.join()
    assert Hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}


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
