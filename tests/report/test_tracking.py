import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynexit.errors import Failure
from dynexit.report import tracking
from dynexit.report.tracking import CONTENT_TAG, POINT_TAG, TrackedPoint, default_tracking_uri, flatten, log_study

pytestmark = pytest.mark.filterwarnings("ignore")  # mlflow's and its dependencies' own


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """An initialised mlflow.db: making one takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    report_dir = folder / "report"
    report_dir.mkdir()
    log_study(default_tracking_uri(folder), {"id": "t", "name": "template"}, [], report_dir)
    return folder / "mlflow.db"


@pytest.fixture
def runs_dir(tmp_path, empty_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    (tmp_path / "report" / "folder").mkdir(parents=True)
    (tmp_path / "report" / "report.html").write_text("the page")
    (tmp_path / "report" / ".report.html.x.tmp").write_text("half a page")
    return tmp_path


def point(index, **changes) -> TrackedPoint:
    history = {"loss": [(epoch, 1 / (1 + epoch + index)) for epoch in range(4)]}
    return {
        "id": f"p{index}",
        "params": {"seed": index, "jei_dnn.ce_ic_tradeoff": 0.1, "exits.positions": [0, 1]},
        "metrics": {"test_accuracy": 0.9 + index / 100},
        "history": history,
        **changes,
    }


def report(runs_dir, points, study_id="s1", **more):
    study = {"id": study_id, "name": "digits", **more}
    log_study(default_tracking_uri(runs_dir), study, points, runs_dir / "report")
    return read(runs_dir)


def client_of(runs_dir):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=default_tracking_uri(runs_dir))


def read(runs_dir):
    """The runs by point id (the study's own under None), and everything in them that a second report might change."""
    client = client_of(runs_dir)
    experiment = client.get_experiment_by_name("digits")
    runs = {run.data.tags.get(POINT_TAG): run for run in client.search_runs([experiment.experiment_id])}
    histories = {
        (name, key): [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]
        for name, run in runs.items()
        for key in run.data.metrics
    }
    return runs, histories


def ids(runs):
    return {name: run.info.run_id for name, run in runs.items()}


def test_a_study_is_a_run_with_a_child_for_every_point(runs_dir):
    artifact = runs_dir / "heads.json"
    artifact.write_text("{}")
    points = [point(0), point(1, artifacts=[artifact], tags={"pack": "7"}, name="first")]
    runs, histories = report(runs_dir, points, params={"data.name": "digits"}, metrics={"best": 0.5})
    assert set(runs) == {None, "p0", "p1"}
    parent, child = runs[None], runs["p1"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.data.tags["dynexit.study_id"], child.data.tags["pack"], child.info.run_name) == ("s1", "7", "first")
    assert child.data.params == {"seed": "1", "jei_dnn.ce_ic_tradeoff": "0.1", "exits.positions": "[0, 1]"}
    assert parent.data.params == {"data.name": "digits"}
    assert (parent.data.metrics, child.data.metrics["test_accuracy"]) == ({"best": 0.5}, 0.91)
    assert histories["p0", "loss"] == [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 0.25)]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    stored = sorted(path.name for path in (runs_dir / "mlartifacts").rglob("*") if path.is_file())
    assert stored == ["heads.json", "report.html"], "and no half-written files"


def test_reporting_twice_changes_nothing(runs_dir):
    first = report(runs_dir, [point(0), point(1)], params={"a": 1}, metrics={"b": 2.0})
    second = report(runs_dir, [point(0), point(1)], params={"a": 1}, metrics={"b": 2.0})
    assert ids(second[0]) == ids(first[0])
    assert second[1] == first[1]
    assert {run.info.end_time for run in second[0].values()} == {run.info.end_time for run in first[0].values()}


