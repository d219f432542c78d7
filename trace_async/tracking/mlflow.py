"""Log a run's figures to `<run_dir>/metrics.jsonl` at once, and to MLflow from a thread.

The file is the source of truth (`tracking/log.py`). MLflow gets the same points through a queue, so that the trainer
never waits for it. When the tracking server does not answer, one warning says so, the points wait, and training goes
on. A resumed run goes on in the same MLflow run: the thread asks what is there already, adds what the file has and
MLflow lacks, and logs no (metric, step) twice.
"""

import atexit
import concurrent.futures.thread  # noqa: F401  (mlflow needs it; at exit, when it may be wanted first, it cannot be imported)
import logging
import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal

from trace_async.config import Config, config_to_dict, config_to_yaml
from trace_async.tracking.log import METRICS_FILE, Point, point_line, read_metrics, write_metrics, write_whole

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

RUN_ID_FILE = "mlflow_run_id"
RETRY_S = 20.0
FINISH_LIMIT_S = 60.0
MAX_BATCH = 900  # MLflow takes at most 1000 metrics a request

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
Log = Callable[[str], None]


def tracking_uri(config: Config) -> str:
    """Return `tracking.uri`, or the address of a sqlite store beside the runs."""
    return config.tracking.uri or f"sqlite:///{Path(config.output_dir).absolute() / 'mlflow.db'}"


def ui_command(config: Config) -> str:
    """Return the command that shows the runs in a browser, reachable from this machine only."""
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri(config))} --host 127.0.0.1"


def saved_run_id(run_dir: str | Path) -> str | None:
    """Return the MLflow run that `run_dir` was logged to (None: there was none yet).

    `Tracker.start(resume_run_id=…)` takes it.
    """
    path = Path(run_dir) / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


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
        print(f"MLflow run {run_id} could not be ended: {_first_line(error)}")


class Tracker:
    """Logs one run. Its methods return at once; only `finish` waits, at most a minute, until MLflow has everything."""

    def __init__(self, run_dir: Path, mirror: "_MlflowMirror") -> None:
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._mirror = mirror
        self._finished = False
        # Points reach the file at once; this gives MLflow the rest when the process ends without `finish`.
        atexit.register(self.finish, "KILLED")

    @classmethod
    def start(
        cls,
        config: Config,
        run_dir: str | Path,
        *,
        resume_run_id: str | None = None,
        resume_step: int | None = None,
        parent_run_id: str | None = None,
        log: Log = print,
    ) -> "Tracker":
        """Begin the log of `run_dir`, or go on with it.

        `resume_step` is the step of the checkpoint that training goes on from. Later points in the file belong to work
        that is done again, so they are dropped. None begins a new run, and raises ValueError when the directory
        already holds points. `parent_run_id` is the MLflow run of a comparison (default: the environment variable
        TRACE_ASYNC_PARENT_RUN).
        """
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = read_metrics(run_dir)
        if resume_step is not None:
            kept = [point for point in kept if point.step <= resume_step]
        elif kept and resume_run_id is None:
            raise ValueError(f"{run_dir} already holds a run; resume it, or choose another name or output_dir")
        write_metrics(run_dir, kept)
        parent = parent_run_id or os.environ.get("TRACE_ASYNC_PARENT_RUN") or None
        mirror = _MlflowMirror(config, run_dir, resume_run_id, parent, kept, log)
        mirror.thread.start()
        return cls(run_dir, mirror)

    @property
    def run_id(self) -> str | None:
        """The MLflow run (None until the tracking store has answered; `saved_run_id` finds it later)."""
        return self._mirror.run_id

    def wait_for_run_id(self, timeout_s: float = FINISH_LIMIT_S) -> str | None:
        """Wait until there is an MLflow run and return it, for child runs to name.

        Returns None when the store did not answer in time.
        """
        self._mirror.connected.wait(timeout_s)
        return self._mirror.run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line to metrics.jsonl and queue the same for MLflow."""
        point = Point(step, time.time(), {key: float(value) for key, value in metrics.items()})
        self._file.write(point_line(point))
        self._file.flush()
        self._mirror.queue.put(point)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Copy a file or directory to the run's artifacts.

        The thread copies it later, so it must stay unchanged for the next seconds.
        """
        self._mirror.queue.put(_Artifact(folder, Path(path), None))

    def log_text(self, text: str, artifact_file: str) -> None:
        """Keep `text` as an artifact, for example `log_text(html, "trees/update_000010.html")`."""
        self._mirror.queue.put(_Artifact(artifact_file, None, text))

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """Send MLflow what is left, and end the run there. Logs what is missing when it cannot.

        Calls after the first do nothing.
        """
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self.finish)
        self._file.close()
        self._mirror.finish(status)


@dataclass(frozen=True, slots=True)
class _Artifact:
    """Something to keep beside the figures: a file or directory (`path`) or a text."""

    target: str
    """The folder for a path, or the file's name for a text, among the run's artifacts."""
    path: Path | None
    text: str | None


