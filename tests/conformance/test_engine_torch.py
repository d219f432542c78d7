"""The embedded engine: the conformance suite, and what only it promises."""

import asyncio
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.conformance.engine_conformance import EngineConformance, Harness
from trace_async.config import EngineConfig
from trace_async.engine import EngineDeadError, EngineError, EngineRequestError, EngineTimeoutError, WeightSyncError
from trace_async.engines import make_engine
from trace_async.engines.embedded import scheduler as torch_scheduler
from trace_async.engines.embedded.scheduler import Scheduler
from trace_async.policy.load import load_model
from trace_async.predictor.states import PolicyTrunk
from trace_async.types import PrefixQuery, SamplingParams
from trace_async.weights import host_bucket, pack_weights


class TestTorch(EngineConformance):
    backend = "torch"


class TestTorchWithoutRoom(EngineConformance):
    """Few rows and a pool that holds a request or two: everything waits, moves and is evicted."""

    backend = "torch"
    settings: ClassVar = {"max_running_requests": 5, "kv_cache_tokens": 700}


async def started(path, *, max_context=256, seed=0, **settings):
    config = EngineConfig(backend="torch", device="cpu", **settings)
    engine = make_engine(config, policy_path=path, max_context_tokens=max_context, seed=seed, log_dir=path)
    await engine.start()
    return engine


SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
        (LlamaForCausalLM, LlamaConfig(**{**SMALL, "num_key_value_heads": 4})),
        (Qwen2ForCausalLM, Qwen2Config(**SMALL)),
        (Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=False)),
    ],
    ids=["llama3.2", "llama", "qwen2", "qwen3-untied"],
)
async def test_families_equal_hugging_face(model_class, config, tmp_path):
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    engine = await started(tmp_path)
    harness = Harness(engine, tmp_path, load_model(tmp_path))
    for length in (1, 40, 100):
        prompt = harness.prompt(length)
        (greedy,) = await harness.generate(prompt, temperature=0, max_new_tokens=20)
        assert list(greedy.token_ids) == harness.greedy(prompt, 20)
        for completion in await harness.generate(prompt, temperature=0.8, max_new_tokens=20, n=2):
            harness.check_logprobs(prompt, completion, 0.8)
    await engine.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)), "not gpt2"),
        (lambda: MistralForCausalLM(MistralConfig(**SMALL)), "not mistral"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, max_position_embeddings=100)), "ends at 100 positions"),
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(**SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
            ),
            "dynamic",
        ),
        (
            lambda: Qwen2ForCausalLM(
                Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1)
            ),
            "sliding",
        ),
    ],
)
async def test_models_that_it_would_get_wrong_are_refused(make, message, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=message):
        await started(tmp_path)


async def test_the_engines_seed_fixes_its_first_answers_whatever_else_runs(tiny_policy_path):
    params = SamplingParams(max_new_tokens=30)
    answers = []
    for seed, num_others in ((0, 0), (0, 22), (1, 0)):
        engine = await started(tiny_policy_path, seed=seed)
        requests = [engine.generate([9, 10, 11], params) for _ in range(2)]
        requests += [engine.generate([12, i, 40], SamplingParams(max_new_tokens=25)) for i in range(num_others)]
        answers.append([completion.token_ids for completion in (await asyncio.gather(*requests))[:2]])
        await engine.close()
    alone, crowded, other_seed = answers
    assert alone == crowded
    assert alone[0] != alone[1]
    assert other_seed[0] != alone[0]


async def test_without_a_prefix_cache_nothing_is_reused_and_all_is_right(tiny_policy_path):
    engine = await started(tiny_policy_path, prefix_cache=False)
    harness = Harness(engine, tiny_policy_path, load_model(tiny_policy_path))
    prompt = harness.prompt(60)
    for _ in range(2):
        for completion in await harness.generate(prompt, n=3, max_new_tokens=10):
            assert completion.cached_tokens == 0
            harness.check_logprobs(prompt, completion)
    await engine.close()


async def test_long_prompts_are_computed_in_chunks(tiny_policy_path, monkeypatch):
    monkeypatch.setattr(torch_scheduler, "MAX_CHUNK_TOKENS", 30)
    engine = await started(tiny_policy_path)
    harness = Harness(engine, tiny_policy_path, load_model(tiny_policy_path))
    prompts = [harness.prompt(length) for length in (29, 30, 31, 60, 61, 200)]
    prompts.append([*prompts[-1][:100], *harness.prompt(90)])
    answers = await asyncio.gather(*(harness.generate(p, temperature=0, max_new_tokens=10) for p in prompts))
    for prompt, (completion,) in zip(prompts, answers, strict=True):
        assert list(completion.token_ids) == harness.greedy(prompt, 10)
        harness.check_logprobs(prompt, completion)
    await engine.close()


