import math
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.live_bytes import LiveBytes
from tests.support.random_trees import random_tree
from trace_async.config import Config, ConfigError, LearnerConfig, load_config
from trace_async.learner.deepspeed import RankAddress
from trace_async.learner.learner import Learner, LearnerError, schedule
from trace_async.learner.policy_tensors import full_bytes
from trace_async.learner.state import export_checkpoint, export_learner, load_learner, plan_shards, save_learner
from trace_async.policy.load import load_model
from trace_async.run.checkpoint import CheckpointError
from trace_async.trees.tree import RolloutTree
from trace_async.weights import WeightCount, join_buckets, unpack_weights

CPU = torch.device("cpu")
VERSION = 2
VOCAB = 100
# With the default threshold ZeRO-3 keeps all parameters of so small a policy whole.
ZERO_3 = (
    "learner.zero_stage=3",
    "learner.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}",
)


def configure(*overrides: str) -> Config:
    return load_config(
        None, ["learner.max_tokens_per_micro_batch=100", "actors.max_staleness=2", "num_updates=10", *overrides]
    )


def trees_of(seed: int, count: int = 6) -> list[RolloutTree]:
    rng = random.Random(seed)
    return [random_tree(rng, vocab=VOCAB) for _ in range(count)]


@contextmanager
def learning(config: Config, policy_path: Path) -> Iterator[Learner]:
    learner = Learner(config, policy_path)
    try:
        yield learner
    finally:
        # One after another in this process; what a backward pass cut short left behind goes with its engine.
        learner.engine.destroy()


def kept(model: torch.nn.Module, into: list[torch.nn.Module]) -> torch.nn.Module:
    into.append(model)
    return model


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    """Copies of all, in the words of the seam to generators."""
    found: dict[str, torch.Tensor] = {}
    for bucket in learner.weights():
        count = WeightCount()
        count.add(bucket)
        found |= unpack_weights(join_buckets([bucket], count.manifest(9)))
    return found


def train(config: Config, policy_path: Path, seeds=(0, 1, 2)) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    with learning(config, policy_path) as learner:
        return [learner.update(trees_of(seed), VERSION) for seed in seeds], weights_of(learner)


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].float() - tensor.float()).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def reference(tiny_policy_path):
    """Metrics and weights of three updates: one rank, ZeRO 0, fp32, trees packed."""
    return train(configure(), tiny_policy_path)


@pytest.mark.parametrize(
    "overrides",
    [
        ["learner.zero_stage=1"],
        ["learner.zero_stage=2"],
        ["learner.zero_stage=3"],
        ["learner.packing=flat"],
        ["learner.max_tokens_per_micro_batch=100000"],
        ["learner.logprob_chunk_tokens=7"],
        ["learner.gradient_checkpointing=true"],
        ["learner.zero_stage=3", "learner.gradient_checkpointing=true", "learner.logprob_chunk_tokens=7"],
        ["learner.zero_stage=2", "learner.deepspeed={zero_optimization: {offload_optimizer: {device: cpu}}}"],
    ],
    ids=lambda overrides: " ".join(o.removeprefix("learner.") for o in overrides),
)
def test_however_it_is_computed_it_is_the_same_training(reference, tiny_policy_path, overrides):
    metrics, weights = train(configure(*overrides), tiny_policy_path)
    for found, wanted in zip(metrics, reference[0], strict=True):
        for name in ("loss", "grad_norm", "ratio_mean", "clip_fraction", "entropy", "mismatch", "trained_tokens"):
            assert found[name] == pytest.approx(wanted[name], rel=2e-4, abs=2e-5), name
    # Three steps of Adam move a weight by up to 1.5e-3; where a gradient is all rounding, so is its step.
    assert_close(weights, reference[1], 1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bfloat16_trains_close_to_float32(reference, tiny_policy_path, stage):
    metrics, weights = train(configure(f"learner.zero_stage={stage}", "learner.dtype=bfloat16"), tiny_policy_path)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    for found, wanted in zip(metrics, reference[0], strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=0.03)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.1)


