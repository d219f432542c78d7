"""Define where a run's log goes besides its own file: one small protocol, and the trackers that keep it."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from trace_async.config import Config
from trace_async.tracking.records import DatasetRecord, RolloutRecord
from trace_async.types import Point

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
Log = Callable[[str], None]

FINISH_LIMIT_S = 60.0
"""The longest that a tracker may hold up the end of a run."""

TRACKERS = {
    "mlflow": "trace_async.tracking.mlflow_tracker:MlflowTracker",
    "tensorboard": "trace_async.tracking.tensorboard:TensorBoardTracker",
}
"""By the name that `tracking.backends` gives them; each is called with a TrackedRun."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something to keep beside the figures: a file or directory (`path`) or a text."""

    target: str
    """The folder for a path, or the file's name for a text, among the run's artifacts."""
    path: Path | None
    text: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of its run when it starts."""

    config: Config
    run_dir: Path
    kept: Sequence[Point]
    """What the run's file holds already: of a run that is resumed, up to its checkpoint."""
    run_id: str | None = None
    """The store's id of the run, when the run goes on in it."""
    parent_run_id: str | None = None
    """The run of a comparison or a sweep that this one belongs to."""
    log: Log = print
    """Where a tracker says what it could not keep."""


class Tracker(Protocol):
    """One store that shows a run.

    Training never waits for it and never fails of it: what may block is done in a thread of the tracker's own, and
    what cannot be kept is said in words. A store without a place for something leaves it out.
    """

    def log(self, point: Point) -> None:
        """Keep the figures of one step. Returns at once."""
        ...

    def keep(self, artifact: Artifact) -> None:
        """Keep a file, a folder or a text. Returns at once; what a path holds must stay as it is for a while."""
        ...

    def show(self, rollouts: Sequence[RolloutRecord]) -> None:
        """Keep some rollouts, turn by turn. Returns at once."""
        ...

    def use(self, datasets: Sequence[DatasetRecord]) -> None:
        """Note what the run trains on and is evaluated with. Returns at once."""
        ...

    def keep_policy(self, folder: Path) -> None:
        """Keep the trained policy, a Hugging Face folder, as a model. Returns when it is kept."""
        ...

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        """Return the store's id of the run (None: it has none, or has not answered within `timeout_s`)."""
        ...

    def finish(self, status: RunStatus) -> None:
        """End the run in the store. Waits a minute at most for what is left."""
        ...


def make_tracker(name: str, run: TrackedRun) -> Tracker:
    """Start the tracker that `tracking.backends` calls `name`. Raises ImportError in words when it needs a package."""
    module, _, kind = TRACKERS[name].partition(":")
    tracker: Tracker = getattr(importlib.import_module(module), kind)(run)
    return tracker
