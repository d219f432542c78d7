"""Domains by name: built in, or `package.module:Class` of one's own."""

import difflib
import importlib
import inspect
import traceback
from pathlib import Path

from trace_async.config import ConfigError, EnvConfig
from trace_async.env import Domain
from trace_async.rollout.guard import words_of

BUILT_IN: dict[str, str] = {
    "multihop": "envs.multihop.domain:MultiHop",
    "qa_files": "envs.multihop.qa_files:QaFiles",
    "math": "envs.math.domain:Math",
    "math_files": "envs.math.domain:MathFiles",
    "functions": "envs.functions.domain:Functions",
    "bfcl": "envs.functions.bfcl:Bfcl",
    "quest": "envs.quest.domain:Quest",
    "scienceworld": "envs.text_worlds.scienceworld:ScienceWorld",
    "textworld_express": "envs.text_worlds.textworld_express:TextWorldExpress",
    "mixed": "envs.mixed:Mixed",
    "gymnasium": "envs.gymnasium_adapter:Gymnasium",
    "agent": "envs.agent.domain:Agent",
    "mcp": "envs.mcp.domain:Mcp",
}


def load_domain(config: EnvConfig) -> Domain:
    """Return the domain that `env.name` names, built with `env.args`. Raises ConfigError in words."""
    target = BUILT_IN.get(config.name, config.name)
    module_name, colon, class_name = target.partition(":")
    if not colon or not module_name or not class_name:
        near = difflib.get_close_matches(config.name, BUILT_IN, n=1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise ConfigError(
            f"env.name={config.name}: no such environment{hint}. Built in: {', '.join(BUILT_IN)}; "
            "or name your own as package.module:Class"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"env.name={config.name}: cannot import {module_name}: {describe(error)}") from error
    domain_class = getattr(module, class_name, None)
    if domain_class is None:
        raise ConfigError(f"env.name={config.name}: module {module_name} has no {class_name}")
    try:
        inspect.signature(domain_class).bind(**config.args)
    except TypeError as error:
        raise ConfigError(
            f"env.args={dict(config.args)}: {error}; {class_name} takes {inspect.signature(domain_class)}"
        ) from error
    try:
        domain: Domain = domain_class(**config.args)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"env.name={config.name}: {error}") from error
    except Exception as error:
        raise ConfigError(f"env.name={config.name}: {class_name} cannot be made: {describe(error)}") from error
    return domain


def describe(error: BaseException) -> str:
    """Kind, message and place of an error in somebody's environment, in one line."""
    words = words_of(error)
    if isinstance(error, ImportError | SyntaxError):
        return words  # names its module or place itself
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{words} ({Path(frame.filename).name}, line {frame.lineno})"
