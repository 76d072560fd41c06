"""A study's finished results in MLflow: one run for the study, one below it for every point.

mlflow takes seconds to import, so that happens inside the calls, with its telemetry turned off before.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Required, TypedDict

from dynexit.errors import Failure
from dynexit.report.terminal import open_page
from dynexit.run_dir import sha256_file

STUDY_TAG, POINT_TAG, CONTENT_TAG = "dynexit.study_id", "dynexit.point_id", "dynexit.content"
_PARENT_TAG = "mlflow.parentRunId"
_SQLITE = "sqlite:///"
# MLflow takes 1000 values in a batch, 100 of them params and 100 tags, and params of so many characters.
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 800, 100, 6000


class TrackedPoint(TypedDict, total=False):
    """What is written to MLflow for a point. `history` holds (step, value) pairs for every metric that was followed.

    `span` is when its training started and ended, in seconds since 1970.
    """

    id: Required[str]
    name: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    history: Mapping[str, Sequence[tuple[int, float]]]
    artifacts: Sequence[Path]
    tags: Mapping[str, str]
    span: tuple[float, float]


def default_tracking_uri(runs_dir: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else the sqlite file mlflow.db in `runs_dir`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{runs_dir.resolve() / 'mlflow.db'}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def log_study(tracking_uri: str, study: TrackedPoint, points: Sequence[TrackedPoint], report_dir: Path) -> None:
    """Writes the study and its points to MLflow, with the files of `report_dir` as the study's artifacts.

    The experiment is the study's name. Runs are found by their tags (study and point id), so reporting again writes
    nothing where nothing changed and updates the same runs where something did (MLflow keeps a metric's earlier values
    in its history); only a run whose params changed is replaced, for MLflow's params cannot be. Artifacts of an
    sqlite store lie beside it in mlartifacts. Calls on one sqlite file wait for each other.
    Raises Failure whatever goes wrong in MLflow: the report itself does not depend on it.
    """
    files = sorted(path for path in report_dir.iterdir() if path.is_file() and not path.name.startswith("."))
    try:
        with _one_writer(tracking_uri):
            _log(tracking_uri, {**study, "artifacts": files}, points)
    except Exception as error:  # whatever mlflow, its database or its server raise
        reason = first_line(error)
        path = _sqlite_path(tracking_uri)
        remedy = "check MLFLOW_TRACKING_URI" if path is None else f"fix {path}, or move it aside,"
        raise Failure(
            f"MLflow at {_without_password(tracking_uri)} did not take the results: {reason}; "
            f"the report in {report_dir} is complete, so {remedy} and report again"
        ) from error


@contextlib.contextmanager
def _one_writer(tracking_uri: str) -> Iterator[None]:
    """Holds a lock beside an sqlite file: processes that race to create its tables crash in the migrations."""
    path = _sqlite_path(tracking_uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sqlite_path(tracking_uri: str) -> Path | None:
    return Path(tracking_uri.removeprefix(_SQLITE)) if tracking_uri.startswith(_SQLITE) else None


def _client(tracking_uri: str) -> Any:
    # assigned, not defaulted: nobody's results are sent anywhere
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # the defaults let an absent server hold the report up for many minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri)


def _log(tracking_uri: str, study: TrackedPoint, points: Sequence[TrackedPoint]) -> None:
    client = _client(tracking_uri)
    experiment_id = _experiment(client, study.get("name", study["id"]), _sqlite_path(tracking_uri))
    runs = _runs(client, experiment_id, study["id"])
    tags = {STUDY_TAG: study["id"]}
    parent_id = _write_run(client, experiment_id, runs.get(""), study, {**study.get("tags", {}), **tags})
    for point in points:
        child_tags = {**point.get("tags", {}), **tags, POINT_TAG: point["id"], _PARENT_TAG: parent_id}
        _write_run(client, experiment_id, runs.get(point["id"]), point, child_tags)


def _experiment(client: Any, name: str, path: Path | None) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = None if path is None else (path.resolve().parent / "mlartifacts" / name).as_uri()
        return str(client.create_experiment(name, artifact_location=location))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def _runs(client: Any, experiment_id: str, study_id: str) -> dict[str, Any]:
    """The study's runs by point id; the study's own under the empty one."""
    runs: dict[str, Any] = {}
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], f"tags.`{STUDY_TAG}` = '{study_id}'", max_results=1000, page_token=token
        )
        runs.update({run.data.tags.get(POINT_TAG, ""): run for run in page})
        token = page.token
        if not token:
            return runs


def _write_run(client: Any, experiment_id: str, run: Any, point: TrackedPoint, tags: Mapping[str, str]) -> str:
    """Returns the id of the run that now holds `point`. The content's tag is last: torn writes are repeated."""
    params = {key: _param(value) for key, value in point.get("params", {}).items()}
    content = _content(point, params, tags)
    if run is not None and run.data.tags.get(CONTENT_TAG) == content:
        return str(run.info.run_id)
    if run is not None and any(run.data.params.get(key, value) != value for key, value in params.items()):
        client.delete_run(run.info.run_id)
        run = None
    if run is None:
        run = _create_run(client, experiment_id, point, tags)
    run_id = str(run.info.run_id)
    for path in point.get("artifacts", ()):
        client.log_artifact(run_id, str(path))
    is_over = run.info.status == "FINISHED"
    ended = None if is_over else _milliseconds(point)[1] or int(1000 * time.time())
    _write_values(client, run, point, params, {**tags, CONTENT_TAG: content}, ended)
    return run_id


