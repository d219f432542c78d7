"""Every setting: its meaning, its default and its bounds. Of the project it asks only `trace_async.method`,
for the names of rules and what they say of themselves."""

from trace_async.config.files import (
    config_from_yaml,
    config_to_dict,
    config_to_yaml,
    find_config,
    load_config,
    read_config_file,
)
from trace_async.config.method import BudgetConfig, LossConfig, PredictorConfig
from trace_async.config.processes import ActorsConfig, EngineConfig, LearnerConfig
from trace_async.config.run import CheckpointConfig, Config, EvalConfig, TrackingConfig
from trace_async.config.section import ConfigError
from trace_async.config.task import ColdStartConfig, EnvConfig, PolicyConfig, SamplingConfig

__all__ = [
    "ActorsConfig",
    "BudgetConfig",
    "CheckpointConfig",
    "ColdStartConfig",
    "Config",
    "ConfigError",
    "EngineConfig",
    "EnvConfig",
    "EvalConfig",
    "LearnerConfig",
    "LossConfig",
    "PolicyConfig",
    "PredictorConfig",
    "SamplingConfig",
    "TrackingConfig",
    "config_from_yaml",
    "config_to_dict",
    "config_to_yaml",
    "find_config",
    "load_config",
    "read_config_file",
]