def test_weights_are_the_models_by_name_with_tied_tensors_once(tiny_policy_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
    with learning(configure(), tiny_policy_path) as learner:
        start = weights_of(learner)
        assert start.keys() == dict(model.named_parameters()).keys()
        assert "lm_head.weight" not in start
        assert_close(start, dict(model.named_parameters()), 0.0)
        metrics = learner.update(trees_of(0), VERSION)
        assert metrics["updated"] == 1.0
        moved = weights_of(learner)
        assert any(not torch.equal(moved[name], start[name]) for name in start)


@pytest.mark.parametrize(
    "overrides", [[], [*ZERO_3], ["learner.lora_rank=4"], [*ZERO_3, "learner.lora_rank=4"]], ids=str
)
def test_handing_out_weights_holds_one_bucket_at_most(tiny_policy_path, overrides):
    limit = 40_000
    with learning(configure(f"learner.weight_bucket_bytes={limit}", *overrides), tiny_policy_path) as learner:
        held = [getattr(p, "ds_tensor", p) for p in learner.policy.parameters()]
        total = sum(full_bytes(p) for n, p in learner.policy.named_parameters() if "lora_" not in n)
        sizes, earlier = [], []
        with LiveBytes([*held, *learner.policy.parameters()]) as measured:
            for bucket in learner.weights():
                assert all(array() is None for array in earlier), "a bucket outlived the next one's gathering"
                sizes.append(sum(array.nbytes for array in bucket.tensors.values()))
                earlier = [weakref.ref(array) for array in bucket.tensors.values()]
                del bucket
    assert sum(sizes) == total
    assert max(sizes) <= limit < total / 5
    whole_in_place = not overrides  # ZeRO 0 on the CPU: nothing needs to be gathered, merged or copied
    assert measured.peak == 0 if whole_in_place else 0 < measured.peak <= 1.25 * limit


def test_training_raises_what_was_rewarded(tiny_policy_path):
    """Two root rollouts that differ in their one token: 7 succeeds, 8 fails."""
    trees = trees_of(3, count=1)
    tree = trees[0]
    nodes = [tree.nodes[0]]
    first = next(node for node in tree.nodes[1:] if node.parent == 0)
    base: dict[str, Any] = {"num_generated": 1, "logprobs": (-4.0,), "version_spans": first.version_spans[:1]}
    nodes += [replace(first, parent=0, rollout=r, token_ids=(7 + r,), **base) for r in (0, 1)]
    rollouts = [replace(tree.rollouts[0], leaf=1 + r, reward=1.0 - r) for r in (0, 1)]
    pair = replace(tree, nodes=tuple(nodes), rollouts=tuple(rollouts))

    def probabilities(weights):
        model = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
        model.load_state_dict(weights, strict=False)
        logits = model(input_ids=torch.tensor([pair.nodes[0].token_ids])).logits[0, -1]
        return logits.softmax(-1)[[7, 8]].tolist()

    with learning(configure(), tiny_policy_path) as learner:
        before = probabilities(weights_of(learner))
        for _ in range(3):
            learner.update([pair], VERSION)
        after = probabilities(weights_of(learner))
    assert after[0] > 1.05 * before[0]
    assert after[1] < 0.95 * before[1]


def test_an_update_without_signal_changes_nothing_and_says_so(tiny_policy_path):
    trees = [replace(t, rollouts=tuple(replace(r, reward=1.0) for r in t.rollouts)) for t in trees_of(0)]
    with learning(configure(), tiny_policy_path) as learner:
        learner.update(trees_of(1), VERSION)
        before = weights_of(learner)
        assert learner.update(trees, VERSION)["updated"] == 0.0
        assert_close(weights_of(learner), before, 0.0)


def test_an_update_whose_tokens_are_all_clipped_says_so(tiny_policy_path):
    """Rewarded tokens far likelier than when they were generated, others far less likely: nothing is left to push."""
    trees = trees_of(0)
    with learning(configure("loss.advantage=grpo"), tiny_policy_path) as learner:
        tree = next(t for t in trees if {r.reward for r in t.rollouts if r.kind == "root"} == {0.0, 1.0})
        reward = [r.reward for r in tree.rollouts]
        nodes = [replace(n, logprobs=(-50.0 if reward[n.rollout] else 0.0,) * n.num_generated) for n in tree.nodes[1:]]
        clipped = replace(tree, nodes=(tree.nodes[0], *nodes))
        metrics = learner.update([clipped], VERSION)
    assert metrics["clip_fraction"] == 1.0
    assert metrics["updated"] == 0.0


def test_zero_advantage_trees_stay_in_the_normaliser(tiny_policy_path):
    idle = [replace(t, rollouts=tuple(replace(r, reward=0.0) for r in t.rollouts)) for t in trees_of(5)]
    with learning(configure(), tiny_policy_path) as learner:
        alone = learner.update(trees_of(0), VERSION)
    with learning(configure(), tiny_policy_path) as learner:
        diluted = learner.update([*trees_of(0), *idle], VERSION)
    assert diluted["grad_norm"] == pytest.approx(alone["grad_norm"] / 2, rel=1e-4)
    assert diluted["packed_tokens"] == alone["packed_tokens"]


def test_stale_trees_are_refused(tiny_policy_path):
    with learning(configure("actors.max_staleness=1"), tiny_policy_path) as learner:
        with pytest.raises(AssertionError, match="staleness 2 is not within"):
            learner.update(trees_of(0), VERSION)
        with pytest.raises(AssertionError, match="staleness -1 is not within"):
            learner.update(trees_of(0), -1)


def test_an_update_that_changes_no_weight_is_an_error(tiny_policy_path):
    config = configure("learner.lr_schedule=linear", "num_updates=1")
    with learning(config, tiny_policy_path) as learner:
        learner.update(trees_of(0), VERSION)
        with pytest.raises(LearnerError, match="no weight changed"):
            learner.update(trees_of(1), VERSION)


def impossible(tree: RolloutTree) -> RolloutTree:
    """The tree, of whose tokens its engine says that they could not be sampled."""
    return replace(tree, nodes=tuple(replace(n, logprobs=(-math.inf,) * n.num_generated) for n in tree.nodes))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["learner.minibatches=2"],
        ["learner.zero_stage=1"],
        ["learner.zero_stage=2"],
        ZERO_3,
        ["learner.dtype=bfloat16"],
        ["learner.zero_stage=2", "learner.dtype=bfloat16"],
    ],
    ids=" ".join,
)
def test_a_step_whose_loss_is_not_finite_is_left_out_and_the_next_one_is_as_if_it_had_not_been(
    tiny_policy_path, overrides
):
    config = configure(*overrides)
    with learning(config, tiny_policy_path) as learner:
        learner.update(trees_of(0), VERSION)
        expected = learner.update(trees_of(1), VERSION)
        weights = weights_of(learner)
    bad = [impossible(tree) for tree in trees_of(7)]
    with learning(config, tiny_policy_path) as learner:
        learner.update(trees_of(0), VERSION)
        before = weights_of(learner)
        skipped = learner.update(bad, VERSION)
        assert (skipped["updated"], skipped["skipped_steps"]) == (0.0, float(config.learner.minibatches))
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(learner).items())
        found = learner.update(trees_of(1), VERSION)
        assert found["skipped_steps"] == 0.0
        assert found["optimizer_steps"] == expected["optimizer_steps"] == 2.0 * config.learner.minibatches
        assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(learner).items())


