"""Read what a model's config.json says, and refuse by name what would come out wrong.

What the trainer computes from a policy is its last hidden states, over rows of packed trees, and its head on some of
them, times a factor where the model has one. A model that does more than that (caps its logits, gives attention a sink,
routes to experts) would be trained on other log-probabilities than it generates with, in silence.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from trace_async.config import Config, ConfigError

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# The learner calls the head by itself, so it must know of these: a factor is neutral at 1, a cap is off when empty.
_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "mup_width_multiplier")
# Heads of which transformers' code says what it does with that factor: model_type → entry, power of the factor.
_SCALED_HEADS = {
    "cohere": ("logit_scale", 1),
    "cohere2": ("logit_scale", 1),
    "granite": ("logits_scaling", -1),
    "hyperclovax": ("logits_scaling", 1),
}
_CAPS = ("final_logit_softcapping", "attn_logit_softcapping", "attn_logit_soft_cap")
_SINKS = ("gpt_oss",)


def read_config(path: str | Path) -> dict[str, object]:
    """Return the content of the folder's config.json. Raises ValueError when it cannot be read."""
    file = Path(path) / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object, not {type(content).__name__}")
    return content


def require_plain_decoder(content: Mapping[str, object], setting: str) -> None:
    """Raise ConfigError, naming `setting` (`policy.path=…`) and the entry, for what would be computed wrongly."""
    if isinstance(content.get("text_config"), Mapping):
        raise ConfigError(
            f"{setting}: config.json holds its sizes in text_config, as models of several kinds of input do; save its "
            "language model alone as a causal LM and name that folder"
        )
    for name in _EXPERTS:
        number = content.get(name)
        if number not in (None, 0, 1):  # some list a number for each kind of input
            raise ConfigError(
                f"{setting}: a mixture of experts ({name}={number}) is not supported: neither its memory nor its "
                "router's balance is looked after; use a dense model"
            )
    for name in _SCALES:
        known = _SCALED_HEADS.get(str(content.get("model_type")), ("", 0))[0] == name
        if known and not 0 < logit_factor(content) < math.inf:
            raise ConfigError(f"{setting}: config.json has {name}={content[name]}, which must be a positive number")
        if not known and content.get(name) not in (None, 1, 1.0):
            raise ConfigError(_head(setting, name, content[name], "scales its logits"))
    for name in _CAPS:
        if content.get(name) is not None:
            raise ConfigError(_head(setting, name, content[name], "caps its logits or attention scores"))
    if content.get("model_type") in _SINKS:
        raise ConfigError(_head(setting, "model_type", content["model_type"], "has attention sinks"))


def logit_factor(content: Mapping[str, object]) -> float:
    """Return by what a model's head multiplies its logits, from its config.json: 1 for most, NaN for no number or 0."""
    name, power = _SCALED_HEADS.get(str(content.get("model_type")), ("", 1))
    value = content.get(name, 1.0)
    return float(value) ** power if isinstance(value, int | float) and value else math.nan


def _head(setting: str, name: str, value: object, what: str) -> str:
    return f"{setting}: this model {what} ({name}={value}), which the learner does not; use another family"


def require_context(content: Mapping[str, object], config: Config) -> None:
    """Raise ConfigError when `sampling.max_context_tokens` is more than the policy's positions or its window."""
    longest = config.sampling.max_context_tokens
    positions = content.get("max_position_embeddings")
    if isinstance(positions, int) and longest > positions:
        raise ConfigError(f"sampling.max_context_tokens={longest}: the model of policy.path ends at {positions}")
    window = content.get("sliding_window")
    is_windowed = isinstance(window, int) and bool(content.get("use_sliding_window", True)) and longest > window
    if is_windowed and config.learner.packing == "tree":
        raise ConfigError(
            f"sampling.max_context_tokens={longest}: the model of policy.path sees only the last {window} tokens "
            f"(sliding_window), which packed trees do not keep to: at most {window}, or learner.packing=flat"
        )