def _create_run(client: Any, experiment_id: str, point: TrackedPoint, tags: Mapping[str, str]) -> Any:
    name, start = point.get("name", point["id"]), _milliseconds(point)[0]
    return client.create_run(experiment_id, start_time=start, tags=dict(tags), run_name=name)


def _milliseconds(point: TrackedPoint) -> tuple[int | None, int | None]:
    """When the point's training started and ended, as MLflow has times."""
    start, end = point.get("span", (None, None))
    return None if start is None else int(1000 * start), None if end is None else int(1000 * end)


def _write_values(
    client: Any,
    run: Any,
    point: TrackedPoint,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    ended: int | None = None,
) -> None:
    """Writes the params and metrics that the run does not hold yet, in few large batches, and last of all the tags.

    `ended` is the time in ms at which the run ended, if that is not known to MLflow yet.
    """
    from mlflow.entities import Metric, Param, RunTag

    run_id, now = run.info.run_id, int(1000 * time.time())
    values = [(key, 0, float(value)) for key, value in point.get("metrics", {}).items()]
    for key, followed in point.get("history", {}).items():
        values += [(key, int(step), float(value)) for step, value in followed]
    held = {
        (key, metric.step, metric.value)
        for key in run.data.metrics
        for metric in client.get_metric_history(run_id, key)
    }
    metrics = [Metric(key, value, now, step) for key, step, value in values if (key, step, value) not in held]
    fresh = [Param(key, value) for key, value in params.items() if key not in run.data.params]
    if (path := _sqlite_path(client.tracking_uri)) is not None and _insert(path, run_id, metrics, fresh, tags, ended):
        return
    if ended is not None:
        client.set_terminated(run_id, end_time=ended)
    while len(fresh) > _MOST_PARAMS or len(metrics) > _MOST_METRICS:
        client.log_batch(run_id, metrics=metrics[:_MOST_METRICS], params=fresh[:_MOST_PARAMS])
        metrics, fresh = metrics[_MOST_METRICS:], fresh[_MOST_PARAMS:]
    client.log_batch(run_id, metrics, fresh, [RunTag(key, value) for key, value in tags.items()])


def _insert(
    path: Path,
    run_id: str,
    metrics: Sequence[Any],
    params: Sequence[Any],
    tags: Mapping[str, str],
    ended: int | None,
) -> bool:
    """Puts values into MLflow's tables, ten times as fast as MLflow does. False, with nothing done, if that fails.

    The latest value of a metric is that of the last step; of one step, of the last time; of one time, the greatest.
    """
    rows = [(one.key, one.value, one.timestamp, run_id, one.step) for one in metrics]
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as database, database:
            database.executemany(_INSERT, rows)
            database.execute(_LATEST, (run_id,))
            if ended is not None:
                database.execute(_FINISH, (ended, run_id))
            for table, values in (("params", ((one.key, one.value) for one in params)), ("tags", tags.items())):
                command = f"INSERT OR REPLACE INTO {table} (key, value, run_uuid) VALUES (?, ?, ?)"
                database.executemany(command, [(key, value, run_id) for key, value in values])
    except sqlite3.Error:  # a version of MLflow with other tables
        return False
    return True


