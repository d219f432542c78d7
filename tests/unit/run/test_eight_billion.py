"""An 8B configuration walked through without its weights: what the plan says is what transformers would make."""

import pytest
import torch
import transformers

from tests.support.paths import CONFIGS
from trace_async.config import load_config
from trace_async.run.plan import KNOWN_SHAPES, plan_run

# From the models' published config.json.
PUBLISHED = {
    "Qwen3-8B": transformers.Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    ),
    "Llama-3.2-3B": transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}


def without_weights(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(PUBLISHED[name], dtype=torch.bfloat16)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_plan_counts_the_parameters_that_transformers_makes(name):
    model = without_weights(name)
    assert sum(p.numel() for p in model.parameters()) == KNOWN_SHAPES[name].num_parameters


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_adapters_are_counted_as_peft_makes_them(name):
    from trace_async.learner.policy_tensors import add_lora

    model = without_weights(name)
    with torch.device("meta"):
        add_lora(model, 16, seed=0)
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == KNOWN_SHAPES[name].num_adapter_parameters(16)


def test_a_row_of_8b_goes_through_the_model_in_the_shapes_that_the_learner_expects():
    model = without_weights("Qwen3-8B")
    ids = torch.zeros((1, 4096), dtype=torch.int64, device="meta")
    mask = torch.ones((1, 1, 4096, 4096), dtype=torch.bool, device="meta")
    hidden = model.base_model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert hidden.shape == (1, 4096, 4096)
    assert model.get_output_embeddings()(hidden[0, :7]).shape == (7, 151936)


def test_shares_of_a_rank_under_zero_add_up_to_the_whole():
    config = load_config(CONFIGS / "gpu" / "qwen3_8b_multihop.yaml", ["learner.zero_stage=3"])
    learner = plan_run(config).processes[0]
    whole = 2 * sum(p.numel() for p in without_weights("Qwen3-8B").parameters())
    ranks = config.learner.num_ranks
    assert learner.parts["weights"] * ranks == pytest.approx(whole, abs=ranks)
    assert learner.parts["optimizer"] * ranks == pytest.approx(6 * whole, abs=ranks)


def test_with_adapters_only_they_have_gradients_and_optimizer():
    overrides = ["learner.zero_stage=0", "learner.lora_rank=16", "actors.gpu_memory_gib=1000"]
    config = load_config(CONFIGS / "gpu" / "qwen3_8b_multihop.yaml", overrides)
    parts = plan_run(config).processes[0].parts
    adapters = KNOWN_SHAPES["Qwen3-8B"].num_adapter_parameters(16)
    assert (parts["gradients"], parts["optimizer"]) == (2 * adapters, 12 * adapters)
    assert parts["weights"] == 2 * 8_190_735_360
