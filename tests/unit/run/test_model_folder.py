"""What a model's config.json says: refused by name where the trainer would compute something else."""

import pytest

from trace_async.config import Config, ConfigError, LearnerConfig, SamplingConfig
from trace_async.run.model_folder import logit_factor, read_config, require_context, require_plain_decoder
from trace_async.run.plan import shape_from_json


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"text_config": {"hidden_size": 8}}, "text_config"),
        ({"num_experts": 64}, r"mixture of experts \(num_experts=64\)"),
        ({"num_local_experts": 8}, r"num_local_experts=8"),
        ({"moe_num_experts": [64, 64]}, r"moe_num_experts=\[64, 64\]"),
        ({"n_routed_experts": 256}, r"n_routed_experts=256"),
        ({"logits_scaling": 8.0}, r"scales its logits \(logits_scaling=8.0\)"),
        ({"logit_scale": 0.0625}, r"logit_scale=0.0625"),
        ({"model_type": "granite", "logit_scale": 0.0625}, r"logit_scale=0.0625"),
        ({"model_type": "granite", "logits_scaling": 0}, r"logits_scaling=0, which must be a positive number"),
        ({"model_type": "cohere", "logit_scale": "1/16"}, r"logit_scale=1/16, which must be a positive number"),
        ({"final_logit_softcapping": 30.0}, r"caps its logits or attention scores \(final_logit_softcapping=30.0\)"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0"),
        ({"model_type": "gpt_oss"}, "attention sinks"),
    ],
)
def test_what_would_be_computed_wrongly_is_named(entry, message):
    with pytest.raises(ConfigError, match=rf"^policy\.path=here: .*{message}"):
        require_plain_decoder(entry, "policy.path=here")


@pytest.mark.parametrize(
    "entry", [{}, {"logits_scaling": 1.0}, {"final_logit_softcapping": None}, {"num_experts": 1}, {"logit_scale": 1}]
)
def test_what_is_neutral_passes(entry):
    require_plain_decoder(entry, "policy.path=here")
    assert logit_factor(entry) == 1.0


@pytest.mark.parametrize(
    ("entry", "factor"),
    [
        ({"model_type": "granite", "logits_scaling": 8}, 0.125),
        ({"model_type": "cohere", "logit_scale": 0.0625}, 0.0625),
        ({"model_type": "hyperclovax", "logits_scaling": 0.5}, 0.5),
    ],
)
def test_a_head_of_which_it_is_known_what_it_does_with_its_factor_passes(entry, factor):
    require_plain_decoder(entry, "policy.path=here")
    assert logit_factor(entry) == factor


@pytest.mark.parametrize(("name", "value"), [("hidden_size", None), ("num_hidden_layers", "2"), ("vocab_size", 0)])
def test_a_size_that_is_missing_or_no_number_is_named(name, value):
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    content = {**dict.fromkeys(sizes, 4), "vocab_size": 9, name: value}
    with pytest.raises(ConfigError, match=rf"policy\.path: config\.json has no {name} \(found {value}\)"):
        shape_from_json(content)


def long(packing="tree") -> Config:
    sampling = SamplingConfig(max_context_tokens=4096, max_turn_tokens=100)
    return Config(sampling=sampling, learner=LearnerConfig(packing=packing))


def test_a_context_beyond_the_models_positions_is_refused():
    with pytest.raises(ConfigError, match=r"sampling\.max_context_tokens=4096: the model of policy\.path ends at 2048"):
        require_context({"max_position_embeddings": 2048}, long())


def test_a_window_shorter_than_the_context_is_refused_with_packed_trees_only():
    with pytest.raises(ConfigError, match=r"sees only the last 1024 tokens"):
        require_context({"sliding_window": 1024}, long())
    require_context({"sliding_window": 1024}, long("flat"))
    require_context({"sliding_window": 1024, "use_sliding_window": False}, long())
    require_context({"sliding_window": 4096}, long())


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_a_file_that_is_no_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)
