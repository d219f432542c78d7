"""Report what a model's folder says and what is done with it, before any time is spent on it."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from trace_async.config import Config, ConfigError
from trace_async.policy.load import end_token_ids, load_renderer, load_tokenizer
from trace_async.rollout.renderer import Renderer
from trace_async.run.model_folder import read_config, require_context, require_plain_decoder
from trace_async.types import Json, Message, Prompt

_PROBE_TOOL: Mapping[str, Json] = {
    "type": "function",
    "function": {"name": "probe", "parameters": {"type": "object", "properties": {}}},
}


def describe_policy(path: str | Path, config: Config) -> list[str]:
    """Return lines for people about architecture, head, end tokens, template, context, vocabulary and dtype.

    Raises ConfigError, which names setting and entry, when training or sampling with this folder would go wrong.
    """
    setting = f"policy.path={path}"
    try:
        content = read_config(path)
        require_plain_decoder(content, setting)
        require_context(content, config)
        renderer = load_renderer(path, template_kwargs=config.policy.chat_template_kwargs)
        ends = end_token_ids(path)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{setting}: {error}") from error
    tokenizer = load_tokenizer(path)
    vocabulary = content.get("vocab_size")
    assert isinstance(vocabulary, int), "config.json: vocab_size must be a number"
    if vocabulary < renderer.vocab_size:
        raise ConfigError(
            f"{setting}: the tokenizer knows {renderer.vocab_size} tokens and the model {vocabulary}: ids beyond that "
            "have no embedding; resize the model's embeddings or take its own tokenizer"
        )
    beyond = [token for token in renderer.stop_token_ids if token >= vocabulary]
    if beyond:
        raise ConfigError(f"{setting}: end tokens {beyond} are outside the vocabulary of {vocabulary}")
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(end)} ({end})" for end in renderer.stop_token_ids)
    tied = "is the embedding (tied)" if content.get("tie_word_embeddings") else "has weights of its own"
    positions = content.get("max_position_embeddings", "any number of")
    padding = vocabulary - renderer.vocab_size
    return [
        f"architecture     {_architecture(content)}, head {tied}",
        f"end tokens       {names}; each ends a turn" + ("" if ends else " (the folder names none)"),
        f"chat template    {_template(renderer)}",
        f"context          {config.sampling.max_context_tokens} of {positions} tokens",
        f"vocabulary       {vocabulary} embeddings for {renderer.vocab_size} tokens"
        + (f"; {padding} are padding, which nothing forbids to be sampled" if padding else ""),
        f"weights          stored as {_stored_dtype(Path(path))}, trained in {config.learner.dtype}, "
        f"sampled in {config.engine.dtype}",
    ]


def _architecture(content: dict[str, object]) -> str:
    classes = content.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else content.get("model_type")
    return f"{name}, {content.get('num_hidden_layers')} layers of {content.get('hidden_size')}"


def _template(renderer: Renderer) -> str:
    """Find out by trying whether a template adds a system message of its own and whether it shows tools."""
    question = Message(role="user", content="")
    with_system = Prompt(messages=(Message(role="system", content=""), question))
    plain = renderer.render_prompt(Prompt(messages=(question,)))
    try:
        has_default = len(plain) >= len(renderer.render_prompt(with_system))
        system = "a system message of its own where none is given" if has_default else "no system message of its own"
    except ValueError:
        system = "no system messages at all"
    try:
        renderer.render_prompt(Prompt(messages=(question,), tools=(_PROBE_TOOL,)))
        tools = "shows tools"
    except ValueError:
        tools = "does not show tools (environments that bring some are refused)"
    return f"{system}; {tools}"


def _stored_dtype(path: Path) -> str:
    index = path / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    file = path / sorted(names)[0]
    if not file.is_file():
        raise ConfigError(f"policy.path={path}: {file.name} is missing; only safetensors are read")
    with safe_open(file, "pt") as weights:
        first = next(iter(weights.keys()))
        return str(weights.get_slice(first).get_dtype())
