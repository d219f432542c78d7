"""Repeat a run's log to MLflow in a thread: batches, names that MLflow takes, and what it refuses."""

import logging
import os
import posixpath
import re
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import xxhash

from trace_async.config import Config, config_to_dict, config_to_yaml
from trace_async.printable import printable
from trace_async.tracking.log import METRICS_FILE, write_whole
from trace_async.tracking.mlflow_records import log_datasets, log_policy, log_trace
from trace_async.tracking.records import DatasetRecord, RolloutRecord
from trace_async.tracking.tracker import FINISH_LIMIT_S, Artifact, RunStatus, TrackedRun
from trace_async.types import Point

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

RUN_ID_FILE = "mlflow_run_id"
RETRY_S = 20.0
MAX_METRICS = 900
"""Metrics of a request; MLflow takes at most 1,000."""
MAX_PARAMS = 100
"""Parameters of a request, as many as MLflow takes."""
MAX_KEY = 240
"""Characters of a name; MLflow takes at most 250."""
MAX_NAMED = 20
"""Refused items that are named one by one; of further ones only the last words tell, with their number."""
_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST"})
"""MLflow's error codes for what a server will not take however often it is tried."""

Item = TypeVar("Item", "Metric", "Param")


def tracking_uri(config: Config) -> str:
    """Return `tracking.uri`, or the address of a sqlite store beside the runs."""
    return config.tracking.uri or f"sqlite:///{Path(config.output_dir).absolute() / 'mlflow.db'}"


@dataclass(frozen=True, slots=True)
class _Extra:
    """What is no figure, and how MLflow is given it: with a client and the run's id."""

    name: str
    hand_on: "Callable[[MlflowClient, str], None]"


