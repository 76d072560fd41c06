"""The process that checks models says what a check in this process says, and no process is left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dynexit.study.read import load_study
from dynexit.study.schema import Config
from launch import model_check
from launch.checks import find_misfits
from tests.command_line import ROOT, TINY, start

BAD = ["exits.positions=[0,9]", "backbone.name=resnet19", "backbone.arguments={layers: [1]}", "record.topk=11"]
NOT_FITTING = (
    "dynexit: exit positions [0, 9] do not fit resnet18: give block indices in rising order from 0 to 2 (it has 4 "
    "blocks, and its own classifier sits after the last)\n"
)


def kinds() -> list[tuple[Config, bool]]:
    """One of every study that comes with the program, and some that do not fit."""
    configs = [load_study(path).points[0].config for path in sorted((ROOT / "configs").glob("*.yaml"))]
    configs += [load_study(TINY, [override]).points[0].config for override in BAD]
    return [(config, True) for config in configs if config.backbone.weights in (None, "pretrained")]


def asked_of(code: list[str]) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *code], stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


@pytest.mark.slow
def test_the_process_says_what_a_check_here_says() -> None:
    question = [[(config.model_dump(mode="json"), weights) for config, weights in kinds()], True]
    with asked_of(["-m", "launch.model_check"]) as process:
        answer, complaint = process.communicate(json.dumps(question))
    expected = find_misfits(kinds(), with_data=True)
    assert len(expected) > len(BAD)  # of some sets of images that come with the program the folder is not given
    assert json.loads(answer) == expected, complaint


@pytest.mark.parametrize("code", ["", "raise SystemExit(1)", "print('[')"])
def test_a_process_that_cannot_tell_is_replaced(code: str) -> None:
    with asked_of(["-c", code]) as process:
        assert model_check._ask(process, kinds()[-2:], with_data=False) == find_misfits(kinds()[-2:])


@pytest.mark.slow
@pytest.mark.parametrize("where", [["--dry-run"], ["--on", "local"]], ids=["plan", "local"])
def test_a_model_that_does_not_fit_is_told_before_anything_starts(tmp_path: Path, where: list[str]) -> None:
    process = start(tmp_path, "run", TINY, *where, "exits.positions=[0,9]")
    printed, told = process.communicate(timeout=100)
    assert (process.returncode, printed) == (2, ""), told
    assert told == NOT_FITTING
    assert not list(tmp_path.iterdir())
