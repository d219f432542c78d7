"""What a comparison is, and the figures it leaves: methods × seeds of one base config at equal generated tokens.

The figures of all runs are kept as `figures.csv` (a row per method, seed and update) with `settings.json` beside it:
small enough to commit, and all that the report is made from.
"""

import csv
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from scripts.comparison.arithmetic import Curve, make_curve
from trace_async.config import (
    Config,
    ConfigError,
    config_from_yaml,
    config_to_yaml,
    find_config,
    load_config,
    read_config_file,
)
from trace_async.tracking.log import Point, write_whole

TOKENS = "tokens/generated_total"
SECONDS = "time/elapsed_s"
FIGURES_FILE = "figures.csv"
SETTINGS_FILE = "settings.json"
PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method as overrides of the base config."""

    label: str = ""
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`base`: a config file. `overrides` hold for every method, before its own; `name`, `output_dir`, `seed` and
    `max_generated_tokens` of a run are set by the comparison. `success`: the held-out metrics that are compared, the
    first of them most of all. Differences are to `baseline`, and of `ours`, where it is named, to every other method.
    """

    name: str = "compare"
    base: str = ""
    output_dir: str = "runs/compare"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    max_generated_tokens: int = 200_000
    baseline: str = "grpo"
    ours: str = ""
    success: list[str] = field(default_factory=lambda: ["heldout/success_t1.0", "heldout/success_t0.0"])
    overrides: list[str] = field(default_factory=list)
    methods: dict[str, Method] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [
            (PLAIN_NAME.fullmatch(self.name), f"name={self.name}: letters, digits, '.', '-', '_' only"),
            (bool(self.methods), "methods: name at least one"),
            (not self.methods or self.baseline in self.methods, f"baseline={self.baseline}: not among the methods"),
            (not self.ours or self.ours in self.methods, f"ours={self.ours}: not among the methods"),
            (
                bool(self.seeds) and len(set(self.seeds)) == len(self.seeds),
                f"seeds={self.seeds}: distinct, one or more",
            ),
            (self.max_generated_tokens > 0, f"max_generated_tokens={self.max_generated_tokens}: must be > 0"),
            (bool(self.success), "success: name at least one held-out metric"),
            (all(map(PLAIN_NAME.fullmatch, self.methods)), "methods: names of letters, digits, '.', '-', '_' only"),
        ]
        for fine, problem in problems:
            if not fine:
                raise ConfigError(f"comparison: {problem}")

    def run_overrides(self, method: str, seed: int) -> list[str]:
        """Return the settings of one run beside its name and place."""
        own = self.methods[method].overrides
        return [*self.overrides, *own, f"seed={seed}", f"max_generated_tokens={self.max_generated_tokens}"]

    def run_config(self, method: str, seed: int) -> Config:
        """Return the whole config of one run. Raises ConfigError naming the method."""
        try:
            return load_config(self.base or None, self.run_overrides(method, seed))
        except ConfigError as error:
            raise ConfigError(f"comparison {self.name}, method {method}: {error}") from error

    def run_settings(self, method: str, seed: int) -> str:
        """The settings of one run that differ from the defaults, as YAML: what tells whether it is the same run."""
        base = read_config_file(self.base) if self.base else OmegaConf.create()
        return OmegaConf.to_yaml(
            OmegaConf.merge(base, OmegaConf.from_dotlist(self.run_overrides(method, seed))), sort_keys=True
        )

    def base_config(self) -> Config:
        """Return what all methods share."""
        return load_config(self.base or None, self.overrides)

    def label(self, method: str) -> str:
        return self.methods[method].label or method

    def only(self, names: Sequence[str]) -> "Comparison":
        """With some of the methods; the first of them is the baseline unless the baseline is among them."""
        if unknown := [name for name in names if name not in self.methods]:
            raise ConfigError(f"comparison {self.name} has no method {unknown[0]}: {', '.join(self.methods)}")
        return replace(
            self,
            methods={name: self.methods[name] for name in names},
            baseline=self.baseline if self.baseline in names else names[0],
            ours=self.ours if self.ours in names else "",
        )


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
    """From YAML and `name=value` overrides. `base` is relative to the file. Raises ConfigError.

    What is no setting of the comparison, such as `policy.path=DIR`, holds for every run, before its method's own.
    """
    path = find_config(path)
    own = {entry.name for entry in fields(Comparison)}
    of_runs = [override for override in overrides if re.split(r"[.=]", override, maxsplit=1)[0] not in own]
    if any(override.startswith("seed=") for override in of_runs):
        raise ConfigError(f"{path}: a run's seed comes from the comparison: seeds=[0,1,2]")
    of_comparison = [override for override in overrides if override not in of_runs]
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(Comparison), OmegaConf.load(path), OmegaConf.from_dotlist(of_comparison)
        )
        comparison = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{path}: {str(error).strip()}") from error
    assert isinstance(comparison, Comparison)
    comparison = replace(comparison, overrides=[*comparison.overrides, *of_runs])
    if comparison.base:
        comparison = replace(comparison, base=os.path.normpath(path.parent / comparison.base))
    for method in comparison.methods:
        comparison.run_config(method, comparison.seeds[0])
    return comparison


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One finished run. `rows`: per step, ascending, all metrics of that step and `step` itself."""

    method: str
    seed: int
    rows: tuple[Mapping[str, float], ...]

    def curve(self, metric: str, cost: str = TOKENS) -> Curve | None:
        """Return `metric` against `cost`; None when the run has no such figures."""
        found = [(row[cost], row[metric]) for row in self.rows if _finite(row, cost) and _finite(row, metric)]
        return make_curve(*zip(*found, strict=True)) if found else None

    def points(self) -> list[Point]:
        """Return what `run_figures` makes this of; the hour of day of a row is not kept, so `time` is 0."""
        return [Point(int(row["step"]), 0.0, {k: v for k, v in row.items() if k != "step"}) for row in self.rows]

    def updates(self, budget: float = math.inf) -> list[Mapping[str, float]]:
        """Return the rows of updates (not of evaluations alone) within `budget` generated tokens."""
        return [row for row in self.rows if "train/effective_ratio" in row and row.get(TOKENS, 0.0) <= budget]


def _finite(row: Mapping[str, float], key: str) -> bool:
    return key in row and math.isfinite(row[key])


def run_figures(method: str, seed: int, points: Sequence[Point]) -> RunFigures:
    """Lines of the same step are one row; of a metric logged twice in a step the later counts."""
    rows: dict[int, dict[str, float]] = {}
    for point in points:
        rows.setdefault(point.step, {"step": float(point.step)}).update(point.metrics)
    return RunFigures(method, seed, tuple(rows[step] for step in sorted(rows)))


@dataclass(frozen=True, slots=True)
class Figures:
    """A comparison with all that was measured. `machine`: what it ran on; `wall_s`: seconds of each run by its name;
    `command`: what makes it again."""

    comparison: Comparison
    runs: tuple[RunFigures, ...]
    machine: str
    wall_s: Mapping[str, float]
    command: str

    def of(self, method: str) -> list[RunFigures]:
        return [run for run in self.runs if run.method == method]


def write_figures(folder: str | Path, figures: Figures) -> None:
    """`figures.csv` and `settings.json`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name for run in figures.runs for row in run.rows for name in row} - {"step"})
    lines = [",".join(["method", "seed", "step", *names])]
    for run in figures.runs:
        for row in run.rows:
            cells = [f"{row[name]:.9g}" if name in row else "" for name in names]
            lines.append(",".join([run.method, str(run.seed), str(int(row["step"])), *cells]))
    write_whole(folder / FIGURES_FILE, "\n".join(lines) + "\n")
    comparison = figures.comparison
    settings = {
        "comparison": asdict(comparison),
        "machine": figures.machine,
        "wall_s": dict(figures.wall_s),
        "command": figures.command,
        "base_config": config_to_yaml(comparison.base_config()),
    }
    write_whole(folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")


def read_figures(folder: str | Path) -> Figures:
    """Return what `write_figures` wrote. Raises ValueError naming file and line."""
    folder = Path(folder)
    settings = read_settings(folder)
    grouped: dict[tuple[str, int], list[dict[str, float]]] = {}
    path = folder / FIGURES_FILE
    with path.open(encoding="utf-8", newline="") as file:
        for record in (reader := csv.DictReader(file)):
            try:
                key = record.pop("method"), int(record.pop("seed"))
                row = {name: float(cell) for name, cell in record.items() if cell != ""}
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path}:{reader.line_num}: not a row of figures ({error})") from error
            grouped.setdefault(key, []).append(row)
    methods = {name: Method(**method) for name, method in settings["comparison"].pop("methods").items()}
    return Figures(
        Comparison(**settings["comparison"], methods=methods),
        tuple(RunFigures(method, seed, tuple(rows)) for (method, seed), rows in grouped.items()),
        settings["machine"],
        settings["wall_s"],
        settings["command"],
    )


def kept_figures(folder: str | Path, comparison: Comparison) -> Figures:
    """Return what `folder` keeps of the runs that `comparison` asks for with the very same settings.

    Settings that did not exist when they were kept count as their defaults of today.
    """
    kept, base = read_figures(folder), read_settings(folder)["base_config"]

    def config_then(run: RunFigures) -> Config | None:
        try:
            return config_from_yaml(base, kept.comparison.run_overrides(run.method, run.seed))
        except ConfigError:
            return None  # a setting of that time is no longer known

    wanted = [run for run in kept.runs if run.method in comparison.methods and run.seed in comparison.seeds]
    same = [run for run in wanted if config_then(run) == comparison.run_config(run.method, run.seed)]
    return replace(kept, runs=tuple(same))


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Return the settings kept beside the figures."""
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: no comparison was kept there ({SETTINGS_FILE} is missing)")
    return json.loads(path.read_text(encoding="utf-8"))
