"""LoRA adapters sent by themselves: to a real vLLM server, and what is refused."""

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM

from tests.conformance.engine_conformance import LIMIT_S, EngineConformance, Harness
from tests.servers.test_engine_servers import needs
from tests.unit.learner.test_learner import VERSION, assert_close, configure, learning, trees_of, weights_of
from trace_async.config import ConfigError, EngineConfig, load_config
from trace_async.engines.servers.lora_adapter import start_adapter
from trace_async.learner.policy_tensors import LORA_SCALE
from trace_async.weights import WeightUpdate, pack_weights, unpack_weights

RANK = 4


def merged(base: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """W₀ + LORA_SCALE · B A."""
    result = dict(base)
    for name in adapter:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            delta = adapter[f"{layer}.lora_B.weight"] @ adapter[name]
            result[f"{layer}.weight"] = base[f"{layer}.weight"] + LORA_SCALE * delta
    return result


@dataclass
class LoraHarness(Harness):
    """The engine is sent adapters; the reference is Hugging Face's model with merged weights."""

    def __post_init__(self) -> None:
        self.base = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.adapter: WeightUpdate = start_adapter(self.policy_path, RANK)

    def new_weights(self, noise: float = 0.15) -> WeightUpdate:
        generator = torch.Generator().manual_seed(self.version + 1)
        tensors = unpack_weights(self.adapter)
        new = {name: noise * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}
        return pack_weights(new, self.version + 1)

    async def update(self, update: WeightUpdate) -> None:
        self.old_weights[self.version] = {name: t.clone() for name, t in self.model.state_dict().items()}
        await asyncio.wait_for(self.engine.update_weights(update), LIMIT_S)
        self.model.load_state_dict(merged(self.base, unpack_weights(update)))
        self.adapter, self.version = update, update.manifest.policy_version


@needs("vllm")
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.asyncio(loop_scope="class")
class TestAdaptersInVLLM:
    """What holds for merged weights holds for adapters, the log-probabilities to 1e-4 of the merged ones included."""

    backend: ClassVar[str] = "vllm"
    cache_granularity: ClassVar[int] = 32
    long_answer: ClassVar[int] = 470
    prefix_cache: ClassVar[bool] = EngineConformance.prefix_cache
    settings: ClassVar[dict[str, Any]] = {"lora_rank": RANK, "request_timeout_s": 60.0}

    plain_harness = EngineConformance.harness
    needs_prefix_cache = EngineConformance.needs_prefix_cache
    test_greedy_before_any_update = EngineConformance.test_greedy_equals_hugging_face
    test_in_flight = EngineConformance.test_an_update_in_flight_splits_the_answer_by_version
    test_no_stale_kv = EngineConformance.test_no_stale_kv_is_served_after_an_update
    test_bad_updates = EngineConformance.test_a_bad_update_is_an_error_and_a_good_one_heals

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def harness(cls, plain_harness):
        return LoraHarness(plain_harness.engine, plain_harness.policy_path, plain_harness.model)

    def _bad_update(self, harness: LoraHarness, fault: str, empty: Path) -> WeightUpdate:
        good = harness.new_weights()
        tensors = unpack_weights(good)
        name = "model.layers.1.mlp.up_proj.lora_B.weight"
        if fault == "unchanged":
            return pack_weights(unpack_weights(harness.adapter), harness.version + 1)
        if fault == "corrupt":
            tensors[name][3, 2] += 1e-3
            return replace(good, tensors={n: t.numpy() for n, t in tensors.items()})
        if fault == "missing":
            del tensors[name]
        if fault == "wrong shape":
            tensors[name] = tensors[name][:-1]
        if fault == "path without weights":
            return WeightUpdate(manifest=good.manifest, path=empty)
        return pack_weights(tensors, harness.version + 1)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_learner_sends_the_adapter_whose_merged_weights_it_would_send(tiny_policy_path, stage):
    """Names and shapes are those that the engine expects, and W₀ + scale · B A is what is sent without it."""
    adapters, wanted = [], []
    for engine in (["engine.backend=vllm", f"engine.lora_rank={RANK}"], []):
        config = configure(f"learner.lora_rank={RANK}", f"learner.zero_stage={stage}", *engine)
        with learning(config, tiny_policy_path) as learner:
            learner.update(trees_of(0), VERSION)
            (adapters if engine else wanted).append(weights_of(learner))
    start = unpack_weights(start_adapter(tiny_policy_path, RANK))
    assert {n: t.shape for n, t in adapters[0].items()} == {n: t.shape for n, t in start.items()}
    base = dict(AutoModelForCausalLM.from_pretrained(tiny_policy_path).named_parameters())
    assert any((adapters[0][name] != 0).any() for name in adapters[0] if "lora_B" in name)
    assert_close(merged(base, adapters[0]), wanted[0], 1e-6)


@pytest.mark.parametrize("backend", ["torch", "sglang", "fake"])
def test_engines_that_take_no_adapters_say_so(backend):
    with pytest.raises(ConfigError, match=f"engine.backend={backend}: only vllm takes LoRA adapters"):
        EngineConfig(backend=backend, lora_rank=8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.weight_sync=collective"], "engine.weight_sync=collective: not of adapters"),
        (["engine.url=http://127.0.0.1:1"], "adapters need a server that is started for them"),
        (["learner.lora_rank=16"], "engine.lora_rank=8: 0 .* learner.lora_rank=16"),
        (["learner.lora_rank=0"], "engine.lora_rank=8: 0 .* learner.lora_rank=0"),
        (["engine.lora_rank=513"], r"engine.lora_rank=513: must be in \[0, 512\]"),
    ],
)
def test_settings_that_do_not_fit_adapters_are_refused(overrides, message):
    fitting = ["engine.backend=vllm", "engine.lora_rank=8", "learner.lora_rank=8"]
    assert load_config(None, fitting).engine.lora_rank == 8
    with pytest.raises(ConfigError, match=message):
        load_config(None, [*fitting, *overrides])
