"""The commands and code of docs/your-data.md, on few images and a small backbone."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dynexit.study.data.names import DATA_SETS, TORCHVISION_SETS
from dynexit.study.validation import all_keys
from tests.command_line import ENVIRONMENT, ROOT, dynexit

PAGE = (ROOT / "docs" / "your-data.md").read_text(encoding="utf-8")
SMALL: dict[str, dict[str, Any]] = {
    "data": {"image_size": 32, "num_validation": 16, "num_test": 16, "transform": "none"},
    "backbone": {
        "weights": None,
        "arguments": {
            "layers": [1, 1, 1, 2],
            "channels": [4, 8, 12, 16],
            "stem_type": "deep",
            "stem_width": 2,
            "output_stride": 8,
        },
    },
    "prepare": {"num_epochs": 2, "num_warm_up_epochs": 0, "global_batch_size": 16},
    "report": {"mlflow": False},
    "dist": {"num_threads": 1},
}


def blocks(kind: str) -> list[str]:
    found = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return found


def write_study(folder: Path) -> None:
    """The page's study, small, and 60 photos."""
    generator = np.random.default_rng(0)
    for name, brightness in (("dark", 60), ("light", 180)):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(30):
            pixels = generator.normal(brightness, 40, (40, 50, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    study = yaml.safe_load(blocks("yaml")[0])
    for section, keys in SMALL.items():
        study[section] = study.get(section, {}) | keys
    (folder / "my_data.yaml").write_text(yaml.safe_dump(study))


@pytest.mark.slow
def test_commands_of_the_page_run(tmp_path: Path) -> None:
    write_study(tmp_path)
    printed = {}
    for line in blocks("sh")[0].splitlines():
        name, *words = shlex.split(line)
        assert name == "dynexit"
        printed[words[0]] = dynexit(tmp_path, *words).stdout
    assert (tmp_path / "runs" / "my_data" / "report" / "report.html").is_file()
    assert "1 done" in printed["status"]
    assert "0 other differences" in printed["infer"]
    with (tmp_path / "predictions.csv").open(newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} <= {"dark", "light"}


def test_code_of_the_page_runs(tmp_path: Path) -> None:
    write_study(tmp_path)
    (code,) = blocks("python")
    more = """
from dynexit.errors import UserError
for call in (lambda: study.run(on="local"), lambda: dynexit.load_study("runs/from_python").run()):
    try:
        call()
    except UserError as error:
        print(error)
print(dynexit.load("from-python"))
"""
    words = [sys.executable, "-c", code + more]
    done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "operating points" in done.stdout
    assert "on is 'local': a program's data sets are in its own process; run on='here'" in done.stdout
    assert (tmp_path / "runs" / "from_python" / "report" / "report.html").is_file()
    assert 'name: "own/photos-v1"' in (tmp_path / "runs" / "from_python" / "study.yaml").read_text()
    dynexit(tmp_path, "predict", "from-python", "photos", "--out", "out.csv")
    error = dynexit(tmp_path, "run", "runs/from_python/study.yaml", "seed=1", status=2).stderr
    assert "its images come from a Python program; pass them there to dynexit.load_study as data=" in error


def test_every_name_and_key_of_the_page_exists() -> None:
    assert set(re.findall(r"`(data\.[a-z_]+)[`=]", PAGE)) <= set(all_keys())
    section = PAGE.partition("## torchvision's")[2].partition("##")[0]
    named = set(re.findall(r"`([a-z_0-9]+)`", section))
    assert {*TORCHVISION_SETS, *DATA_SETS} - named == {"cifar100_lt", "image_folder"}
