"""What jobs leave of themselves, and the epoch whose weights are kept."""

import json
import re
from pathlib import Path

import pytest

from dynexit.contents import MetricsRow
from dynexit.jobs.finished import kept_row, last_figures
from dynexit.provenance import commit, cpu_name, instruction_set
from dynexit.run_dir import RunDir, sha256_file
from dynexit.study.read import load_study
from tests.command_line import TINY, dynexit


def test_machine_and_code_are_named() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    assert cpu_name() in flags or cpu_name()
    assert instruction_set() in flags or instruction_set() in ("x86_64", "aarch64", "arm64")
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", commit())


def test_the_kept_epoch_is_the_last_that_improved(tmp_path: Path) -> None:
    rows: list[MetricsRow] = [{"epoch": i, "improved": one} for i, one in enumerate([True, False, True, False])]
    (best,) = load_study(TINY, [f"runs_dir={tmp_path}", "jei_dnn.ce_ic_tradeoff=1"]).points[:1]
    (last,) = load_study(TINY, [f"runs_dir={tmp_path}", "jei_dnn.ce_ic_tradeoff=1", "train.keep=last"]).points[:1]
    assert kept_row(best, rows) == rows[2]
    assert kept_row(last, rows) == rows[3]
    assert kept_row(best, [{"epoch": 0}, {"epoch": 1}]) is None  # of earlier versions
    assert kept_row(best, [{"epoch": 0}]) == {"epoch": 0}
    assert kept_row(best, []) is None
    RunDir(best, "train").write_lines("metrics.jsonl", [])
    assert last_figures(best) == ""
    figures = {"validation_accuracy": 0.9, "validation_relative_macs": 0.4}
    RunDir(best, "train").write_lines("metrics.jsonl", [{**rows[0], **figures}, {**rows[1], **figures}])
    shown = "validation 90.00 % at 0.400 relative MACs"
    assert last_figures(best) == f"last epoch 1: {shown}; kept 0: {shown}"
    RunDir(best, "train").write_lines("metrics.jsonl", [{**rows[0], **figures}])
    assert last_figures(best) == f"last epoch 0, kept: {shown}"
    RunDir(best, "train").write_lines("metrics.jsonl", [{**rows[1]}, {**rows[1]}])
    assert last_figures(best) == "last epoch 1"


@pytest.mark.slow
def test_each_job_leaves_its_provenance(tmp_path: Path) -> None:
    overrides = ("seed=[0]", "jei_dnn.ce_ic_tradeoff=[1]", "report.mlflow=false", "train.num_epochs=3")
    dynexit(tmp_path, "run", TINY, *overrides)
    assert "vs backbone" not in dynexit(tmp_path, "infer", TINY, *overrides).stdout  # the report's table
    study = tmp_path / "runs" / "tiny_study"
    for stage in ("prepare", "train", "record", "search", "infer", "report"):
        (path,) = study.glob(f"{stage}/*/provenance.json" if stage != "report" else "report/provenance.json")
        found = json.loads(path.read_text())
        assert found["digests"].pop("study.yaml") == sha256_file(study / "study.yaml")
        files = {name: sha256_file(path.parent / name) for name in found["digests"]}
        assert found["digests"] == files != {}
        assert (found["stage"], found["num_points"], found["gpu"]) == (stage, 1, "")
        assert 0 < found["seconds"] < 600
        assert found["command"]
        assert found["peak_memory_bytes"] > 10 << 20
        loads = stage in ("prepare", "train", "record")
        assert ("images_per_second_per_rank" in found) == ("share_waiting_for_data" in found) == loads
    page = (study / "report" / "report.html").read_text()
    assert "<h2>Provenance</h2>" in page
    assert f"torch {found['packages']['torch']}" in page
    assert "<th>waiting for data</th>" in page
    section = page.partition("<h2>Provenance</h2>")[2].partition("<h2>")[0]
    stages = re.findall(r'<td data-label="stage">(\w+)</td>', section)
    assert stages == 2 * ["prepare", "train", "record", "search", "report"]  # the second table is folded
    shown, folded = section.partition("<details")[::2]
    assert found["started"][:10] in shown.rpartition('data-label="stage">report')[2]
    assert f"dynexit {found['dynexit']}" in folded.rpartition('data-label="stage">report')[2]
    (trained,) = study.glob("train/*/provenance.json")
    measured = json.loads(trained.read_text())
    (point,) = json.loads(dynexit(tmp_path, "status", TINY, *overrides, "--json").stdout)["points"]
    names = ("images_per_second_per_rank", "share_waiting_for_data", "peak_memory_bytes")
    assert point["speed"] == {name: measured[name] for name in names}
    table = dynexit(tmp_path, "status", TINY, *overrides).stdout
    assert "speed" not in table
    waited = measured["share_waiting_for_data"]
    waits = f", {100 * waited:.0f} % waiting for data" if waited > 0.05 else ""
    rate, peak = measured["images_per_second_per_rank"], measured["peak_memory_bytes"] / 2**20
    assert f" relative MACs; {rate:.0f} images/s{waits}, {peak:.0f} MiB" in table
