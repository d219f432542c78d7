"""Memory, placement and batch arithmetic of a run; the models' sizes are the published ones."""

import json

import pytest

from tests.support.paths import CONFIGS
from trace_async.config import Config, ConfigError, load_config
from trace_async.run.plan import GIB, KNOWN_SHAPES, LIBRARIES_BYTES, plan_run, shape_from_json, shape_of

REAL = sorted([*CONFIGS.glob("gpu/*.yaml"), *CONFIGS.glob("cluster/*.yaml")])


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-14B", 14_768_307_200),
        ("Llama-3.2-3B", 3_212_749_824),
    ],
)
def test_parameters_of_known_models(name, num_parameters):
    assert KNOWN_SHAPES[name].num_parameters == num_parameters


def test_the_shape_of_a_model_directory_counts_its_parameters(tiny_policy_path):
    from trace_async.policy.load import load_model

    shape = shape_of(str(tiny_policy_path), "policy.path")
    assert shape.num_parameters == sum(p.numel() for p in load_model(tiny_policy_path).parameters())


def test_a_config_without_head_dim_and_with_untied_embeddings():
    content = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 100,
        "vocab_size": 10,
    }
    shape = shape_from_json(json.loads(json.dumps(content)))
    assert (shape.head_dim, shape.tied, shape.qk_norm) == (16, False, False)
    # embeddings twice, q and o, k and v, three of the MLP, two norms, the last norm
    assert shape.num_parameters == 2 * 640 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 100 + 2 * 64 + 64


def test_kv_of_qwen3_8b():
    assert KNOWN_SHAPES["Qwen3-8B"].kv_bytes_per_token(2) == 147_456


def eight_b(*overrides: str) -> Config:
    return load_config(CONFIGS / "gpu/qwen3_8b_multihop.yaml", overrides)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 2, 2, 12), (1, 2, 2, 3), (2, 2, 0.5, 3), (3, 0.5, 0.5, 3)]
)
def test_zero_shares_among_four_ranks(stage, weights, gradients, optimizer):
    config = eight_b(f"learner.zero_stage={stage}", "actors.gpu_memory_gib=1000")
    learner = plan_run(config).processes[0]
    found = [learner.parts[name] / 8_190_735_360 for name in ("weights", "gradients", "optimizer")]
    assert found == [weights, gradients, optimizer]


def test_the_plan_of_one_machine():
    plan = plan_run(eight_b())
    assert plan.nodes == (("4 × learner", "3 × generator", "1 × predictor"),)
    assert plan.rollouts_per_update == 1536
    assert plan.trajectory_equivalents == 1024
    assert plan.max_tokens_per_update == 1536 * 4096
    assert plan.max_micro_batches_per_rank == 96
    generator = plan.processes[1]
    assert generator.parts == {"weights": 2 * 8_190_735_360, "KV": 262_144 * 147_456}
    text = str(plan)
    assert "8,190.7 M parameters" in text
    assert f"{generator.num_bytes / GIB:.1f} GiB" in text
    assert "node 0: 4 × learner, 3 × generator, 1 × predictor" in text


def test_a_trunk_that_is_only_read_needs_no_gradients_and_all_layers_that_are_read():
    def weights(*overrides: str) -> tuple[str, int]:
        (predictor,) = (p for p in plan_run(eight_b(*overrides)).processes if p.name == "predictor")
        return next(iter(predictor.parts.items()))

    layers_8 = weights("predictor.path=''", "predictor.num_layers=8")[1] // 16
    read = ["predictor.path=''", "predictor.trunk=policy", "predictor.num_layers=2"]
    assert weights(*read, "predictor.prefix_layers=8") == ("weights", 4 * layers_8)
    assert (
        weights(*read)[1]
        < weights(*read, "predictor.prefix_layers=8")[1]
        < weights(*read, "predictor.prefix_layers=0")[1]
    )


