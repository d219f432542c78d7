"""Load a policy from disk: a local Hugging Face causal LM directory with tokenizer and chat template."""

import json
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from trace_async.policy.cpu_linear import accelerate_linears
from trace_async.rollout.renderer import Renderer
from trace_async.types import Json


def _directory(path: str | Path) -> Path:
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"policy.path={path}: no Hugging Face model there (config.json is missing); "
            "leave policy.path empty to build a small policy"
        )
    return directory


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a local policy, without the network. Raises ValueError without a fast tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(_directory(path), local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"policy.path={path}: needs a fast tokenizer (tokenizer.json), found {type(tokenizer)}")
    return tokenizer


def load_renderer(
    path: str | Path, *, max_observation_tokens: int = 0, template_kwargs: Mapping[str, Json] | None = None
) -> Renderer:
    """Make the renderer of a local policy from its tokenizer, its template, and every end token that its folder names.

    `template_kwargs` are `policy.chat_template_kwargs`. Raises ValueError as Renderer does.
    """
    return Renderer(
        load_tokenizer(path),
        max_observation_tokens=max_observation_tokens,
        end_token_ids=end_token_ids(path),
        template_kwargs=template_kwargs or {},
    )


def end_token_ids(path: str | Path) -> tuple[int, ...]:
    """Return what generation_config.json and config.json name as `eos_token_id`, in that order.

    Models with several ways to end an answer, such as Llama 3, list them only there; the tokenizer knows just one.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = _directory(path) / name
        ends = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        ends = ends if isinstance(ends, list) else [ends]
        for end in ends:
            # In Python a bool is an int too.
            if end is not None and (isinstance(end, bool) or not isinstance(end, int) or end < 0):
                raise ValueError(f"{file}: eos_token_id={end}: must be a token's number or a list of them")
            found += [end] if end is not None else []
    return tuple(dict.fromkeys(found))


def load_model(path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """Load the model of a local policy in eval mode, from safetensors only, so that no foreign code runs."""
    model = AutoModelForCausalLM.from_pretrained(
        _directory(path), local_files_only=True, use_safetensors=True, dtype=dtype
    )
    accelerate_linears(model)
    return model.to(device).eval()
