"""The commands and code of docs/your-model.md, on few images."""

import csv
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from tests.command_line import ROOT, dynexit

PAGE = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
SMALL = ("data.num_validation=16", "data.num_test=16", "report.mlflow=false", "dist.num_threads=1")


def blocks(kind: str) -> list[str]:
    found = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return found


def commands() -> Iterator[list[str]]:
    (block,) = blocks("sh")
    for line in block.splitlines():
        name, *words = shlex.split(line)
        assert name == "dynexit"
        yield words + ([*SMALL] if "my_model.yaml" in words else [])


def make_photos(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for name, brightness in (("dark", 60), ("light", 180)):
        (folder / name).mkdir(parents=True)
        for i in range(30):
            pixels = generator.normal(brightness, 40, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.mark.slow
def test_commands_of_the_page_run(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    (tmp_path / "mymodels.py").write_text(blocks("python")[0])
    (tmp_path / "my_model.yaml").write_text(blocks("yaml")[0])
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=2).state_dict(), tmp_path / "checkpoint.pth")
    printed = {words[0]: dynexit(tmp_path, *words).stdout for words in commands()}
    assert "* layer4.0" in printed["cut"]
    assert (tmp_path / "runs" / "my_model" / "report" / "report.html").is_file()
    assert "1 done" in printed["status"]
    assert "0 other differences" in printed["infer"]
    with (tmp_path / "predictions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 60
    assert "--allow-code mymodels" in dynexit(tmp_path, "run", "my_model.yaml", *SMALL, "seed=1", status=2).stderr


def test_code_of_the_page_runs() -> None:
    namespace: dict[str, object] = {}
    for code in blocks("python"):
        exec(code, namespace)
    assert namespace["backbone"].places == ("stage 1", "stage 2", "stage 3")  # type: ignore[attr-defined]
