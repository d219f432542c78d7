"""Log a run's figures to `<run_dir>/metrics.jsonl` at once, and to MLflow from a thread.

The file is the source of truth (`tracking/log.py`). MLflow gets the same points through a queue, so that the trainer
never waits for it. When the tracking server does not answer, one warning says so, the points wait, and training goes
on. One item that the server refuses is named and left out, and what comes after it goes on. A resumed run goes on in
the same MLflow run: the thread asks what is there already, adds what the file has and MLflow lacks, and logs no
(metric, step) twice.
"""

import atexit
import concurrent.futures.thread  # noqa: F401  (mlflow needs it; at exit, when it may be wanted first, it cannot be imported)
import contextlib
import os
import shlex
import time
from collections.abc import Mapping
from pathlib import Path

from trace_async.config import Config
from trace_async.tracking.log import METRICS_FILE, Point, point_line, read_metrics, write_metrics
from trace_async.tracking.mlflow_mirror import (
    FINISH_LIMIT_S,
    RUN_ID_FILE,
    Artifact,
    Log,
    MlflowMirror,
    RunStatus,
    first_line,
    quiet_mlflow,
    tracking_uri,
)


def ui_command(config: Config) -> str:
    """Return the command that shows the runs in a browser, reachable from this machine only."""
    return f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri(config))} --host 127.0.0.1"


def saved_run_id(run_dir: str | Path) -> str | None:
    """Return the MLflow run that `run_dir` was logged to (None: there was none yet).

    `Tracker.start(resume_run_id=…)` takes it.
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


class Tracker:
    """Logs one run. Its methods return at once; only `finish` waits, at most a minute, until MLflow has everything."""

    def __init__(self, run_dir: Path, mirror: "MlflowMirror") -> None:
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
        mirror = MlflowMirror(config, run_dir, resume_run_id, parent, kept, log)
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
        self._mirror.queue.put(Artifact(folder, Path(path), None))

    def log_text(self, text: str, artifact_file: str) -> None:
        """Keep `text` as an artifact, for example `log_text(html, "trees/update_000010.html")`."""
        self._mirror.queue.put(Artifact(artifact_file, None, text))

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """Send MLflow what is left, and end the run there. Logs what is missing when it cannot.

        Calls after the first do nothing.
        """
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self.finish)
        with contextlib.suppress(OSError):  # a disk without room for the end of a line has been named already
            self._file.close()
        self._mirror.finish(status)
