"""Architectures: packed trees equal the model's own forward, or the learner refuses at its start in words."""

import pytest
import torch
import transformers

from trace_async.config import Config, ConfigError, LearnerConfig
from trace_async.learner.learner import Learner, TokenLogprobs
from trace_async.learner.probe import check_packed_rows
from trace_async.packing.attention import attention_for, prepare_model

SIZES = {"vocab_size": 90, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA_LIKE = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2_LIKE = {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4}
OPT_LIKE = {**SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}

LLAMA_FAMILIES = (
    "Llama",
    "Qwen2",
    "Qwen3",
    "Mistral",
    "Ministral3",
    "Gemma",
    "Phi",
    "Phi3",
    "Olmo",
    "Olmo2",
    "SmolLM3",
    "Starcoder2",
    "Glm",
    "Glm4",
    "SeedOss",
    "Apertus",
    "Arcee",
    "Ernie4_5",
    "GPTNeoX",
    "Persimmon",
)
EXACT: dict[str, dict] = {
    **dict.fromkeys(LLAMA_FAMILIES, LLAMA_LIKE),
    "GPT2": GPT2_LIKE,
    "Granite": {**LLAMA_LIKE, "logits_scaling": 8.0, "attention_multiplier": 0.3, "embedding_multiplier": 12.0},
    "Cohere": {**LLAMA_LIKE, "logit_scale": 0.25},
    "Cohere2": {**LLAMA_LIKE, "logit_scale": 0.25, "layer_types": ["full_attention"] * 2},
    "HyperCLOVAX": {**LLAMA_LIKE, "logits_scaling": 0.5},
    "OPT": {**OPT_LIKE, "ffn_dim": 64, "word_embed_proj_dim": 32},
}
# Their attention or their positions do not know of a packed row; branch by branch they are right.
ONLY_FLAT: dict[str, dict] = {
    "GPTJ": {**GPT2_LIKE, "rotary_dim": 4},
    "CodeGen": {**GPT2_LIKE, "rotary_dim": 4},
    "GPTNeo": {**SIZES, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    "Bloom": {**SIZES, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {**SIZES, "d_model": 32, "n_heads": 4, "n_layers": 2},
    "XGLM": {**SIZES, "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
    "Falcon": OPT_LIKE,
    "Rwkv": {**SIZES, "hidden_size": 32, "num_hidden_layers": 2},
    "StableLm": LLAMA_LIKE,
}
# Their head does more than multiply (it caps), which the learner leaves out in trees and branches alike.
NEVER = {
    "Gemma3Text": {
        **LLAMA_LIKE,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 2,
        "final_logit_softcapping": 2.0,
    },
}
FLAT = Config(learner=LearnerConfig(packing="flat"))


def check(family: str, settings: dict, config: Config) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**settings)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # loud, so that a fault in attention shows
            torch.nn.init.normal_(parameter, std=0.3)
    flat = config.learner.packing == "flat"
    kind = attention_for(torch.device("cpu"), flat=flat)
    prepare_model(model, kind)
    module = TokenLogprobs(model, kind, temperature=1.0, chunk_tokens=64, entropy=False).eval()
    check_packed_rows(config, 90, lambda batch: module(batch)[0], module, flat=flat)


@pytest.mark.parametrize("family", list(EXACT))
def test_a_family_that_is_let_through_computes_trees_as_it_computes_their_branches(family):
    check(family, EXACT[family], Config())


@pytest.mark.parametrize("family", list(ONLY_FLAT))
def test_a_family_that_knows_no_packed_trees_is_refused_and_may_train_flat(family):
    with pytest.raises(ConfigError, match=r"packed row.*set learner\.packing=flat"):
        check(family, ONLY_FLAT[family], Config())
    check(family, ONLY_FLAT[family], FLAT)


@pytest.mark.parametrize("config", [Config(), FLAT], ids=["tree", "flat"])
@pytest.mark.parametrize("family", list(NEVER))
def test_a_family_whose_head_does_more_is_refused_either_way(family, config):
    with pytest.raises(ConfigError, match="other log-probabilities"):
        check(family, NEVER[family], config)


def test_a_cap_on_attention_scores_is_refused_where_it_would_be_dropped():
    with pytest.raises((ConfigError, ValueError), match=r"cap on attention scores|full attention"):
        check("Gemma2", {**LLAMA_LIKE, "head_dim": 8, "layer_types": ["full_attention"] * 2}, Config())


def test_the_learner_checks_the_model_that_it_is_about_to_train(tmp_path):
    config = transformers.GPTJConfig(**ONLY_FLAT["GPTJ"])
    torch.manual_seed(0)
    model = transformers.GPTJForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="packed row"):
        Learner(Config(), tmp_path)
