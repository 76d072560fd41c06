"""Epochs that are followed in MLflow while a training runs."""

from pathlib import Path
from typing import Any

import pytest

from dynexit.jobs.reporting import live
from dynexit.jobs.reporting.tracked import history, tracked_point
from dynexit.report.tracking import POINT_TAG, default_tracking_uri, log_study
from dynexit.study.read import load_study
from tests.command_line import TINY

pytestmark = pytest.mark.filterwarnings("ignore")  # mlflow's and its dependencies' own


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(live, "_SECONDS", 0.01)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return [{"member": i, "epoch": 0, "train_head_loss": 2.0 + i, "exit_accuracy": [0.5, 0.75]} for i in range(2)]


def test_epochs_come_while_training_and_once(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    from mlflow.tracking import MlflowClient

    points = load_study(TINY, [f"runs_dir={tmp_path}", "seed=0", "jei_dnn.ce_ic_tradeoff=[1, 5]"]).points
    for epoch in (1, 2):  # the second training resumes with the rows of the first
        with live.followed(points, rows.copy):
            rows.extend({"member": i, "epoch": epoch, "train_head_loss": 1.0 + i - epoch} for i in range(2))
    client = MlflowClient(default_tracking_uri(tmp_path))
    (experiment,) = [one for one in client.search_experiments() if one.name == "tiny_study"]

    def losses() -> dict[str, list[tuple[int, float]]]:
        runs = {
            run.data.tags[POINT_TAG]: run
            for run in client.search_runs([experiment.experiment_id], "tags.`" + POINT_TAG + "` != ''")
        }
        return {
            identity: sorted(
                (one.step, one.value) for one in client.get_metric_history(run.info.run_id, "train_head_loss")
            )
            for identity, run in runs.items()
        }

    expected = {point.id: [(0, 2.0 + i), (1, float(i)), (2, i - 1.0)] for i, point in enumerate(points)}
    assert losses() == expected
    own = [[row for row in rows if row["member"] == i] for i in range(2)]
    (tmp_path / "report").mkdir()
    tracked = [{**tracked_point(p), "history": history(of)} for p, of in zip(points, own, strict=True)]  # type: ignore[arg-type]
    log_study(default_tracking_uri(tmp_path), {"id": "tiny_study", "name": "tiny_study"}, tracked, tmp_path / "report")  # type: ignore[arg-type]
    assert losses() == expected
    assert {run.info.status for run in client.search_runs([experiment.experiment_id])} == {"FINISHED"}


def test_a_server_that_is_down_only_warns(
    tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    points = load_study(TINY, [f"runs_dir={tmp_path}", "report.tracking_uri=http://127.0.0.1:9"]).points[:2]
    with live.followed(points, lambda: rows):
        pass
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].startswith("MLflow does not take the epochs now: ")
    assert said[0].endswith("; training continues")