@pytest.mark.parametrize("seed", range(3))
async def test_a_storm_of_turns_aborts_and_updates_leaves_every_token_right(seed, tiny_policy_path):
    engine = await started(tiny_policy_path, max_running_requests=7, kv_cache_tokens=500)
    harness = Harness(engine, tiny_policy_path, load_model(tiny_policy_path))
    rng, roots = np.random.default_rng(seed), [harness.prompt(40) for _ in range(4)]
    finished = []

    async def agent(root):
        history = list(root)
        for _ in range(3):
            before = list(history)
            (completion,) = await harness.generate(before, max_new_tokens=int(rng.integers(1, 25)))
            finished.append((before, completion))
            history += [*completion.token_ids, *harness.prompt(int(rng.integers(1, 12)))]

    tasks = [asyncio.create_task(agent(roots[i % 4])) for i in range(24)]
    for _ in range(6):
        await asyncio.sleep(float(rng.uniform(0, 0.05)))
        tasks[int(rng.integers(24))].cancel()
        await harness.update(harness.new_weights())
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert not [r for r in results if isinstance(r, Exception)]
    assert len(finished) >= 18 * 3
    for prompt, completion in finished:
        harness.check_logprobs(prompt, completion)
    health = await engine.health()
    assert (health.num_running, health.num_waiting) == (0, 0)
    await engine.close()


async def test_the_same_version_may_arrive_twice(tiny_policy_path):
    engine = await started(tiny_policy_path)
    harness = Harness(engine, tiny_policy_path, load_model(tiny_policy_path))
    update = harness.new_weights()
    await harness.update(update)
    await engine.update_weights(update)
    assert (await engine.health()).policy_version == 1
    await engine.close()


async def test_weights_that_are_not_finite_are_refused_and_the_old_ones_serve_on(tiny_policy_path):
    engine = await started(tiny_policy_path)
    harness = Harness(engine, tiny_policy_path, load_model(tiny_policy_path))
    state = {name: tensor.clone() for name, tensor in harness.model.state_dict().items() if name != "lm_head.weight"}
    state["model.norm.weight"][3] = float("nan")
    with pytest.raises(WeightSyncError, match=r"model\.norm\.weight is not finite"):
        await engine.update_weights(pack_weights(state, 1))
    prompt = harness.prompt(30)
    (completion,) = await harness.generate(prompt, temperature=0, max_new_tokens=10)
    assert list(completion.token_ids) == harness.greedy(prompt, 10)
    assert completion.version_spans[0].policy_version == 0
    await engine.close()


async def test_bfloat16_stays_near_hugging_face(tiny_policy_path):
    engine = await started(tiny_policy_path, dtype="bfloat16")
    model = load_model(tiny_policy_path, dtype="bfloat16")
    prompt = list(range(8, 58))
    completion = await engine.generate(prompt, SamplingParams(max_new_tokens=20))
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    with torch.inference_mode():
        expected = model(ids).logits[0].float().log_softmax(-1)[49:-1].gather(1, ids[0, 50:, None])[:, 0]
    assert (torch.tensor(completion.logprobs) - expected).abs().mean() < 0.1
    await engine.close()


async def test_requests_in_flight_end_when_the_engine_closes(tiny_policy_path, monkeypatch):
    engine = await started(tiny_policy_path)
    stepped = threading.Event()

    def endless_step(self):
        stepped.set()
        time.sleep(0.01)
        return []

    monkeypatch.setattr(Scheduler, "step", endless_step)
    task = asyncio.create_task(engine.generate([9] * 20, SamplingParams(max_new_tokens=200)))
    assert await asyncio.to_thread(stepped.wait, 60)
    await engine.close()
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(task, 5)
    with pytest.raises(EngineDeadError):
        await engine.generate([9], SamplingParams())
    assert not [thread for thread in threading.enumerate() if thread.name == "torch-engine"]


async def test_an_error_in_the_worker_reaches_everybody(tiny_policy_path, monkeypatch):
    engine = await started(tiny_policy_path)

    def broken(self, num_rows):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(Scheduler, "_forward", broken)
    requests = [engine.generate([9, i], SamplingParams()) for i in range(3)]
    failures = await asyncio.wait_for(asyncio.gather(*requests, return_exceptions=True), 5)
    assert all(isinstance(failure, EngineDeadError) and "no memory left" in str(failure) for failure in failures)
    update = engine.update_weights(pack_weights({}, 1))
    for call in (engine.health(), update, engine.generate([9], SamplingParams())):
        with pytest.raises(EngineDeadError, match="no memory left"):
            await call
    await engine.close()


