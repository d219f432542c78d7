"""Log a run's figures to `<run_dir>/metrics.jsonl` at once, and to the trackers that `tracking.backends` names.

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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trace_async.config import Config
from trace_async.tracking.log import METRICS_FILE, point_line, read_metrics, write_metrics
from trace_async.tracking.records import DatasetRecord, RolloutRecord
from trace_async.tracking.tracker import FINISH_LIMIT_S, Artifact, Log, RunStatus, TrackedRun, Tracker, make_tracker
from trace_async.types import Point


class RunLog:
    """Logs one run: to its file at once, and to its trackers, which take what is logged in threads of their own."""

    def __init__(self, run_dir: Path, trackers: Sequence[Tracker]) -> None:
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._trackers = trackers
        self._finished = False
        # Points reach the file at once; this gives trackers the rest when the process ends without `finish`.
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
    ) -> "RunLog":
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
        run = TrackedRun(
            config=config, run_dir=run_dir, kept=tuple(kept), run_id=resume_run_id, parent_run_id=parent, log=log
        )
        return cls(run_dir, [make_tracker(name, run) for name in config.tracking.backends])

    @property
    def run_id(self) -> str | None:
        """The MLflow run (None: there is none, or the store has not answered yet; `saved_run_id` finds it later)."""
        return self.wait_for_run_id(0.0)

    def wait_for_run_id(self, timeout_s: float = FINISH_LIMIT_S) -> str | None:
        """Wait until there is an MLflow run and return it, for child runs to name.

        Returns None when the store did not answer in time.
        """
        ids = (tracker.wait_for_run_id(timeout_s) for tracker in self._trackers)
        return next((run_id for run_id in ids if run_id is not None), None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line to metrics.jsonl and hand the same to the trackers."""
        point = Point(step, time.time(), {key: float(value) for key, value in metrics.items()})
        self._file.write(point_line(point))
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(point)

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Copy a file or directory to the run's artifacts.

        It is copied later, so it must stay unchanged for the next seconds.
        """
        for tracker in self._trackers:
            tracker.keep(Artifact(folder, Path(path), None))

    def log_text(self, text: str, artifact_file: str) -> None:
        """Keep `text` as an artifact, for example `log_text(html, "trees/update_000010.html")`."""
        for tracker in self._trackers:
            tracker.keep(Artifact(artifact_file, None, text))

    def log_rollouts(self, rollouts: Sequence[RolloutRecord]) -> None:
        """Show some rollouts turn by turn."""
        for tracker in self._trackers:
            tracker.show(rollouts)

    def log_datasets(self, datasets: Sequence[DatasetRecord]) -> None:
        """Note what the run trains on and is evaluated with."""
        for tracker in self._trackers:
            tracker.use(datasets)

    def log_policy(self, folder: Path) -> None:
        """Keep the trained policy as a model. Returns when it is kept."""
        for tracker in self._trackers:
            tracker.keep_policy(folder)

    def finish(self, status: RunStatus = "FINISHED") -> None:
        """Give the trackers what is left, and end the run there. Says what is missing when that fails.

        Calls after the first do nothing.
        """
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self.finish)
        with contextlib.suppress(OSError):  # a disk without room for the end of a line has been named already
            self._file.close()
        for tracker in self._trackers:
            tracker.finish(status)