_INSERT = "INSERT OR IGNORE INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES (?, ?, ?, ?, ?, 0)"
_FINISH = "UPDATE runs SET status = 'FINISHED', end_time = ? WHERE run_uuid = ?"
_LATEST = """
    INSERT OR REPLACE INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid)
    SELECT key, value, timestamp, step, is_nan, run_uuid FROM (
        SELECT *, row_number() OVER (PARTITION BY key ORDER BY step DESC, timestamp DESC, value DESC) AS place
        FROM metrics WHERE run_uuid = ?
    ) WHERE place = 1
"""


def _content(point: TrackedPoint, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
    """A hash of everything that is written to a run, the bytes of its artifacts included."""
    artifacts = {path.name: sha256_file(path) for path in point.get("artifacts", ())}
    content = [params, point.get("metrics", {}), point.get("history", {}), artifacts, tags, point.get("name", "")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _param(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_PARAM else text[: _LONGEST_PARAM - 1] + "…"


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, without passwords."""
    return _without_password((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


class LiveRuns:
    """The runs of points that are being trained: epochs are appended, and `log_study` writes the rest at the end."""

    def __init__(self, tracking_uri: str, study: str, points: Sequence[TrackedPoint]) -> None:
        """Finds the runs, or creates them. Raises whatever MLflow raises."""
        self._client, self._uri = _client(tracking_uri), tracking_uri
        with _one_writer(tracking_uri):
            experiment_id = _experiment(self._client, study, _sqlite_path(tracking_uri))
            self._runs = _runs(self._client, experiment_id, study)
            for point in points:
                if point["id"] not in self._runs:
                    tags = {**point.get("tags", {}), STUDY_TAG: study, POINT_TAG: point["id"]}
                    self._runs[point["id"]] = _create_run(self._client, experiment_id, point, tags)

    def append(self, points: Sequence[TrackedPoint]) -> None:
        """Writes the `history` of each point that its run does not hold yet, one batch per run."""
        with _one_writer(self._uri):
            for point in points:
                _write_values(self._client, self._runs[point["id"]], point, {}, {})


def serve(tracking_uri: str, experiment: str) -> int:
    """Runs MLflow's pages on a store until it is interrupted, and opens that of the experiment; the exit status.

    Pages of a server that runs already are only opened. Raises Failure for a store that does not answer.
    """
    try:
        found = _client(tracking_uri).get_experiment_by_name(experiment)
    except Exception as error:  # whatever mlflow, its database or its server raise
        place = _without_password(tracking_uri)
        raise Failure(f"MLflow at {place} does not answer: {first_line(error)}; check the address") from error
    place = "" if found is None else f"/#/experiments/{found.experiment_id}"
    if found is None:
        print(f"MLflow at {_without_password(tracking_uri)} has no results of {experiment} yet")
    if tracking_uri.startswith(("http://", "https://")):
        open_page(f"{tracking_uri.rstrip('/')}{place}")
        return 0
    port = _free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven processes that no page needs
    with subprocess.Popen(command, stdout=sys.stderr, env=environment) as server:
        for number in (signal.SIGINT, signal.SIGTERM):  # either ends the server too
            signal.signal(number, signal.default_int_handler)
        try:
            while server.poll() is None and not _answers(port):
                time.sleep(0.2)
            if server.poll() is None:
                print("MLflow's page has no login: all users of this machine can read and change what it shows")
                open_page(f"http://127.0.0.1:{port}{place}")
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()


def _free_port() -> int:
    """MLflow's usual port if it is free, else any."""
    for wanted in (5000, 0):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", wanted))
            port: int = one.getsockname()[1]
            return port
    raise Failure("no port of this machine is free")


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
