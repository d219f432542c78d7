"""What is said of a policy's folder, and what is refused there."""

import json
import shutil

import pytest

from trace_async.config import Config, ConfigError
from trace_async.policy.report import describe_policy


@pytest.fixture
def folder(tiny_policy_path, tmp_path):
    return shutil.copytree(tiny_policy_path, tmp_path / "policy")


def change(folder, **entries) -> None:
    content = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(content))


def test_the_report_of_a_small_policy(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert describe_policy(folder, Config()) == [
        "architecture     Qwen3ForCausalLM, 2 layers of 48, head is the embedding (tied)",
        "end tokens       <|im_end|> (2), <|endoftext|> (0); each ends a turn",
        "chat template    no system message of its own; does not show tools (environments that bring some are refused)",
        "context          512 of 2048 tokens",
        "vocabulary       100 embeddings for 100 tokens",
        "weights          stored as F32, trained in float32, sampled in float32",
    ]


def test_smollm2_says_of_itself_what_it_is(smollm2_path):
    lines = describe_policy(smollm2_path, Config())
    assert lines[0] == "architecture     LlamaForCausalLM, 30 layers of 576, head is the embedding (tied)"
    assert lines[1] == "end tokens       <|im_end|> (2); each ends a turn"
    assert "a system message of its own where none is given; does not show tools" in lines[2]
    assert lines[4] == "vocabulary       49152 embeddings for 49152 tokens"


def test_padding_of_the_vocabulary_is_said(folder):
    change(folder, vocab_size=128)
    assert "28 are padding" in describe_policy(folder, Config())[4]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"vocab_size": 50}, "the tokenizer knows 100 tokens and the model 50"),
        ({"eos_token_id": 100}, r"end tokens \[100\] are outside the vocabulary of 100"),
        ({"text_config": {}}, "text_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"max_position_embeddings": 256}, "ends at 256"),
    ],
)
def test_what_would_go_wrong_is_refused(folder, entries, message):
    change(folder, **entries)
    with pytest.raises(ConfigError, match=message):
        describe_policy(folder, Config())


def test_a_folder_without_safetensors_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only safetensors are read"):
        describe_policy(folder, Config())