def test_what_changed_is_updated_in_the_same_run(runs_dir):
    first, _ = report(runs_dir, [point(0), point(1)])
    longer = point(1, metrics={"test_accuracy": 0.5, "new": 1.0}, history={"loss": [(0, 0.5), (1, 7.0)]})
    (runs_dir / "report" / "report.html").write_text("a new page")
    second, histories = report(runs_dir, [point(0), longer, point(2)])
    assert ids(second).items() >= ids(first).items()
    assert set(second) == {None, "p0", "p1", "p2"}
    assert second["p1"].data.metrics["test_accuracy"] == 0.5, "lower than before, and still the latest"
    assert second["p1"].data.metrics["new"] == 1.0
    # what is held is not written again
    assert sorted(histories["p1", "loss"]) == [(0, 0.5), (1, 1 / 3), (1, 7.0), (2, 0.25), (3, 0.2)]
    assert histories["p0", "loss"] == [(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 0.25)]
    (page,) = (runs_dir / "mlartifacts").rglob("report.html")
    assert page.read_text() == "a new page"


def test_a_run_whose_params_changed_is_replaced(runs_dir):
    first, _ = report(runs_dir, [point(0), point(1)])
    second, _ = report(runs_dir, [point(0, params={"seed": 5}), point(1)])
    assert second["p0"].data.params == {"seed": "5"}
    assert ids(second)["p1"] == ids(first)["p1"]
    assert len(second) == 3


def test_another_study_of_the_name_has_its_own_runs(runs_dir):
    report(runs_dir, [point(0)])
    report(runs_dir, [point(0)], study_id="s2")
    client = client_of(runs_dir)
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    found = sorted((run.data.tags["dynexit.study_id"], run.data.tags.get(POINT_TAG, "")) for run in runs)
    assert found == [("s1", ""), ("s1", "p0"), ("s2", ""), ("s2", "p0")]


def test_a_torn_report_to_a_server_is_repeated(runs_dir, monkeypatch):
    from mlflow.tracking import MlflowClient

    real, calls = MlflowClient.log_batch, []
    monkeypatch.setattr(tracking, "_insert", lambda *_: False)  # as servers have it

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        report(runs_dir, [point(0), point(1)])
    monkeypatch.undo()
    torn, _ = read(runs_dir)
    assert CONTENT_TAG not in torn["p0"].data.tags
    repeated, histories = report(runs_dir, [point(0), point(1)])
    assert ids(repeated)["p0"] == ids(torn)["p0"]
    assert len(histories["p0", "loss"]) == 4
    assert set(repeated) == {None, "p0", "p1"}


