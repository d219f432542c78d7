"""Write a policy as a Hugging Face directory, which appears complete or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

ORIGIN_FILE = "origin.json"


def save_policy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path, origin: Mapping[str, str] | None = None
) -> None:
    """Write model and tokenizer beside `directory` and then rename, so that whoever finds it finds it complete.

    `origin` says where the policy comes from. If it is given, the hash of every file is kept in ORIGIN_FILE for
    `verify`.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".partial-{directory.name}-{os.getpid()}")
    try:
        partial.mkdir()
        # Not by save_pretrained, because it loads DeepSpeed if that is installed and draws a progress bar.
        alias = "lm_head.weight" if model.config.tie_word_embeddings else None
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != alias}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if origin is not None:
            hashes = {file.name: sha256(file) for file in sorted(partial.iterdir())}
            (partial / ORIGIN_FILE).write_text(json.dumps({**origin, "sha256": hashes}, indent=1))
        partial.rename(directory)
    except OSError:
        if not directory.is_dir():  # otherwise another process was first, with the same policy
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def verify(directory: Path) -> None:
    """Compare every file with its hash at the time of writing. Raises ValueError, which names one that differs."""
    remedy = f"remove the folder {directory} and call trace-async get-policy again"
    try:
        hashes = json.loads((directory / ORIGIN_FILE).read_text())["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{directory / ORIGIN_FILE} cannot be read ({error}): {remedy}") from error
    for name, wanted in hashes.items():
        file = directory / name
        if not file.resolve().is_relative_to(directory.resolve()):
            raise ValueError(f"{directory / ORIGIN_FILE} names a file outside: {name}: {remedy}")
        if not file.is_file() or sha256(file) != wanted:
            raise ValueError(f"{file} is missing or not what was written: {remedy}")


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
