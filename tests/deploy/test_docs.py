"""The examples of docs/deploy.md, run as they are."""

import json
import re
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import require
from tests.deploy.saved import CLASSES, save_random

PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
(SERVER,) = (example for example in EXAMPLES if "FastAPI" in example)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the folder and the photos of the page."""
    save_random(tmp_path / "digits-ee")
    (tmp_path / "photos").mkdir()
    for name in "ab":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "broken.png").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    assert len(EXAMPLES) == 8
    for example in EXAMPLES:
        if example != SERVER:
            exec(example, names)
    printed = capsys.readouterr().out
    assert "of the MACs, 0.9000 (0.8500 to 0.9500)" in printed
    assert [Path(row.file).name for row in names["found"].rows] == ["a.png", "a.png", "b.png"]
    assert "broken.png does not decode" in printed
    assert next(seen.num_images for seen in names["model"].stats()) == 2 + 3 + 8 * 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_server_answers(here: Path) -> None:
    require(find_spec("fastapi") is not None and find_spec("uvicorn") is not None, "FastAPI is not installed")
    import uvicorn

    assert len(SERVER.splitlines()) <= 40
    names: dict[str, Any] = {}
    exec(SERVER, names)
    server = uvicorn.Server(uvicorn.Config(names["app"], host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        image = (here / "photos" / "a.png").read_bytes()
        answer = post(port, image, 0.99)
        assert answer["class"] in CLASSES
        assert answer["operating_point"] != "backbone"
        assert post(port, image, 1.0)["operating_point"] == "backbone"
        for body, budget, says in ((b"no image", 1.0, "does not decode"), (image, 0.01, "is unattainable")):
            with pytest.raises(urllib.error.HTTPError) as caught:
                post(port, body, budget)
            with caught.value:
                assert caught.value.code == 422
                assert says in caught.value.read().decode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/drift", timeout=30) as response:
            assert [seen["images"] for seen in json.load(response)] == [1, 1]  # of two operating points
    finally:
        server.should_exit = True
        thread.join(30)


def post(port: int, body: bytes, relative_macs: float) -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/classify?relative_macs={relative_macs}", body)
    with urllib.request.urlopen(request, timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
