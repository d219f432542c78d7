"""The suite with a real tokenizer, SmolLM2's, and a padded vocabulary, on small random weights."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conformance.engine_conformance import EngineConformance

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PADDED_VOCABULARY = 49_216  # of the tokenizer's 49,152


class WithRealTokenizer(EngineConformance):
    """The suite on such a policy, in place of the tiny one."""

    @pytest.fixture(scope="class")
    @staticmethod
    def tiny_policy_path(smollm2_path, tmp_path_factory):
        return save_policy(smollm2_path, tmp_path_factory.mktemp("real_tokenizer"))


def save_policy(smollm2_path: Path, path: Path) -> Path:
    """Random weights in the shape of a small SmolLM2, with its tokenizer and more embeddings than that knows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 4
        layer.mlp.down_proj.weight.data *= 4
    model.save_pretrained(path)
    for name in TOKENIZER_FILES:
        shutil.copy(smollm2_path / name, path / name)
    return path
