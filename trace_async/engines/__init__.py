"""Make inference engines behind the `Engine` protocol.

The libraries of a backend are imported when an engine of it is made, not before.
"""

import importlib
from pathlib import Path

from trace_async.config import ConfigError, EngineConfig
from trace_async.engine import Engine, EngineError

# Every class is called as Class(config, policy_path=…, max_context_tokens=…, seed=…, log_dir=…).
BACKENDS: dict[str, str] = {
    "torch": "trace_async.engines.embedded.engine:TorchEngine",
    "sglang": "trace_async.engines.servers.sglang:SGLangEngine",
    "vllm": "trace_async.engines.servers.vllm:VLLMEngine",
    "fake": "trace_async.engines.fake:RandomReplyEngine",
}


def make_engine(
    config: EngineConfig, *, policy_path: Path, max_context_tokens: int, seed: int, log_dir: Path
) -> Engine:
    """Make the engine of `config.backend`. It is not started yet.

    `max_context_tokens` limits prompt and answer together. `seed` is of its sampling. A server writes its log into
    `log_dir`. Raises ConfigError for a backend that there is not or a `policy_path` that is no model directory, and
    EngineError when the backend cannot be imported.
    """
    if not config.url and not (policy_path / "config.json").is_file():
        raise ConfigError(f"policy.path={policy_path}: no Hugging Face model directory (it has no config.json)")
    module_name, _, class_name = BACKENDS.get(config.backend, config.backend).partition(":")
    try:
        module = importlib.import_module(module_name)
    # It may be somebody else's module: whatever it raises while it is imported is for its author to read.
    except Exception as error:
        raise EngineError(
            f"engine.backend={config.backend} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, class_name):
        raise ConfigError(f"engine.backend={config.backend}: module {module_name} has no {class_name}")
    engine_class = getattr(module, class_name)
    engine: Engine = engine_class(
        config, policy_path=policy_path, max_context_tokens=max_context_tokens, seed=seed, log_dir=log_dir
    )
    return engine
