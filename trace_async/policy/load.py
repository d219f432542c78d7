"""A policy on disk: a local Hugging Face causal LM directory with tokenizer and chat template."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from trace_async.policy.cpu_linear import accelerate_linears


def _directory(path: str | Path) -> Path:
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"policy.path={path}: no Hugging Face model there (config.json is missing); "
            "leave policy.path empty to build a small policy"
        )
    return directory


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a local policy; never asks the network. Raises ValueError without a fast tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(_directory(path), local_files_only=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"policy.path={path}: needs a fast tokenizer (tokenizer.json), found {type(tokenizer)}")
    return tokenizer


def load_model(path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The model of a local policy in eval mode; safetensors only, so that loading runs no foreign code."""
    model = AutoModelForCausalLM.from_pretrained(
        _directory(path), local_files_only=True, use_safetensors=True, dtype=dtype
    )
    accelerate_linears(model)
    return model.to(device).eval()
