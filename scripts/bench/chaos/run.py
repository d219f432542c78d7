"""The run under test: `trace-async train` as a user starts it, looked at only from outside."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from scripts.bench.chaos.processes import marked, marking, role_of
from trace_async.config import load_config
from trace_async.run.checkpoint import CheckpointError, latest_checkpoint
from trace_async.run.session import phases_of
from trace_async.run.state import SavedTrainer, load_trainer
from trace_async.tracking.log import read_metrics
from trace_async.tracking.mlflow_tracker import run_status
from trace_async.types import Point

ORPHAN_LIMIT_S = 120.0
GO_ON = "trace-async train --resume"


class LimitError(Exception):
    """Something did not happen within the limit; the message says what."""


class Run:
    """A run and its drivers, one after another. What it promised and did not keep is in `broken`."""

    def __init__(self, output_dir: Path, terminals: Path, settings: Sequence[str], mark: str, limit_s: float) -> None:
        """`terminals`: where each driver's terminal is kept. `limit_s`: for whatever is waited for."""
        self.run_dir = output_dir / "chaos"
        self.settings = [*settings, f"output_dir={output_dir}", "name=chaos"]
        self.terminals = terminals
        self.mark = mark
        self.limit_s = limit_s
        self.num_drivers = 0
        self.num_orphans = 0
        self.broken: list[str] = []
        self.driver: subprocess.Popen[bytes]
        self.started_at = 0.0
        self.ray_folder = Path(f"/tmp/chaos-{os.getpid()}")  # a short path: Ray makes sockets in it
        terminals.mkdir(parents=True, exist_ok=True)

    def start(self, *overrides: str) -> None:
        """Start the run, or go on with it where there is one."""
        resume = (self.run_dir / "config.yaml").exists()
        arguments = ["--resume", str(self.run_dir)] if resume else self.settings
        self.num_drivers += 1
        self.started_at = time.time()
        with self.terminal.open("wb") as terminal:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "scripts.cli", "train", *arguments, *overrides],
                env=os.environ | marking(self.mark) | {"RAY_TMPDIR": str(self.ray_folder)},
                stdout=terminal,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def terminal(self) -> Path:
        """What the present driver printed."""
        return self.terminals / f"{self.num_drivers:03d}.txt"

    def processes(self, role: str) -> list[psutil.Process]:
        """Return those of the run that have this role now, oldest first."""
        if role == "driver":
            return [psutil.Process(self.driver.pid)] if self.driver.poll() is None else []
        found = [process for process in marked(self.mark) if role_of(process) == role]
        return sorted(found, key=lambda process: process.create_time())

    def updates(self) -> list[Point]:
        """Return the figures of every update so far."""
        try:
            return [point for point in read_metrics(self.run_dir) if "time/step_s" in point.metrics]
        except ValueError as error:
            self.broken.append(f"metrics.jsonl cannot be read: {error}")
            return []

    def num_updates(self) -> int:
        """Return the newest update."""
        return max((point.step for point in self.updates()), default=0)

    def phases(self) -> dict[str, float]:
        """Return what the present driver is doing."""
        return {name: since for name, since in phases_of(self.run_dir).items() if since >= self.started_at}

    def wait(
        self, what: str, happened: Callable[[], object], every_s: float = 0.2, *, limit_s: float | None = None
    ) -> None:
        """Until `happened`, or until the driver has ended. Raises LimitError. `limit_s`: None for that of the run."""
        limit_s = self.limit_s if limit_s is None else limit_s
        deadline = time.monotonic() + limit_s
        while self.driver.poll() is None and not happened():
            if time.monotonic() > deadline:
                raise LimitError(f"not within {limit_s:g} s: {what}")
            time.sleep(every_s)

    def kill_driver(self) -> None:
        """SIGKILL."""
        self.driver.send_signal(signal.SIGKILL)
        self.driver.wait()

    def give_up(self) -> None:
        """Kill whatever is left of the run, and forget what Ray kept."""
        if self.num_drivers:
            self.driver.kill()
            self.driver.wait()
        while left := marked(self.mark):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(self.ray_folder, ignore_errors=True)

    def check_end(self, *, killed: bool = False) -> None:
        """After the driver's end: words, nothing left behind, a whole checkpoint, true books.

        `killed`: its own process could say nothing; its witness had to.
        """
        status, text = self.driver.wait(), self.terminal.read_text(encoding="utf-8", errors="replace")
        where = f"driver {self.num_drivers} (exit status {status}, {self.terminal.name})"
        has_begun = "starting Ray" in text or not killed
        if status and has_begun and GO_ON not in text:
            self.broken.append(f"{where} ended without the command to go on")
        if "Traceback (most recent call last)" in text:
            self.broken.append(f"{where} ended with a traceback")
        self._check_orphans(where)
        if killed and self.mlflow_status() == "RUNNING":
            self.broken.append(f"{where} is gone, and MLflow has the run as RUNNING")
        self.check_books(where)

    def _check_orphans(self, where: str) -> None:
        deadline = time.monotonic() + ORPHAN_LIMIT_S
        while (left := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        if left:
            self.num_orphans += len(left)
            self.broken.append(f"{where} left behind: {', '.join(f'{role_of(p)} {p.pid}' for p in left)}")
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def mlflow_status(self) -> str | None:
        """Return what MLflow says of the run; None when it was never there."""
        settings = self.run_dir / "config.yaml"
        return run_status(load_config(settings), self.run_dir) if settings.exists() else None

    def check_books(self, where: str) -> SavedTrainer | None:
        """Return the newest checkpoint's books, checked; None when there is none yet."""
        try:
            newest = latest_checkpoint(self.run_dir / "checkpoints")
        except CheckpointError as error:
            self.broken.append(f"{where}: {error}")
            return None
        if newest is None:
            return None
        saved = load_trainer(newest)
        try:
            saved.check_ledger()
        except AssertionError as error:
            self.broken.append(f"{where}: {newest}: {error}")
        steps = [point.step for point in self.updates()]
        if steps != sorted(set(steps)):
            self.broken.append(f"{where}: metrics.jsonl has updates twice or out of order: {steps}")
        return saved
