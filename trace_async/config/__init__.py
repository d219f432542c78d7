"""Every setting: its meaning, its default and its bounds. Imports nothing else of the project."""

from trace_async.config.files import config_from_yaml, config_to_dict, config_to_yaml, load_config
from trace_async.config.method import AdvantageName, BudgetConfig, LossConfig, PredictorConfig
from trace_async.config.processes import ActorsConfig, EngineConfig, LearnerConfig
from trace_async.config.run import CheckpointConfig, Config, EvalConfig, TrackingConfig
from trace_async.config.section import ConfigError
from trace_async.config.task import EnvConfig, PolicyConfig, SamplingConfig

__all__ = [
    "ActorsConfig",
    "AdvantageName",
    "BudgetConfig",
    "CheckpointConfig",
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
    "load_config",
]
