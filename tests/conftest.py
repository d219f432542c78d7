"""Fixtures that several test files share: a tiny policy on disk."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
NUM_WORDS = 96
TINY_VOCAB_SIZE = len(SPECIAL_TOKENS) + NUM_WORDS
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_policy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of about 70,000 parameters with a word-level tokenizer and a chat template.

    Vocabulary of 100: 0–3 are special (SPECIAL_TOKENS), 4–7 the roles, then w4 … w95. The weights are larger
    than at a usual start, so that distributions are peaked and an error in attention or KV shows in the output.
    """
    path = tmp_path_factory.mktemp("tiny_policy")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=TINY_VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # what the CPU attention of vLLM needs
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        # Loud layers: otherwise the tied embedding makes the model repeat its last token whatever attention says.
        layer.self_attn.o_proj.weight.data *= 4
        layer.mlp.down_proj.weight.data *= 4
    model.save_pretrained(path)
    words = [*SPECIAL_TOKENS, "system", "user", "assistant", "tool", *(f"w{i}" for i in range(4, NUM_WORDS))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as `trace-async get-policy smollm2` makes it: once a machine, then from the cache."""
    from tests.support.paths import ROOT
    from trace_async.policy.get_policy import get_policy

    return get_policy("smollm2", ROOT / ".cache" / "policies")