class _MlflowMirror:
    """Repeats a run's log to MLflow in a thread. Everything that may block or fail happens in that thread."""

    def __init__(
        self, config: Config, run_dir: Path, run_id: str | None, parent: str | None, kept: list[Point], log: Log
    ) -> None:
        self.queue: SimpleQueue[Point | _Artifact | RunStatus] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self.run_id = run_id
        self.connected = threading.Event()
        self._config = config
        self._run_dir = run_dir
        self._parent = parent
        self._points = list(kept)
        self._artifacts: list[_Artifact] = []
        self._logged: set[tuple[str, int]] = set()
        self._client: MlflowClient | None = None
        self._monitor: SystemMetricsMonitor | None = None
        self._log = log
        self._warned = False

    def finish(self, status: RunStatus) -> None:
        self.queue.put(status)
        self.thread.join(FINISH_LIMIT_S)
        left = sum(len(point.metrics) for point in self._points), len(self._artifacts)
        if self.thread.is_alive() or any(left):
            self._log(
                f"MLflow at {tracking_uri(self._config)} lacks {left[0]} points and {left[1]} artifacts of this run; "
                f"all points are in {self._run_dir / METRICS_FILE}"
            )

    def _work(self) -> None:
        """Wait for work, send it to MLflow, and keep what could not be sent. Ends after a status, with a last try."""
        quiet_mlflow()
        status: RunStatus | None = None
        self._try(status)
        while status is None:
            idle = self._client is not None and not self._points and not self._artifacts
            status = self._collect(None if idle else RETRY_S)
            self._try(status)

    def _collect(self, timeout_s: float | None) -> RunStatus | None:
        """Wait for work, at most `timeout_s`, and take all that is there. Returns a status if one ends the log."""
        try:
            work = self.queue.get(timeout=timeout_s)
            while True:
                if isinstance(work, Point):
                    self._points.append(work)
                elif isinstance(work, _Artifact):
                    self._artifacts.append(work)
                else:
                    return work
                work = self.queue.get_nowait()
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
                    f"MLflow at {tracking_uri(self._config)} does not take this run's figures; training goes on and "
                    f"they are kept in {self._run_dir / METRICS_FILE}. The cause: {_first_line(error)}"
                )
            self._warned = True

    def _connect(self) -> "MlflowClient":
        """Open the store, make the run or find it again, and ask which points it has."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=tracking_uri(self._config))
        if self.run_id is None:
            self.run_id = self._create_run(client)
            write_whole(self._run_dir / RUN_ID_FILE, self.run_id + "\n")
        else:
            client.update_run(self.run_id, status="RUNNING")
            for key in client.get_run(self.run_id).data.metrics:
                self._logged |= {(key, metric.step) for metric in client.get_metric_history(self.run_id, key)}
        if self._config.tracking.system_metrics:
            self._monitor = self._start_monitor(self.run_id)
        self.connected.set()
        return client

    def _create_run(self, client: "MlflowClient") -> str:
        from mlflow.entities import Param

        tags = {"mlflow.source.name": "trace-async", "run_dir": str(self._run_dir.absolute())}
        if self._parent is not None:
            tags["mlflow.parentRunId"] = self._parent
        run = client.create_run(experiment_id(client, self._config), run_name=self._config.name, tags=tags)
        params = [Param(_key(k), v) for k, v in _flatten(config_to_dict(self._config)).items()]
        for start in range(0, len(params), 100):
            client.log_batch(run.info.run_id, params=params[start : start + 100], synchronous=True)
        client.log_text(run.info.run_id, config_to_yaml(self._config), "config.yaml")
        return run.info.run_id

    def _start_monitor(self, run_id: str) -> "SystemMetricsMonitor":
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=tracking_uri(self._config))
        monitor.start()
        return monitor

    def _hand_on(self, client: "MlflowClient") -> None:
        from mlflow.entities import Metric

        assert self.run_id is not None
        while self._points:
            batch: list[Metric] = []
            taken = 0
            for point in self._points:
                if batch and len(batch) + len(point.metrics) > MAX_BATCH:
                    break
                batch += [
                    Metric(_key(key), value, round(point.time * 1000), point.step)
                    for key, value in point.metrics.items()
                    if (_key(key), point.step) not in self._logged
                ]
                taken += 1
            if batch:
                client.log_batch(self.run_id, metrics=batch, synchronous=True)
            self._logged |= {(metric.key, metric.step) for metric in batch}
            del self._points[:taken]
        while self._artifacts:
            self._hand_on_artifact(client, self.run_id, self._artifacts[0])
            del self._artifacts[0]

    def _hand_on_artifact(self, client: "MlflowClient", run_id: str, artifact: _Artifact) -> None:
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
    for name in ("mlflow", "alembic"):  # in case somebody has imported them before
        logging.getLogger(name).setLevel(logging.ERROR)


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


def _key(name: str) -> str:
    return re.sub(r"[^\w./ :-]", "_", name)  # what MLflow allows


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
