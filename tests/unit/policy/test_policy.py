"""Policies are read from local directories only, and only from safetensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from trace_async.policy.load import load_model, load_tokenizer
from trace_async.policy.small_tokenizer import build_tokenizer

CONFIG = Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    head_dim=32,
    tie_word_embeddings=True,
    architectures=["Qwen3ForCausalLM"],
)


def test_a_saved_policy_comes_back_with_tied_embeddings_in_eval_mode(tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(CONFIG)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    CONFIG.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert not loaded.training
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert load_model(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    torch.save(Qwen3ForCausalLM(CONFIG).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_model(tmp_path)


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    for load in (load_tokenizer, load_model):
        with pytest.raises(ValueError, match=r"policy\.path=.*config\.json is missing"):
            load(tmp_path / "nowhere")


def test_the_tokenizer_is_read_from_the_directory(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    build_tokenizer(["one", "two"]).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("one two")["input_ids"]) == ["▁one", "▁two"]
