"""Keep the books of a comparison: where each of its runs is, how far it has come, and what it was made on."""

import functools
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from scripts.comparison.plan import Comparison, kept_figures
from trace_async.config import ConfigError
from trace_async.tracking.log import write_metrics, write_whole
from trace_async.tracking.mlflow_tracker import tracking_uri

Status = Literal["new", "begun", "done"]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a method with a seed."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-s{self.seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a comparison's runs are and how far they have come."""

    comparison: Comparison
    folder: Path

    def cells(self) -> list[Cell]:
        """Seed by seed, so that an unfinished comparison has whole seeds. ConfigError for a run of other settings."""
        cells = [Cell(m, s) for s in self.comparison.seeds for m in self.comparison.methods]
        for cell in cells:
            settings = self.comparison.run_settings(cell.method, cell.seed)
            if self._state(cell).get("settings", settings) != settings:
                raise ConfigError(
                    f"{self.run_dir(cell)} was run with other settings; give the comparison another name, "
                    "or delete its folder"
                )
        return cells

    def run_dir(self, cell: Cell) -> Path:
        return self.folder / "runs" / cell.name

    def status(self, cell: Cell) -> Status:
        if self._state(cell).get("done"):
            return "done"
        return "begun" if (self.run_dir(cell) / "config.yaml").is_file() else "new"

    def wall_s(self, cell: Cell) -> float:
        return float(str(self._state(cell).get("wall_s", 0.0)))

    def note(self, cell: Cell, *, wall_s: float, done: bool, machine: str = "") -> None:
        """Remember how long the run has taken in all, whether it is finished, and what it was made on (here: "")."""
        record = {
            "settings": self.comparison.run_settings(cell.method, cell.seed),
            "wall_s": round(wall_s, 1),
            "done": done,
            "machine": machine or this_machine(),
        }
        self._state_file(cell).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._state_file(cell), json.dumps(record) + "\n")

    def machine(self, cell: Cell) -> str:
        """Return what the run was made on."""
        return str(self._state(cell).get("machine", this_machine()))

    def take(self, kept: Path) -> int:
        """Count runs whose figures are in `kept`, and whose settings are ours, as finished here; returns how many.

        What this folder already has of a run stays as it is.
        """
        figures = kept_figures(kept, self.comparison)
        for run in figures.runs:
            cell = Cell(run.method, run.seed)
            if self.status(cell) == "new":
                self.run_dir(cell).mkdir(parents=True, exist_ok=True)
                write_metrics(self.run_dir(cell), run.points())
                self.note(cell, wall_s=figures.wall_s[cell.name], done=True, machine=figures.machine)
        return len(figures.runs)

    def command(self, cell: Cell, trainer: Sequence[str]) -> list[str]:
        """Return what starts the run, or goes on with it."""
        if self.status(cell) == "begun":
            return [*trainer, "--resume", str(self.run_dir(cell))]
        base = ["--config", self.comparison.base] if self.comparison.base else []
        config = self.comparison.run_config(cell.method, cell.seed)
        place = [f"name={cell.name}", f"output_dir={self.folder / 'runs'}", f"tracking.uri={tracking_uri(config)}"]
        return [*trainer, *base, *self.comparison.run_overrides(cell.method, cell.seed), *place]

    def _state_file(self, cell: Cell) -> Path:
        return self.folder / "runs" / f"{cell.name}.json"

    def _state(self, cell: Cell) -> Mapping[str, object]:
        path = self._state_file(cell)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@functools.cache
def this_machine() -> str:
    """Processors and versions, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{os.cpu_count()} × {model}, Python {platform.python_version()}, torch {version('torch')}"