class MlflowTracker:
    """Repeats a run's log to MLflow in a thread. Everything that may block or fail happens in that thread."""

    def __init__(self, run: TrackedRun) -> None:
        self.run_id = run.run_id
        self._queue: SimpleQueue[Point | _Extra | RunStatus] = SimpleQueue()
        self._connected = threading.Event()
        self._config = run.config
        self._uri = tracking_uri(run.config)
        self._run_dir = run.run_dir
        self._parent = run.parent_run_id
        self._points = list(run.kept)
        self._extras: list[_Extra] = []
        self._logged: set[tuple[str, int]] = set()
        self._client: MlflowClient | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._log = run.log
        self._warned = False
        self._num_refused = 0
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, point: Point) -> None:
        self._queue.put(point)

    def keep(self, artifact: Artifact) -> None:
        self._queue.put(self._extra(artifact))

    def _extra(self, artifact: Artifact) -> _Extra:
        return _Extra(str(artifact.path or artifact.target), partial(self._hand_on_artifact, artifact))

    def show(self, rollouts: Sequence[RolloutRecord]) -> None:
        for rollout in rollouts:
            self._queue.put(_Extra("a rollout", partial(log_trace, self._uri, rollout)))

    def use(self, datasets: Sequence[DatasetRecord]) -> None:
        self._queue.put(_Extra("the datasets", partial(log_datasets, datasets)))

    def keep_policy(self, folder: Path) -> None:
        run_id = self.wait_for_run_id(FINISH_LIMIT_S)
        try:
            if run_id is None:
                raise TimeoutError("it does not answer")
            log_policy(self._uri, run_id, self._config, folder)
        except Exception as error:  # noqa: BLE001  MLflow, transformers and their stores; a run that ended well stays so
            self._log(f"MLflow at {self._uri} has no model of this run, the policy is in {folder}: {first_line(error)}")

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        self._connected.wait(timeout_s)
        return self.run_id

    def finish(self, status: RunStatus) -> None:
        self._queue.put(status)
        self._thread.join(FINISH_LIMIT_S)
        if self._thread.is_alive():  # it hangs in a request: what still waits in the queue is lacking, too
            self._collect(0.0)
            self._queue.put(status)
        left = sum(len(point.metrics) for point in self._points), len(self._extras)
        if self._thread.is_alive() or any(left):
            self._log(
                f"MLflow at {self._uri} lacks {left[0]} points and {left[1]} artifacts of this run; "
                f"all points are in {self._run_dir / METRICS_FILE}"
            )
        if self._num_refused > MAX_NAMED:
            self._log(f"MLflow at {self._uri} refused {self._num_refused} items of this run in all")

    def _work(self) -> None:
        """Wait for work, send it to MLflow, and keep what could not be sent. Ends after a status, with a last try."""
        quiet_mlflow()
        status: RunStatus | None = None
        self._try(status)
        while status is None:
            idle = self._client is not None and not (self._points or self._extras)
            status = self._collect(None if idle else RETRY_S)
            self._try(status)

    def _collect(self, timeout_s: float | None) -> RunStatus | None:
        """Wait for work, at most `timeout_s`, and take all that is there. Returns a status if one ends the log."""
        try:
            work = self._queue.get(timeout=timeout_s)
            while True:
                if isinstance(work, Point):
                    self._points.append(work)
                elif isinstance(work, _Extra):
                    self._extras.append(work)
                else:
                    return work
                work = self._queue.get_nowait()
        except Empty:
            return None

    def _try(self, status: RunStatus | None) -> None:
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            self._client = self._client or self._connect()
            self._hand_on(self._client)
            if status is not None:
                self._end(self._client, status)
            if self._warned:
                self._log("MLflow takes this run's figures again; none is lost")
            self._warned = False
        except (MlflowException, SQLAlchemyError, OSError) as error:
            if not self._warned:
                self._log(
                    f"MLflow at {self._uri} does not take this run's figures; training goes on and "
                    f"they are kept in {self._run_dir / METRICS_FILE}. The cause: {first_line(error)}"
                )
            self._warned = True

    def _connect(self) -> "MlflowClient":
        """Open the store, make the run or find it again, and ask which points it has."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self._uri)
        if self.run_id is None:
            self.run_id = self._create_run(client)
            write_whole(self._run_dir / RUN_ID_FILE, self.run_id + "\n")
        else:
            client.update_run(self.run_id, status="RUNNING")
            for key in client.get_run(self.run_id).data.metrics:
                self._logged |= {(key, metric.step) for metric in client.get_metric_history(self.run_id, key)}
        if self._config.tracking.system_metrics:
            self._monitor = self._start_monitor(self.run_id)
        self._connected.set()
        return client

    def _create_run(self, client: "MlflowClient") -> str:
        from mlflow.entities import Param

        tags = {"mlflow.source.name": "trace-async", "run_dir": str(self._run_dir.absolute())}
        if self._parent is not None:
            tags["mlflow.parentRunId"] = self._parent
        run_id: str = client.create_run(
            experiment_id(client, self._config), run_name=self._config.name, tags=tags
        ).info.run_id
        params = [Param(key_of(name), value) for name, value in _flatten(config_to_dict(self._config)).items()]
        self._send(params, lambda some: client.log_batch(run_id, params=some, synchronous=True), MAX_PARAMS)
        self._extras.insert(0, self._extra(Artifact("config.yaml", None, config_to_yaml(self._config))))
        return run_id

    def _start_monitor(self, run_id: str) -> "SystemMetricsMonitor":
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self._uri)
        monitor.start()
        return monitor

    def _hand_on(self, client: "MlflowClient") -> None:
        from mlflow.exceptions import MlflowException

        run_id = self.run_id
        assert run_id is not None

        def log_batch(metrics: list["Metric"]) -> None:
            client.log_batch(run_id, metrics=metrics, synchronous=True)
            self._logged |= {(metric.key, metric.step) for metric in metrics}

        while self._points:
            taken, metrics = self._next_metrics()
            self._send(metrics, log_batch, MAX_METRICS)
            del self._points[:taken]
        failed: list[_Extra] = []
        error: Exception | None = None
        for extra in self._extras:
            try:
                extra.hand_on(client, run_id)
            except (MlflowException, OSError) as caught:
                if _is_refusal(caught):
                    self._leave_out(extra.name, caught)
                else:
                    failed, error = [*failed, extra], caught
        self._extras = failed
        if error is not None:
            raise error

    def _next_metrics(self) -> tuple[int, list["Metric"]]:
        """Return how many points come next, about a request of them, and the figures of these that MLflow lacks."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        for taken, point in enumerate(self._points):
            if metrics and len(metrics) + len(point.metrics) > MAX_METRICS:
                return taken, metrics
            metrics += [
                Metric(key, value, round(point.time * 1000), point.step)
                for key, value in ((key_of(name), value) for name, value in point.metrics.items())
                if (key, point.step) not in self._logged
            ]
        return len(self._points), metrics

    def _send(self, items: Sequence[Item], send: Callable[[list[Item]], None], most: int) -> None:
        """Send `items`, at most `most` at a time. What the store refuses by itself is named and left out."""
        from mlflow.exceptions import MlflowException

        for start in range(0, len(items), most):
            some = list(items[start : start + most])
            try:
                send(some)
            except MlflowException as error:
                if not _is_refusal(error):
                    raise
                if len(some) > 1:
                    self._send(some, send, (len(some) + 1) // 2)
                else:
                    self._leave_out(some[0].key, error)

    def _leave_out(self, name: str, error: BaseException) -> None:
        self._num_refused += 1
        if self._num_refused <= MAX_NAMED:
            self._log(
                f"MLflow at {self._uri} refuses {printable(name, 300)}, which is left out there: {first_line(error)}"
            )

    def _hand_on_artifact(self, artifact: Artifact, client: "MlflowClient", run_id: str) -> None:
        if artifact.path is None:
            client.log_text(run_id, artifact.text or "", artifact.target)
        elif artifact.path.is_dir():
            client.log_artifacts(run_id, str(artifact.path), artifact.target or None)
        elif artifact.path.exists():
            client.log_artifact(run_id, str(artifact.path), artifact.target or None)
        else:
            self._log(f"{artifact.path} was gone before it could be kept as an artifact")

    def _end(self, client: "MlflowClient", status: RunStatus) -> None:
        assert self.run_id is not None
        if self._monitor is not None:
            self._monitor.finish()
        client.set_terminated(self.run_id, status=status)


def quiet_mlflow() -> None:
    """Turn off MLflow's telemetry, its chatter, and minutes of retries against a dead server.

    Must be called before mlflow is imported, because it reads these variables then.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    # The tracker has a thread of its own, and only what is sent in it can be tried again.
    os.environ.setdefault("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    for name in ("mlflow", "alembic"):  # in case somebody has imported them before
        logging.getLogger(name).setLevel(logging.ERROR)
    # It prints a whole traceback for what the mirror tells in a line, such as a disk without room for its database.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def ui_command(config: Config) -> str:
    """Return the command that shows the runs in a browser, reachable from this machine only."""
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri(config))} --host 127.0.0.1"


def saved_run_id(run_dir: str | Path) -> str | None:
    """Return the MLflow run that `run_dir` was logged to (None: there was none yet).

    `RunLog.start(resume_run_id=…)` takes it.
    """
    path = Path(run_dir) / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def run_status(config: Config, run_dir: Path) -> str | None:
    """Return what MLflow says of the run: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED. None: it was never there."""
    run_id = saved_run_id(run_dir)
    if run_id is None:
        return None
    quiet_mlflow()
    from mlflow import MlflowClient

    return str(MlflowClient(tracking_uri(config)).get_run(run_id).info.status)


def end_abandoned(config: Config, run_dir: Path) -> None:
    """End the MLflow run of a process that was killed; it would stay RUNNING. Prints a line when that fails."""
    run_id = saved_run_id(run_dir)
    if run_id is None:
        return
    quiet_mlflow()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient(tracking_uri(config)).set_terminated(run_id, status="FAILED")
    except MlflowException as error:
        print(f"MLflow run {run_id} could not be ended: {first_line(error)}")


def experiment_id(client: "MlflowClient", config: Config) -> str:
    """Return the id of the experiment `tracking.experiment`, which is made if it is new.

    With a sqlite store its artifacts lie under the output directory.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(config.tracking.experiment)
    if found is not None:
        return found.experiment_id
    # A server keeps artifacts where it was told to; the sqlite store would put them into the working directory.
    local = tracking_uri(config).startswith("sqlite:")
    location = (Path(config.output_dir).absolute() / "mlflow_artifacts").as_uri() if local else None
    try:
        return client.create_experiment(config.tracking.experiment, artifact_location=location)
    except MlflowException:
        # Another run may have made it in the meantime.
        found = client.get_experiment_by_name(config.tracking.experiment)
        if found is None:
            raise
        return found.experiment_id


def _flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)[:500]
    return flat


def key_of(name: str) -> str:
    """Return the name under which MLflow keeps a figure or a setting: the same where MLflow takes it.

    Elsewhere what it does not take becomes "_", and a checksum of the whole name tells it from others that look alike.
    """
    key = re.sub(r"[^\w./ :-]", "_", name, flags=re.ASCII)[:MAX_KEY]
    if posixpath.normpath(key) != key or key.startswith(("/", "..")) or key == ".":
        key = "/".join(part if part.strip(".") else "_" for part in key.split("/"))
    return key if key == name else f"{key[: MAX_KEY - 9]}_{xxhash.xxh32_hexdigest(name.encode(errors='surrogatepass'))}"


def _is_refusal(error: BaseException) -> bool:
    return getattr(error, "error_code", None) in _REFUSALS


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