def test_a_gradient_that_is_not_finite_leaves_its_step_out(tiny_policy_path):
    """The loss is finite, the backward pass is not, as it may be of a kernel."""
    with learning(configure(), tiny_policy_path) as learner:
        before = weights_of(learner)
        hook = learner.policy.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
        metrics = learner.update(trees_of(0), VERSION)
        assert (metrics["updated"], metrics["skipped_steps"]) == (0.0, 1.0)
        assert math.isfinite(metrics["loss"])
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(learner).items())
        hook.remove()
        assert learner.update(trees_of(0), VERSION)["updated"] == 1.0


@pytest.mark.parametrize("correction", ["none", "decoupled", "tis"])
def test_minibatches_and_corrections(tiny_policy_path, correction):
    config = configure(
        "learner.minibatches=2", f"loss.correction={correction}", "loss.kl_loss_coef=0.1", "loss.entropy_coef=0.01"
    )
    with learning(config, tiny_policy_path) as learner:
        metrics = learner.update(trees_of(0), VERSION)
        assert metrics["optimizer_steps"] == 2
        # The policy has moved from its start by one step when the second minibatch is seen.
        assert 0 < metrics["kl_reference"] < 0.1
        assert metrics["entropy"] > 1


def test_the_reference_is_loaded_only_when_kl_holds_to_it_on_a_device_of_its_own(tiny_policy_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "trace_async.learner.learner.load_model", lambda *a, **k: loaded.append(a) or load_model(*a, **k)
    )
    with learning(configure("learner.reference_device=cuda"), tiny_policy_path):
        assert len(loaded) == 1  # the reference is absent, so is what is said of it
    with learning(configure("loss.kl_loss_coef=0.1"), tiny_policy_path) as learner:
        assert len(loaded) == 3
        wanted = [learner.update(trees_of(seed), VERSION)["kl_reference"] for seed in (0, 1)]
    assert wanted[0] == pytest.approx(0, abs=1e-9)
    assert wanted[1] > 1e-6
    for device, is_whole in (("cpu", True), ("auto", False)):
        models = []
        monkeypatch.setattr(
            "trace_async.learner.learner.load_model", lambda *a, into=models, **k: kept(load_model(*a, **k), into)
        )
        with learning(
            configure("loss.kl_loss_coef=0.1", f"learner.reference_device={device}", *ZERO_3), tiny_policy_path
        ) as learner:
            found = [learner.update(trees_of(seed), VERSION)["kl_reference"] for seed in (0, 1)]
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-9)
        # ZeRO-3 leaves nothing of a partitioned tensor in its place.
        _, reference = models
        assert {parameter.numel() > 0 for parameter in reference.parameters()} == {is_whole}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_reference_on_a_device_that_is_not_there_is_refused(tiny_policy_path):
    with pytest.raises(ConfigError, match=r"learner\.reference_device=cuda: PyTorch .* sees no GPU"):
        Learner(
            configure("loss.kl_loss_coef=0.1", "learner.reference_device=cuda"),
            tiny_policy_path,
        )


