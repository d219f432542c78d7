"""What only a GPU can show: compiled kernels, and each part on CUDA against the same part on the CPU.

python -m pytest tests/gpu        on a machine with a GPU; elsewhere all of it is skipped
"""

import random
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.conformance.engine_conformance import EngineConformance
from tests.support.paths import ROOT
from tests.support.random_trees import random_tree
from tests.unit.learner.test_learner import assert_close, configure, train
from tests.unit.learner.test_second_device import elsewhere, predict_on
from tests.unit.packing.test_packing import VOCAB, credit_of, gradients, packed
from trace_async.packing.layout import pack, plan_micro_batches
from trace_async.tracking.log import read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


class TestTorchOnCuda(EngineConformance):
    backend = "torch"
    settings: ClassVar = {"device": "cuda"}


@pytest.mark.parametrize("family", [Qwen3ForCausalLM, LlamaForCausalLM])
@pytest.mark.parametrize("seed", range(2))
def test_gradients_of_compiled_flex_attention_equal_those_of_flat_rows(family, seed):
    rng = random.Random(seed)
    trees = [random_tree(rng, vocab=VOCAB, roots=4, max_turns=6, continuations=8) for _ in range(12)]
    credits = [credit_of([0.0] + [rng.choice([0, 1, -1]) * rng.random() for _ in tree.nodes[1:]]) for tree in trees]
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "tie_word_embeddings": True,
    }
    config = {Qwen3ForCausalLM: Qwen3Config, LlamaForCausalLM: LlamaConfig}[family](**shape)
    model = family(config).cuda()
    expected = gradients(model, "plain", packed(trees, credits, "flat")[1])
    assert expected.abs().max() > 1e-3
    for max_tokens in (10**6, 200):
        pieces, _ = packed(trees, credits, "tree", max_tokens=max_tokens)
        (micro_batches,) = plan_micro_batches(pieces, num_ranks=1, max_tokens=max_tokens)
        found = gradients(model, "flex", [pack(trees, credits, part) for part in micro_batches if part])
        # fp32 sums in another order; a token that saw what it should not would move entries by per cents.
        assert (found - expected).abs().max() < 2e-4 * expected.abs().max(), max_tokens


def test_the_learner_trains_as_on_the_cpu(tiny_policy_path):
    """DeepSpeed, the packed trees and the KL reference on CUDA."""
    settings = ("loss.kl_loss_coef=0.1", "loss.correction=tis", "learner.minibatches=2", "loss.entropy_coef=0.01")
    on_cpu = configure(*settings, "learner.device=cpu", "learner.reference_device=cpu")
    # DeepSpeed settles on one kind of device per process.
    wanted = elsewhere(train, on_cpu, tiny_policy_path, (0, 1))
    metrics, weights = train(configure(*settings, "learner.device=cuda"), tiny_policy_path, seeds=(0, 1))
    for found, same in zip(metrics, wanted[0], strict=True):
        for name in ("loss", "grad_norm", "entropy", "kl_reference", "mismatch", "trained_tokens"):
            assert found[name] == pytest.approx(same[name], rel=1e-3, abs=5e-5), name
    assert_close(weights, wanted[1], 5e-4)


def test_the_predictor_learns_and_answers_as_on_the_cpu(tiny_policy_path):
    wanted = predict_on("cpu", tiny_policy_path)
    for mine, theirs in zip(predict_on("cuda", tiny_policy_path), wanted, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("trunk", ["own", "policy"])
def test_a_run_with_all_parts_on_one_gpu(trunk: str, tiny_policy_path: Path, tmp_path: Path):
    settings = [
        "env.name=tests.support.parity_domain:Parity",
        f"policy.path={tiny_policy_path}",
        f"output_dir={tmp_path}",
        "name=gpu",
        "num_updates=4",
        "sampling.max_turn_tokens=4",
        "sampling.max_context_tokens=64",
        "budget.root_rollouts=32",
        "budget.pool_size=24",
        "eval.num_tasks=20",
        f"predictor.trunk={trunk}",
    ]
    command = [sys.executable, "-m", "scripts.cli", "train", *settings]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    points = read_metrics(tmp_path / "gpu")
    assert [p.step for p in points if "train/reward" in p.metrics] == [1, 2, 3, 4]
    # What the generator said of its tokens and what the learner computes agree, before any update has moved them apart.
    assert next(p.metrics["learner/mismatch_max"] for p in points if "learner/mismatch_max" in p.metrics) < 1e-3
