"""A study's finished results in MLflow: one run for the study, one below it for every point.

mlflow takes seconds to import, so that happens inside the calls, with its telemetry turned off before.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Required, TypedDict

from dynexit.errors import Failure
from dynexit.run_dir import sha256_file

STUDY_TAG, POINT_TAG, CONTENT_TAG = "dynexit.study_id", "dynexit.point_id", "dynexit.content"
_PARENT_TAG = "mlflow.parentRunId"
_SQLITE = "sqlite:///"
# MLflow takes 1000 values in a batch, 100 of them params and 100 tags, and params of so many characters.
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 800, 100, 6000


class TrackedPoint(TypedDict, total=False):
    """What is written to MLflow for a point. `history` holds (step, value) pairs for every metric that was followed."""

    id: Required[str]
    name: str
    params: Mapping[str, Any]
    metrics: Mapping[str, float]
    history: Mapping[str, Sequence[tuple[int, float]]]
    artifacts: Sequence[Path]
    tags: Mapping[str, str]


def default_tracking_uri(runs_dir: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else the sqlite file mlflow.db in `runs_dir`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{runs_dir.resolve() / 'mlflow.db'}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def log_study(
    tracking_uri: str,
    study_name: str,
    study_id: str,
    points: Sequence[TrackedPoint],
    report_dir: Path,
    params: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Writes the study and its points to MLflow, with the files of `report_dir` as the study's artifacts.

    The experiment is `study_name`. Runs are found by their tags (study and point id), so reporting again writes nothing
    where nothing changed and updates the same runs where something did (MLflow keeps a metric's earlier values in its
    history); only a run whose params changed is replaced, for MLflow's params cannot be. Artifacts of an sqlite store
    lie beside it in mlartifacts. Calls on one sqlite file wait for each other.
    Raises Failure whatever goes wrong in MLflow: the report itself does not depend on it.
    """
    # assigned, not defaulted: nobody's results are sent anywhere
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # the defaults let an absent server hold the report up for many minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    study: TrackedPoint = {
        "id": study_id,
        "name": study_name,
        "params": params or {},
        "metrics": metrics or {},
        "artifacts": sorted(path for path in report_dir.iterdir() if path.is_file() and not path.name.startswith(".")),
    }
    try:
        with _one_writer(tracking_uri):
            _log(tracking_uri, study_name, study, points)
    except Exception as error:  # whatever mlflow, its database or its server raise
        reason = _without_password((str(error).strip() or type(error).__name__).splitlines()[0])[:300]
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


def _log(tracking_uri: str, study_name: str, study: TrackedPoint, points: Sequence[TrackedPoint]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri)
    experiment_id = _experiment(client, study_name, _sqlite_path(tracking_uri))
    runs = _runs(client, experiment_id, study["id"])
    tags = {STUDY_TAG: study["id"]}
    parent_id = _write_run(client, experiment_id, runs.get(""), study, tags)
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
        run = client.create_run(experiment_id, tags=dict(tags), run_name=point.get("name", point["id"]))
    run_id = str(run.info.run_id)
    for path in point.get("artifacts", ()):
        client.log_artifact(run_id, str(path))
    if run.info.status != "FINISHED":
        client.set_terminated(run_id)
    _write_values(client, run, point, params, {**tags, CONTENT_TAG: content})
    return run_id


def _write_values(
    client: Any, run: Any, point: TrackedPoint, params: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    """Writes the params and metrics that the run does not hold yet, in few large batches, and last of all the tags."""
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
    while len(fresh) > _MOST_PARAMS or len(metrics) > _MOST_METRICS:
        client.log_batch(run_id, metrics=metrics[:_MOST_METRICS], params=fresh[:_MOST_PARAMS])
        metrics, fresh = metrics[_MOST_METRICS:], fresh[_MOST_PARAMS:]
    client.log_batch(run_id, metrics, fresh, [RunTag(key, value) for key, value in tags.items()])


def _content(point: TrackedPoint, params: Mapping[str, str], tags: Mapping[str, str]) -> str:
    """A hash of everything that is written to a run, the bytes of its artifacts included."""
    artifacts = {path.name: sha256_file(path) for path in point.get("artifacts", ())}
    content = [params, point.get("metrics", {}), point.get("history", {}), artifacts, tags, point.get("name", "")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _param(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_PARAM else text[: _LONGEST_PARAM - 1] + "…"


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)