def test_a_rank_computes_on_the_device_that_ray_shows_it():
    # Of eight ranks with a GPU each the fourth sees one device, number 0; without Ray it may see all eight.
    rank = RankAddress(rank=3, world_size=8, host="10.0.0.1", port=29500)
    for device, local_rank in ((torch.device("cuda", 0), "0"), (torch.device("cuda", 3), "3"), (CPU, "0")):
        environment = rank.environment(device)
        assert environment["LOCAL_RANK"] == local_rank
        assert (environment["RANK"], environment["WORLD_SIZE"]) == ("3", "8")


def test_schedules():
    config = LearnerConfig(lr_warmup_updates=3, lr_schedule="linear")
    assert [schedule(config, step, 7) for step in range(8)] == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = replace(config, lr_schedule="cosine", lr_warmup_updates=0)
    assert [schedule(cosine, step, 2) for step in range(3)] == pytest.approx([1.0, 0.5, 0.0])
    assert schedule(replace(config, lr_schedule="constant", minibatches=2), 6, 100) == 1.0


@pytest.mark.parametrize(("saver", "loader"), [(0, 0), (0, 2), (2, 3), (3, 0), (1, 1)])
def test_a_checkpoint_goes_on_exactly_at_any_stage(reference, tiny_policy_path, tmp_path, saver, loader):
    with learning(configure(f"learner.zero_stage={saver}"), tiny_policy_path) as learner:
        for seed in (0, 1):
            learner.update(trees_of(seed), VERSION)
        save_learner(learner, tmp_path / "learner")
    with learning(configure(f"learner.zero_stage={loader}"), tiny_policy_path) as learner:
        load_learner(learner, tmp_path / "learner")
        metrics = learner.update(trees_of(2), VERSION)
        assert metrics["optimizer_steps"] == 3
        assert metrics["loss"] == pytest.approx(reference[0][2]["loss"], abs=2e-5)
        assert_close(weights_of(learner), reference[1], 1e-4)


def test_a_bfloat16_checkpoint_keeps_the_float32_weights(tiny_policy_path, tmp_path):
    config = configure("learner.zero_stage=2", "learner.dtype=bfloat16")
    with learning(config, tiny_policy_path) as learner:
        learner.update(trees_of(0), VERSION)
        save_learner(learner, tmp_path / "learner")
        learner.update(trees_of(1), VERSION)
        wanted = weights_of(learner)
    for stage in (0, 3):
        with learning(configure(f"learner.zero_stage={stage}", "learner.dtype=bfloat16"), tiny_policy_path) as learner:
            load_learner(learner, tmp_path / "learner")
            learner.update(trees_of(1), VERSION)
            assert_close(weights_of(learner), wanted, 2e-3)