def test_large_points_are_written_whole_in_few_batches(runs_dir, monkeypatch):
    from mlflow.tracking import MlflowClient

    real, sizes = MlflowClient.log_batch, []
    monkeypatch.setattr(tracking, "_insert", lambda *_: False)  # as servers have it

    def counted(self, run_id, metrics=(), params=(), tags=(), **options):
        sizes.append((len(metrics), len(params)))
        return real(self, run_id, metrics, params, tags, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    many = point(0, params={f"key.{i}": "x" * (9000 if i == 0 else 1) for i in range(250)})
    many["history"] = {"loss": [(step, step / 7) for step in range(1700)]}
    runs, histories = report(runs_dir, [many])
    assert len(runs["p0"].data.params) == 250
    assert len(runs["p0"].data.params["key.0"]) == 6000
    assert histories["p0", "loss"] == [(step, step / 7) for step in range(1700)]
    assert sizes == [(0, 0), (800, 100), (800, 100), (101, 50)]


def test_an_sqlite_store_gets_what_a_server_gets(runs_dir, monkeypatch):
    found = []
    monkeypatch.setattr(tracking, "_insert", lambda *_: False)
    for name in ("server", "sqlite"):
        history = {"loss": [(2, 0.5), (0, 1.5), (1, 9.0)], "a/b c": [(0, -1.0)]}
        runs, values = report(runs_dir, [point(0, id=name, history=history, tags={"x": "y"})])
        data = runs[name].data
        tags = {key: value for key, value in data.tags.items() if not key.startswith(("dynexit", "mlflow"))}
        found.append((data.metrics, data.params, tags, runs[name].info.status, sorted(values[name, "loss"])))
        monkeypatch.undo()
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert found[0] == found[1]
    assert found[1][0]["loss"] == 0.5  # of the last step


@pytest.mark.slow
def test_reporting_to_a_server_is_repeatable(runs_dir, monkeypatch, tmp_path):
    """A real server, which MLFLOW_TRACKING_URI names."""
    port = tracking._free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += [
        "--backend-store-uri",
        f"sqlite:///{runs_dir}/mlflow.db",
        "--artifacts-destination",
        str(tmp_path / "a"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            while not tracking._answers(port):
                time.sleep(0.2)
                assert server.poll() is None
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
            first = report(runs_dir, [point(0), point(1)])
            second = report(runs_dir, [point(0), point(1)])
        finally:
            os.killpg(server.pid, signal.SIGTERM)
    assert ids(second[0]) == ids(first[0])
    assert second[1] == first[1]
    assert set(second[0]) == {None, "p0", "p1"}
    assert second[0]["p1"].data.metrics["test_accuracy"] == 0.91


def test_an_experiment_deleted_in_the_page_comes_back(runs_dir):
    report(runs_dir, [point(0)])
    client = client_of(runs_dir)
    client.delete_experiment(client.get_experiment_by_name("digits").experiment_id)
    runs, _ = report(runs_dir, [point(0)])
    assert set(runs) == {None, "p0"}


def test_telemetry_is_off_whatever_was_set(runs_dir, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    report(runs_dir, [])
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_failure_is_one_sentence_that_says_the_report_is_safe(runs_dir, monkeypatch):
    (runs_dir / "mlflow.db").write_bytes(b"not a database, " * 99)
    with pytest.raises(Failure) as failure:
        report(runs_dir, [point(0)])
    assert str(failure.value) == (
        f"MLflow at sqlite:///{runs_dir}/mlflow.db did not take the results: (sqlite3.DatabaseError) file is not a "
        f"database; the report in {runs_dir}/report is complete, so fix {runs_dir}/mlflow.db, or move it aside, and "
        "report again"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9/")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Failure, match=re.escape("MLflow at http://127.0.0.1:9/ did not take")) as failure:
        report(runs_dir, [point(0)])
    assert "secret" not in str(failure.value)
    assert "check MLFLOW_TRACKING_URI" in str(failure.value)


def test_the_address_is_the_variable_or_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert default_tracking_uri(tmp_path) == "http://there:5000"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_flatten():
    assert flatten({"a": 1, "b": {"c": [2], "d": {"e": None}}, "f": {}}) == {"a": 1, "b.c": [2], "b.d.e": None}


def test_one_writer_at_a_time(tmp_path):
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    program = (
        "import sys, time; from dynexit.report.tracking import _one_writer\n"
        "with _one_writer(sys.argv[1]): print('in', flush=True); time.sleep(0.2); print('out', flush=True)"
    )
    with (tmp_path / "log").open("w") as log:
        writers = [subprocess.Popen([sys.executable, "-c", program, uri], stdout=log) for _ in range(3)]
        assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 3
    with tracking._one_writer("http://there"):
        pass


def _log_one(folder: Path, study_id: str) -> None:
    log_study(default_tracking_uri(folder), {"id": study_id, "name": "digits"}, [{"id": study_id}], folder / "report")


def test_processes_that_start_on_a_fresh_database_all_succeed(tmp_path, empty_database, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "report").mkdir()
    # forked, so that mlflow is imported once for all
    forked = multiprocessing.get_context("fork")
    writers = [forked.Process(target=_log_one, args=(tmp_path, f"s{index}")) for index in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    client = client_of(tmp_path)
    assert len(client.search_runs([client.get_experiment_by_name("digits").experiment_id])) == 6