def test_a_generator_of_several_gpus_stays_on_one_node():
    five_of_four = ["actors.num_generators=5", "actors.generator_gpus=4", "engine.tensor_parallel_size=4"]
    plan = plan_run(eight_b(*five_of_four, "actors.num_nodes=4"))
    assert plan.nodes[0] == ("2 × generator",)
    assert plan.nodes[2] == ("1 × generator", "4 × learner")
    with pytest.raises(ConfigError, match=r"actors\.num_nodes=3: 25 GPUs are asked for"):
        plan_run(eight_b(*five_of_four, "actors.num_nodes=3"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("learner.zero_stage=0", r"each learner needs about \d+ GiB a GPU.*learner\.zero_stage"),
        ("engine.kv_cache_tokens=1000000", r"each generator needs.*engine\.kv_cache_tokens"),
        ("engine.kv_cache_tokens=1000", r"engine\.kv_cache_tokens=1000: must hold at least one trajectory"),
        ("predictor.path=models/Qwen3-8B", r"each predictor needs.*predictor\.path"),
        ("learner.max_tokens_per_micro_batch=4000", r"learner\.max_tokens_per_micro_batch=4000.*=4096"),
        ("actors.generator_gpus=2", r"actors\.generator_gpus=2: must equal engine\.tensor_parallel_size=1"),
        ("actors.num_generators=4", r"actors\.num_nodes=1: 9 GPUs are asked for"),
        ("policy.path=models/Unheard-7B", r"policy\.path=models/Unheard-7B: not on this machine"),
        ("predictor.path=models/Llama-3.2-3B", r"predictor\.path=models/Llama-3\.2-3B: its vocabulary of 128256"),
    ],
)
def test_what_cannot_work_names_the_setting(override, named):
    with pytest.raises(ConfigError, match=named):
        plan_run(eight_b(override))


def test_the_quickstart_needs_no_gpu(monkeypatch):
    monkeypatch.setattr("trace_async.run.plan.num_gpus_here", lambda: 0)
    plan = plan_run(load_config(CONFIGS / "quickstart/multihop.yaml"))
    assert plan.nodes == ()
    assert sum(process.count * process.num_bytes - LIBRARIES_BYTES for process in plan.processes) < 2 * GIB


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ([], 2 * 8_190_735_360 // 4),  # ZeRO-3 over four ranks shares it out like the policy
        (["learner.zero_stage=2"], 2 * 8_190_735_360),
        (["learner.reference_device=cuda"], 2 * 8_190_735_360),
        (["learner.reference_device=cpu"], 0),
    ],
)
def test_a_reference_policy_costs_its_weights(overrides, wanted):
    with_kl, without = (eight_b(*overrides, f"loss.kl_loss_coef={coefficient}") for coefficient in (0.001, 0.0))
    costs = [next(p for p in plan_run(c).processes if p.name == "learner").num_bytes for c in (with_kl, without)]
    assert costs[0] - costs[1] == wanted


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parent.name}_{path.stem}")
def test_configs_of_real_models_fit(path):
    config = load_config(path)
    plan = plan_run(config)
    assert config.name == f"{path.parent.name}_{path.stem}"
    assert len(path.read_text().splitlines()) <= 15
    assert len(plan.nodes) == (4 if path.parent.name == "cluster" else 1)
    # Nothing of what was rented stands idle.
    rented = config.actors.gpus_per_node * len(plan.nodes)
    assert rented == (1 if path.stem.startswith("smollm2") else 8 * len(plan.nodes))
    assert sum(process.count * process.gpus_each for process in plan.processes) == pytest.approx(rented, abs=1e-3)


def test_every_model_and_domain_has_a_config():
    names = {f"{path.parent.name}_{path.stem}" for path in REAL}
    for model in ("qwen3_8b", "qwen3_14b", "llama3_3b"):
        assert {f"gpu_{model}_{domain}" for domain in ("multihop", "math", "functions")} <= names
        assert any(name.startswith(f"cluster_{model}") for name in names)
