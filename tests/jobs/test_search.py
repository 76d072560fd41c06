"""What a study's `search` section asks for beyond weights: budgets, a certified risk, measured time, DyCE's methods."""

import csv
import html
import json
import shutil
from pathlib import Path

import pytest

from tests.command_line import TINY, digests, dynexit

pytestmark = pytest.mark.slow

BUDGETS = ("search.relative_macs=[0.8]", "search.max_accuracy_drop=[0.02]", "search.min_accuracy=[0.3, 0.99]")
RISK = ("search.risk=0.2", "search.risk_confidence=0.9")
PLAIN = ("report.mlflow=false", "train.num_epochs=3", "record.train=true")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny study is trained."""
    folder = tmp_path_factory.mktemp("trained")
    dynexit(folder, "train", TINY, *PLAIN)
    return folder


def entries(folder: Path, name: str) -> list[list[dict]]:  # type: ignore[type-arg]
    return [json.loads(path.read_text()) for path in sorted((folder / "runs" / "tiny_study").glob(f"search/*/{name}"))]


def test_budgets_and_risk_are_met_shown_and_run(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(trained, folder)
    asked = (*PLAIN, *RISK, *BUDGETS[:2], "search.min_accuracy=[0.3]")
    dynexit(folder, "run", TINY, *asked)
    found = entries(folder, "budgets.json")
    assert len(found) == 6
    for of_point in found:
        assert len(of_point) == 4
        for entry in of_point:
            if "unattainable" in entry:
                continue
            (kind, value), *_ = entry["budget"].items()
            figures = entry["validation"]
            if kind == "relative_macs":
                assert figures["relative_macs"] <= value
            if kind == "min_accuracy":
                assert figures["accuracy"] >= value - 1e-9
            if kind == "risk":
                assert entry["budget"]["p_value"] <= 1 - 0.9
                assert figures["risk"] <= 0.2
    with (folder / "runs/tiny_study/report/operating_points.csv").open() as file:
        rows = list(csv.DictReader(file))
    attained = sum("exits" in entry for of_point in found for entry in of_point)
    assert sum(row["budget"] != "" for row in rows) == 2 * attained
    page = (folder / "runs/tiny_study/report/report.html").read_text()
    assert "risk at most 0.2, certified at 0.9" in page
    assert "at most 0.8 relative MACs" in page
    resolved = (folder / "runs/tiny_study/study.yaml").read_text()
    out = dynexit(folder, "infer", TINY, *asked, "infer.relative_macs=0.8", "infer.source=search").stdout
    assert "0 other differences" in out
    assert "(search), the best within relative_macs 0.8: " in out
    dynexit(folder, "infer", "runs/tiny_study", "infer.relative_macs=0.01", status=2)
    err = dynexit(folder, "infer", "runs/tiny_study", "train.num_epochs=7", status=2).stderr
    assert "train.num_epochs=7 makes another study of the run folder runs/tiny_study, and infer leaves it" in err
    assert (folder / "runs/tiny_study/study.yaml").read_text() == resolved  # budgets hold for one command


def test_the_number_of_processes_changes_nothing(trained: Path, tmp_path: Path) -> None:
    results = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        shutil.copytree(trained, folder)
        dynexit(folder, "search", TINY, *PLAIN, *BUDGETS[:1], f"search.workers={workers}")
        results.append((digests(folder / "runs" / "tiny_study"), entries(folder, "budgets.json")))
    assert results[0] == results[1]


def test_time_is_searched_and_dyces_methods_too(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "study")
    folder = tmp_path / "study"
    # the backbone's end is what takes time here, so leaving before it is all that counts
    latency = "{stage_seconds: [1, 1, 1, 7], head_seconds: [[0.1], [0.1], [0.1]]}"
    dynexit(folder, "search", TINY, *PLAIN, f"search.latency={latency}", "search.relative_latency=[0.35]")
    for of_point in entries(folder, "budgets.json"):
        (entry,) = of_point
        assert entry["validation"]["relative_latency"] <= 0.35
    assert len(entries(folder, "budgets.json")) == 6
    dynexit(folder, "search", TINY, *PLAIN, "search.method=onepass", "search.normalize=true")
    assert len(entries(folder, "budgets.json")) == 12


def test_what_cannot_be_met_is_said_with_the_nearest_that_can(trained: Path) -> None:
    error = dynexit(trained, "search", TINY, *PLAIN, *BUDGETS, status=2).stderr
    assert "min_accuracy 0.99 is unattainable on the searched record: the most accurate configuration has 0." in error
    assert len(error.strip().splitlines()) == 1
    assert "min_accuracy 0.3 " not in error
    local = ("--on", "local")
    error = dynexit(trained, "search", TINY, *PLAIN, *RISK, "search.risk=0.001", *local, status=2).stderr
    assert "risk 0.001 is unattainable at confidence 0.9: 150 samples without a loss certify 0.01523 at best" in error


def test_contradictions_are_named_together(tmp_path: Path) -> None:
    wrong = ("search.risk=0.1", "search.relative_latency=[0.5]", "search.relative_macs=[-1]")
    error = dynexit(tmp_path, "search", TINY, *wrong[:2], status=2).stderr
    assert "search.risk = 0.1: needs record.train = true" in error
    assert "search.relative_latency = [0.5]: needs the measured times in search.latency" in error
    assert "search.relative_macs" in dynexit(tmp_path, "search", TINY, *wrong, status=2).stderr


def test_a_report_names_budgets_that_nothing_attains(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(trained, folder)
    asked = (*PLAIN, "search.relative_macs=[0.8]", "search.min_accuracy=[0.3, 0.999]")
    run = dynexit(folder, "run", TINY, *asked, status=2)
    assert "report: runs/tiny_study/report/report.html" in run.stdout
    message = run.stderr.strip().splitlines()[-1].removeprefix("dynexit: ")
    assert message.startswith("min_accuracy 0.999 is unattainable on the searched record: the most accurate configu")
    most = max(entry["nearest"] for one in entries(folder, "budgets.json") for entry in one if "nearest" in entry)
    assert f"has {most:.6g}; ask for that or more room" in message
    page = html.unescape((folder / "runs/tiny_study/report/report.html").read_text())
    assert f"<li>Not attained: {message}.</li>" in page
    cell = page.partition(">at least 0.999 accuracy</td>")[2].partition("</tr>")[0]
    assert f"has {most:.6g}; ask for that" in cell
    again = dynexit(folder, "run", TINY, *asked, status=2)
    assert (again.stdout.count("nothing to do"), again.stderr) == (1, f"dynexit: {message}\n")
    assert "0 other differences" in dynexit(folder, "infer", TINY, *asked, "infer.relative_macs=0.8").stdout