async def test_a_worker_that_hangs_is_a_timeout(tiny_policy_path, monkeypatch):
    engine = await started(tiny_policy_path, request_timeout_s=0.2)
    woken = threading.Event()

    def hanging_step(self):
        woken.wait(10)
        return []

    monkeypatch.setattr(Scheduler, "step", hanging_step)
    with pytest.raises(EngineTimeoutError):
        await asyncio.wait_for(engine.generate([9], SamplingParams()), 5)
    with pytest.raises(EngineTimeoutError):
        await asyncio.wait_for(engine.update_weights(pack_weights({}, 1)), 5)
    with pytest.raises(EngineTimeoutError):
        await engine.health()
    with pytest.raises(EngineTimeoutError, match="does not stop"):
        await asyncio.wait_for(engine.close(), 5)
    woken.set()


async def test_waiting_behind_others_is_no_timeout(tiny_policy_path, monkeypatch):
    # 30 steps of 0.1 s one after another: longer than the limit in all, each far below it.
    engine = await started(tiny_policy_path, request_timeout_s=1.5, max_running_requests=1)
    step = Scheduler.step

    def slow_step(self):
        time.sleep(0.1)
        return step(self)

    monkeypatch.setattr(Scheduler, "step", slow_step)
    answers = await asyncio.gather(*(engine.generate([9, i], SamplingParams(max_new_tokens=5)) for i in range(6)))
    assert [len(completion.token_ids) for completion in answers] == [5] * 6
    await engine.close()


async def test_stop_strings_need_a_tokenizer(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    engine = await started(tmp_path)
    with pytest.raises(EngineRequestError, match="tokenizer"):
        await engine.generate([9], SamplingParams(stop=("x",)))
    await engine.close()


@pytest.mark.parametrize("num_layers", [1, 0])
async def test_the_state_of_a_prompt_is_what_the_predictors_trunk_reads(num_layers, tiny_policy_path):
    """In the middle of other work, with a chunked prompt, and from the tokens that are not cached."""
    engine = await started(tiny_policy_path)
    trunk = PolicyTrunk(tiny_policy_path, num_layers=num_layers, num_last=4, device="cpu")
    params = SamplingParams(max_new_tokens=3, read_layers=num_layers, read_tokens=4)
    prompts = [tuple(int(t) for t in np.random.default_rng(i).integers(5, 40, 6 + 9 * i)) for i in range(4)]
    other = asyncio.create_task(engine.generate((1, 2, 3, 4), SamplingParams(max_new_tokens=40)))
    answers = await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))
    assert (await other).prompt_state is None
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.prompt_state is not None
        assert answer.prompt_state.policy_version == 0
        (expected,) = trunk.read([PrefixQuery(token_ids=prompt, positions=(len(prompt),))])
        assert np.frombuffer(answer.prompt_state.values, np.float32) == pytest.approx(expected, abs=1e-4)
    # all but the last token is cached now: the state is of that one alone
    again = await engine.generate(prompts[3], params)
    alone = PolicyTrunk(tiny_policy_path, num_layers=num_layers, num_last=1, device="cpu")
    (expected,) = alone.read([PrefixQuery(token_ids=prompts[3], positions=(len(prompts[3]),))])
    assert np.frombuffer(again.prompt_state.values, np.float32) == pytest.approx(expected, abs=1e-4)
    await engine.close()


async def test_a_state_is_of_the_weights_that_wrote_the_first_token(tiny_policy_path, monkeypatch):
    monkeypatch.setattr(torch_scheduler, "MAX_CHUNK_TOKENS", 4)
    engine = await started(tiny_policy_path)
    weights = {name: tensor * 1.3 for name, tensor in load_model(tiny_policy_path).named_parameters()}
    await engine.update_weights(pack_weights(weights, 5))
    prompt = tuple(range(5, 27))
    answer = await engine.generate(prompt, SamplingParams(max_new_tokens=2, read_layers=1, read_tokens=2))
    trunk = PolicyTrunk(tiny_policy_path, num_layers=1, num_last=2, device="cpu")
    trunk.receive([host_bucket(weights)], pack_weights(weights, 5).manifest)
    (expected,) = trunk.read([PrefixQuery(token_ids=prompt, positions=(len(prompt),))])
    assert answer.prompt_state.policy_version == 5
    assert np.frombuffer(answer.prompt_state.values, np.float32) == pytest.approx(expected, abs=1e-4)
    await engine.close()
