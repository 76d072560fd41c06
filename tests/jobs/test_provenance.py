"""What jobs leave of themselves, and the epoch whose weights are kept."""

import json
import re
from pathlib import Path

import pytest

from dynexit.jobs.reporting.tracked import best_epoch
from dynexit.provenance import commit, cpu_name, instruction_set
from tests.command_line import TINY, dynexit


def test_machine_and_code_are_named() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    assert cpu_name() in flags or cpu_name()
    assert instruction_set() in flags or instruction_set() in ("x86_64", "aarch64", "arm64")
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", commit())


def test_best_epoch_has_the_kept_figures() -> None:
    lines = [
        {"epoch": i, "validation_accuracy": a, "validation_relative_macs": m}
        for i, (a, m) in enumerate([(0.5, 0.3), (0.9, 0.4), (0.9, 0.4), (0.8, 0.2)])
    ]
    kept = {"validation_accuracy": 0.9, "validation_relative_macs": 0.4, "test_accuracy": 0.7}
    assert best_epoch(lines, kept) == {"best_epoch": 1.0}  # type: ignore[arg-type]
    assert best_epoch(lines, kept | {"validation_accuracy": 0.91}) == {}  # type: ignore[arg-type]
    assert best_epoch([{"epoch": 0}], kept) == {}
    assert best_epoch(lines, {}) == {}  # type: ignore[arg-type]


@pytest.mark.slow
def test_each_job_leaves_its_provenance(tmp_path: Path) -> None:
    dynexit(
        tmp_path, "run", TINY, "seed=[0]", "jei_dnn.ce_ic_tradeoff=[1]", "report.mlflow=false", "train.num_epochs=3"
    )
    study = tmp_path / "runs" / "tiny_study"
    for stage in ("prepare", "train", "record", "search"):
        (path,) = study.glob(f"{stage}/*/provenance.json")
        found = json.loads(path.read_text())
        assert (found["stage"], found["num_points"], found["gpu"]) == (stage, 1, "")
        assert 0 < found["seconds"] < 600
        assert found["command"]
    page = (study / "report" / "report.html").read_text()
    assert "<h2>Provenance</h2>" in page
    assert f"torch {found['packages']['torch']}" in page
