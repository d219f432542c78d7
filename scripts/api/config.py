"""TraceConfig: the settings of a run, put together step by step in Python."""

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trace_async.config import Config, ConfigError, config_from_yaml, config_to_dict, load_config
from trace_async.trees.tree import RolloutTree

if TYPE_CHECKING:
    from scripts.api.algorithm import TraceAlgorithm, UpdateResult

_SECTIONS: dict[str, Any] = {f.name: f.type for f in fields(Config) if hasattr(f.type, "__dataclass_fields__")}
_OF_THE_RUN = tuple(field.name for field in fields(Config) if field.name not in _SECTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """What is called while an algorithm runs, from the thread that called `train` or `evaluate`."""

    on_update: "Callable[[UpdateResult], None] | None" = None
    """After every update."""
    on_tree: Callable[[RolloutTree], None] | None = None
    """For every tree that an update was trained on."""
    on_evaluate: Callable[[Mapping[str, float]], None] | None = None
    """After every evaluation, with its figures."""


class TraceConfig:
    """Settings of a run. Every method returns the config itself, so calls can be chained; `build` checks them all.

        config = TraceConfig().environment("multihop").env_runners(num_generators=2).training(learning_rate=1e-4)
        algo = config.build()

    Names are those of the YAML files. A method takes the settings of the sections that it names; any other is set by
    `set("section.name", value)`. An unknown name is a ConfigError with the nearest one.
    """

    def __init__(self) -> None:
        self._settings: dict[str, Any] = {}
        self._callbacks = Callbacks()

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> "TraceConfig":
        """Start from a YAML file, and `section.name=value` overrides."""
        config = cls()
        config._settings = config_to_dict(load_config(path, overrides))
        return config

    def environment(self, name: str | None = None, **args: Any) -> "TraceConfig":
        """Which tasks are played: `env.name` and the arguments of the environment (`env.args`)."""
        if name is not None:
            self.set("env.name", name)
        if args:
            self.set("env.args", {**self._settings.get("env", {}).get("args", {}), **args})
        return self

    def policy(self, path: str | Path | None = None, **settings: Any) -> "TraceConfig":
        """Set the model that is trained (section `policy`) and how it is sampled (`sampling`)."""
        if path is not None:
            settings["path"] = str(path)
        return self._set_in(("policy", "sampling"), settings)

    def allocation(self, **settings: Any) -> "TraceConfig":
        """Where the sampling budget goes (`budget`) and the value model that decides it (`predictor`)."""
        return self._set_in(("budget", "predictor"), settings)

    def training(self, **settings: Any) -> "TraceConfig":
        """Length of the run (`num_updates`, `seed`, …), `loss` and `learner`."""
        return self._set_in(("", "loss", "learner"), settings)

    def env_runners(self, **settings: Any) -> "TraceConfig":
        """How rollouts are made: `actors` (`num_generators`, `max_staleness`, …) and `engine`."""
        return self._set_in(("actors", "engine"), settings)

    def resources(self, **settings: Any) -> "TraceConfig":
        """Set what each process gets: GPUs and CPUs of `actors`, ranks and threads of `learner`."""
        return self._set_in(("actors", "learner"), settings)

    def evaluation(self, **settings: Any) -> "TraceConfig":
        """Held-out evaluation (`eval`)."""
        return self._set_in(("eval",), settings)

    def reporting(self, **settings: Any) -> "TraceConfig":
        """Set what is kept of a run: `tracking` (MLflow) and `checkpoint`."""
        return self._set_in(("tracking", "checkpoint"), settings)

    def callbacks(self, **functions: Any) -> "TraceConfig":
        """Set `on_update`, `on_tree` and `on_evaluate`; see Callbacks."""
        try:
            self._callbacks = replace(self._callbacks, **functions)
        except TypeError as error:
            raise ConfigError(f"callbacks: {error}; there are on_update, on_tree and on_evaluate") from error
        return self

    def set(self, setting: str, value: Any) -> "TraceConfig":
        """Any setting by its full name, such as `set("budget.stage1", "pcl")`."""
        section, _, name = setting.rpartition(".")
        known = _names(section)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"{setting}: no such setting" + (f"; did you mean {near[0]}" if near else ""))
        into = self._settings.setdefault(section, {}) if section else self._settings
        into[name] = value
        return self

    def copy(self) -> "TraceConfig":
        """Return an independent config with the same settings."""
        other = TraceConfig()
        other._settings, other._callbacks = copy.deepcopy(self._settings), self._callbacks
        return other

    def to_config(self) -> Config:
        """Return the settings, checked and frozen. Raises ConfigError."""
        return config_from_yaml(yaml.safe_dump(self._settings))

    def build(self, run_dir: str | Path | None = None) -> "TraceAlgorithm":
        """Start a run: Ray, generators, learner, predictor. `run_dir`: its folder, else `output_dir/name`."""
        from scripts.api.algorithm import TraceAlgorithm

        return TraceAlgorithm(self.to_config(), callbacks=self._callbacks, run_dir=run_dir)

    def _set_in(self, sections: Sequence[str], settings: Mapping[str, Any]) -> "TraceConfig":
        """Set each name in the first of `sections` that knows it."""
        for name, value in settings.items():
            section = next((section for section in sections if name in _names(section)), None)
            if section is None:
                known = [known for section in sections for known in _names(section)]
                near = difflib.get_close_matches(name, known, n=1)
                where = ", ".join(section or "the run's own" for section in sections)
                hint = f"; did you mean {near[0]}" if near else ""
                raise ConfigError(f"{name}: no such setting in {where}{hint}. Any setting: set('section.name', value)")
            self.set(f"{section}.{name}" if section else name, value)
        return self


def _names(section: str) -> tuple[str, ...]:
    if not section:
        return _OF_THE_RUN
    if section not in _SECTIONS:
        raise ConfigError(f"{section}: no such section of settings; there are {', '.join(_SECTIONS)}")
    return tuple(field.name for field in fields(_SECTIONS[section]))
