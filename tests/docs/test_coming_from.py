"""The commands and code of docs/coming-from.md, on data and models small enough for a test."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import ENVIRONMENT, ROOT, dynexit

PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
# the studies' methods, grids and searches stay; only what makes them large is replaced
SMALL = (
    *("data.name=digits", "data.image_size=24", "data.num_train_views=1", "data.num_evaluation_views=1"),
    *("data.num_validation=150", "data.num_test=160", "backbone.name=resnet18", "backbone.weights=null"),
    "backbone.arguments={layers: [1, 1, 1, 1], channels: [6, 8, 10, 12], stem_type: deep, stem_width: 4}",
    *("prepare.num_epochs=2", "prepare.frozen=[]", "prepare.num_warm_up_epochs=0", "prepare.precision=float32"),
    *("data.train_transform={}", "data.test_transform={}", "data.transform=null", "data.normalisation=null"),
    *("dist.num_workers=0", "dist.num_threads=1", "report.mlflow=false"),
)
SHORTER = {"cifar10_t2t_vit_7": ("train.num_epochs=4",), "imagenet_convnextv2_atto": ("train.num_epochs=6",)}


def blocks(kind: str) -> list[str]:
    found = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.mark.slow
def test_commands_of_the_page_run(tmp_path: Path) -> None:
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "eval" / "mine_onepass.csv").is_file()
    macs = {"head": [{"name": "linear", "macs": [100, 100, 100, 0], "params": []}]}
    macs |= {"backbone": {"name": "mine", "macs": [1000, 2000, 3000, 4000], "ori_macs": 4000}}  # type: ignore[dict-item]
    (tmp_path / "macs.json").write_text(json.dumps(macs))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    for command in commands:
        name, *words = shlex.split(command)
        assert name == "dynexit"
        study = next((Path(word).stem for word in words if word.startswith("configs/")), None)
        if study is not None:
            words = [word for word in words if not word.startswith("data.dir=")]
            words += [word for word in (*SMALL, *SHORTER[study]) if word.partition("=")[0] not in given(words)]
        result = dynexit(tmp_path, *words)
        if words[0] == "macs":
            assert json.loads(result.stdout)["backbone"]["ori_macs"] == 547_332_480
    assert (tmp_path / "runs" / "cifar10_t2t_vit_7" / "report" / "report.html").is_file()
    assert (tmp_path / "runs" / "imagenet_convnextv2_atto" / "report" / "report.html").is_file()
    assert (tmp_path / "found" / "configurations.json").is_file()
    assert (tmp_path / "train_shards" / "manifest.json").is_file()


def given(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if "=" in word} - {"train.num_epochs"}


def test_every_key_that_the_page_names_exists() -> None:
    from dynexit.study.validation import all_keys

    known = set(all_keys())
    named = set(re.findall(r"`((?:backbone|data|prepare|train|jei_dnn)\.\w+)", PAGE))
    assert named
    assert named <= known