def test_exports_load_in_transformers(tiny_policy_path, tmp_path):
    with learning(configure(), tiny_policy_path) as learner:
        learner.update(trees_of(0), VERSION)
        save_learner(learner, tmp_path / "learner")
        export_learner(learner, tmp_path / "live")
        wanted = weights_of(learner)
    export_checkpoint(tmp_path / "learner", tmp_path / "from_checkpoint")
    for name in ("live", "from_checkpoint"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert_close(dict(model.named_parameters()), wanted, 0.0)
        assert (tmp_path / name / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="exists already"):
        export_checkpoint(tmp_path / "learner", tmp_path / "live")


def test_large_policies_are_saved_and_exported_in_several_files(tiny_policy_path, tmp_path, monkeypatch):
    monkeypatch.setattr("trace_async.learner.state.SHARD_BYTES", 150_000)
    monkeypatch.setattr("trace_async.learner.state.EXPORT_BYTES", 60_000)
    with learning(configure("learner.lora_rank=2", "learner.weight_bucket_bytes=20000"), tiny_policy_path) as learner:
        learner.update(trees_of(0), VERSION)
        save_learner(learner, tmp_path / "learner")
        export_learner(learner, tmp_path / "live")
        wanted = weights_of(learner)
    assert len(list((tmp_path / "learner").glob("tensors-*.safetensors"))) > 1
    export_checkpoint(tmp_path / "learner", tmp_path / "from_checkpoint")
    for name in ("live", "from_checkpoint"):
        files = sorted((tmp_path / name).glob("*.safetensors"))
        assert len(files) > 3
        assert all(file.stat().st_size < 65_000 for file in files)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert_close(dict(model.named_parameters()), wanted, 1e-6)


def test_ranks_share_the_files_of_a_checkpoint_out(monkeypatch):
    monkeypatch.setattr("trace_async.learner.state.SHARD_BYTES", 100)
    sizes = {"a": 90, "b": 30, "c": 30, "d": 60, "e": 50, "f": 200}
    # b and c go to rank 1, which has 60 then; d too, 120 against 90: e to rank 0 (140), f to rank 1.
    assert plan_shards(sizes, 2) == [(0, ["a", "e"]), (1, ["b", "c", "d"]), (1, ["f"])]
    assert plan_shards(sizes, 1) == [(0, ["a", "b"]), (0, ["c", "d", "e"]), (0, ["f"])]
    assert [rank for rank, _ in plan_shards({"a": 1, "b": 1}, 4)] == [0, 1]


def test_a_checkpoint_of_another_policy_is_refused(tiny_policy_path, tmp_path):
    with learning(configure(), tiny_policy_path) as learner:
        save_learner(learner, tmp_path / "learner")
    with (
        learning(configure("learner.lora_rank=2"), tiny_policy_path) as learner,
        pytest.raises(CheckpointError, match="does not fit this policy"),
    ):
        load_learner(learner, tmp_path / "learner")
    (tmp_path / "learner" / "tensors-0000.safetensors").write_bytes(b"\x08")
    with (
        learning(configure(), tiny_policy_path) as learner,
        pytest.raises(CheckpointError, match=r"tensors-0000\.safetensors"),
    ):
        load_learner(learner, tmp_path / "learner")


def test_deepspeed_options_of_ours_are_refused(tiny_policy_path):
    with pytest.raises(ConfigError, match=r"learner\.deepspeed=\['bf16'\]"):
        Learner(configure("learner.deepspeed={bf16: {enabled: true}}"), tiny_policy_path)


@pytest.mark.parametrize("stage", [0, 3])
def test_lora_trains_adapters_and_hands_out_merged_weights(tiny_policy_path, tmp_path, stage):
    config = configure("learner.lora_rank=4", f"learner.zero_stage={stage}", "learner.learning_rate=0.01")
    base = dict(AutoModelForCausalLM.from_pretrained(tiny_policy_path).named_parameters())
    with learning(config, tiny_policy_path) as learner:
        assert_close(weights_of(learner), base, 0.0)
        for seed in (0, 1):
            learner.update(trees_of(seed), VERSION)
        merged = weights_of(learner)
        save_learner(learner, tmp_path / "learner")
        before = learner.update(trees_of(2), VERSION)
    moved = {name for name in base if not torch.equal(merged[name], base[name])}
    assert moved == {name for name in base if "proj" in name}
    export_checkpoint(tmp_path / "learner", tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert_close(dict(exported.named_parameters()), merged, 1e-6)
    with learning(config, tiny_policy_path) as learner:
        load_learner(learner, tmp_path / "learner")
        assert_close(weights_of(learner), merged, 1e-6)
        assert learner.update(trees_of(2), VERSION)["loss"] == pytest.approx(before["loss"], abs=2e-5)


def test_the_learner_is_quiet_and_imports_deepspeed_late(tiny_policy_path):
    script = """
import sys
from pathlib import Path
import trace_async.learner.learner, trace_async.learner.state
assert "deepspeed" not in sys.modules
from tests.unit.learner.test_learner import configure, learning, trees_of
with learning(configure("learner.zero_stage=2"), Path(sys.argv[1])) as learner:
    learner.update(trees_of(0), 2)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_policy_path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_metrics_are_finite_numbers(reference):
    for metrics in reference[0]:
        assert all(np.isfinite(value) for value in metrics.values()), metrics
