"""What every engine must do, checked against Hugging Face's model on the same weights.

To plug in an engine, subclass in its test file; pytest then runs all of it on one engine per class:

    class TestSGLang(EngineConformance):
        backend = "sglang"
        settings: ClassVar = {...}             # further fields of EngineConfig
        prefix_cache = True                    # False: it keeps no KV, and the tests of its cache are skipped
        cache_granularity = 1                  # tokens in a block of the prefix cache
        long_answer = 200                      # an answer that takes this engine about half a second or more

The engine is shared by the tests of a class, so each test draws prompts that no other test has seen, and `Harness`
keeps the reference model and the version in step with the engine.
"""

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import PreTrainedModel

from trace_async.config import EngineConfig
from trace_async.engine import EngineRequestError, WeightSyncError
from trace_async.engines import make_engine
from trace_async.policy.load import load_model, load_tokenizer
from trace_async.types import Completion, SamplingParams
from trace_async.weights import WeightUpdate, pack_weights

MAX_CONTEXT = 512
LIMIT_S = 60.0


@dataclass
class Harness:
    """An engine under test, with Hugging Face's model under the same weights (and under all earlier ones)."""

    engine: Any
    """An `Engine`; tests of one kind also ask it for what only that kind has."""
    policy_path: Path
    model: torch.nn.Module
    version: int = 0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    old_weights: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return cast(PreTrainedModel, self.model).config.vocab_size

    def prompt(self, length: int) -> list[int]:
        """Random ids, new ones at every call, none of them special."""
        return self.rng.integers(8, self.vocab_size, size=length).tolist()

    async def generate(self, prompt: list[int], *, n: int = 1, **params: Any) -> tuple[Completion, ...]:
        """Ask for `n` samples at once."""
        requests = (self.engine.generate(prompt, SamplingParams(**params)) for _ in range(n))
        return tuple(await asyncio.wait_for(asyncio.gather(*requests), LIMIT_S))

    def new_weights(self, noise: float = 0.05) -> WeightUpdate:
        """Other weights under the next version; the reference stays as it is."""
        generator = torch.Generator().manual_seed(self.version + 1)
        state = {
            name: tensor + noise * torch.randn(tensor.shape, generator=generator)
            for name, tensor in self.model.state_dict().items()
            if name != "lm_head.weight"
        }
        return pack_weights(state, self.version + 1)

    async def update(self, update: WeightUpdate) -> None:
        """Give the engine and the reference these weights."""
        self.old_weights[self.version] = {name: t.clone() for name, t in self.model.state_dict().items()}
        await asyncio.wait_for(self.engine.update_weights(update), LIMIT_S)
        assert update.tensors is not None
        self.model.load_state_dict({n: torch.from_numpy(a.copy()) for n, a in update.tensors.items()}, strict=False)
        self.version = update.manifest.policy_version

    @torch.inference_mode()
    def greedy(self, prompt: list[int], num: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, do_sample=False, eos_token_id=None
        )
        return out[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def check_logprobs(self, prompt: list[int], completion: Completion, temperature: float = 1.0) -> None:
        """Each token's log-probability is that of a plain forward pass under the weights of its span, to 1e-4."""
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        spans = completion.version_spans
        ends = [*(span.start for span in spans[1:]), len(completion.token_ids)]
        now = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for span, end in zip(spans, ends, strict=True):
            self.model.load_state_dict(self.old_weights.get(span.policy_version, now))
            logits = self.model(ids).logits[0].float() / (temperature or 1.0)
            targets = ids[0, len(prompt) :, None]
            expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, targets)[:, 0]
            found = torch.tensor(completion.logprobs)
            torch.testing.assert_close(found[span.start : end], expected[span.start : end], atol=1e-4, rtol=0)
        self.model.load_state_dict(now)


@pytest.mark.asyncio(loop_scope="class")
class EngineConformance:
    """The suite (see the top of the file)."""

    backend: ClassVar[str]
    settings: ClassVar[dict[str, Any]] = {}
    prefix_cache: ClassVar[bool] = True
    cache_granularity: ClassVar[int] = 1
    long_answer: ClassVar[int] = 400

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def harness(cls, tiny_policy_path, tmp_path_factory):
        log_dir = tmp_path_factory.mktemp(f"log_{cls.backend}")
        engine = make_engine(
            EngineConfig(**{"backend": cls.backend, "device": "cpu", **cls.settings}),
            policy_path=tiny_policy_path,
            max_context_tokens=MAX_CONTEXT,
            seed=0,
            log_dir=log_dir,
        )
        await engine.start()
        yield Harness(engine, tiny_policy_path, load_model(tiny_policy_path))
        await engine.close()

    def needs_prefix_cache(self) -> None:
        if not self.prefix_cache:
            pytest.skip("this engine keeps no prefixes")

    # What is generated

    async def test_greedy_equals_hugging_face(self, harness):
        prompts = [harness.prompt(length) for length in (1, 2, 7, 30, 64, 129, 200)]
        answers = await asyncio.gather(*(harness.generate(p, temperature=0, max_new_tokens=24) for p in prompts))
        for prompt, (completion,) in zip(prompts, answers, strict=True):
            assert list(completion.token_ids) == harness.greedy(prompt, 24)
            assert completion.finish_reason == "length"
            assert completion.prompt_tokens == len(prompt)
            harness.check_logprobs(prompt, completion, temperature=0)

    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    async def test_logprobs_are_of_the_scaled_distribution(self, harness, temperature):
        prompts = [harness.prompt(length) for length in (3, 50, 120)]
        answers = await asyncio.gather(
            *(harness.generate(p, temperature=temperature, max_new_tokens=20, n=2) for p in prompts)
        )
        for prompt, completions in zip(prompts, answers, strict=True):
            assert len({completion.token_ids for completion in completions}) == 2
            for completion in completions:
                assert completion.version_spans[0].policy_version == harness.version
                harness.check_logprobs(prompt, completion, temperature)

    async def test_samples_follow_the_distribution(self, harness):
        prompt = harness.prompt(20)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            probs = (harness.model(ids).logits[0, -1] / 0.5).softmax(-1)
        completions = await harness.generate(prompt, temperature=0.5, max_new_tokens=1, n=400)
        counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=len(probs))
        top = int(probs.argmax())
        sigma = float((probs[top] * (1 - probs[top]) * 400).sqrt())
        assert abs(float(counts[top]) - 400 * float(probs[top])) < 5 * sigma

    async def test_top_k_and_top_p_cut_the_tail_and_leave_logprobs_as_they_are(self, harness):
        prompt = harness.prompt(40)
        with torch.inference_mode():
            order = harness.model(torch.tensor([prompt])).logits[0, -1].softmax(-1).sort(descending=True)
        num_nucleus = int((order.values.cumsum(0) < 0.5).sum()) + 1
        by_k = await harness.generate(prompt, top_k=3, max_new_tokens=2, n=30)
        by_p = await harness.generate(prompt, top_p=0.5, max_new_tokens=2, n=30)
        assert {c.token_ids[0] for c in by_k} <= set(order.indices[:3].tolist())
        assert {c.token_ids[0] for c in by_p} <= set(order.indices[:num_nucleus].tolist())
        assert len({c.token_ids[0] for c in by_k}) > 1
        for completion in (*by_k, *by_p):
            harness.check_logprobs(prompt, completion)
        (greedy,) = await harness.generate(prompt, top_k=1, max_new_tokens=10)
        assert list(greedy.token_ids) == harness.greedy(prompt, 10)

    # When it ends

    async def test_stop_token_stays_and_ends_the_answer(self, harness):
        prompt = harness.prompt(25)
        expected = harness.greedy(prompt, 20)
        stop = expected[6]
        cut = expected.index(stop) + 1
        unused = next(token for token in range(8, harness.vocab_size) if token not in expected)
        (completion,) = await harness.generate(prompt, temperature=0, max_new_tokens=20, stop_token_ids=(unused, stop))
        assert list(completion.token_ids) == expected[:cut]
        assert completion.finish_reason == "stop"

    async def test_stop_string_ends_the_answer_with_the_token_that_completes_it(self, harness):
        prompt = harness.prompt(25)
        expected = harness.greedy(prompt, 20)
        tokenizer = load_tokenizer(harness.policy_path)
        stop = tokenizer.decode(expected[6:8])
        cut = next(i for i in range(1, 21) if stop in tokenizer.decode(expected[:i]))
        (completion,) = await harness.generate(prompt, temperature=0, max_new_tokens=20, stop=("never", stop))
        assert list(completion.token_ids) == expected[:cut]
        assert completion.finish_reason == "stop"

    async def test_the_answer_ends_where_the_context_is_full(self, harness):
        prompt = harness.prompt(MAX_CONTEXT - 12)
        (completion,) = await harness.generate(prompt, temperature=0, max_new_tokens=100)
        assert completion.finish_reason == "length"
        assert 8 <= len(completion.token_ids) <= 12
        assert list(completion.token_ids) == harness.greedy(prompt, len(completion.token_ids))

    @pytest.mark.parametrize("bad", ["too long", "empty", "outside the vocabulary", "negative"])
    async def test_bad_requests_are_refused_and_harm_nobody(self, harness, bad):
        good = harness.prompt(30)
        bad_prompt = {
            "too long": harness.prompt(MAX_CONTEXT + 1),
            "empty": [],
            "outside the vocabulary": [9, harness.vocab_size],
            "negative": [9, -1],
        }[bad]
        running = asyncio.create_task(harness.generate(good, temperature=0, max_new_tokens=40))
        with pytest.raises(EngineRequestError):
            await harness.generate(bad_prompt)
        (completion,) = await running
        assert list(completion.token_ids) == harness.greedy(good, 40)

    # The prefix cache

    async def test_samples_of_one_cold_prompt_share_its_prefill(self, harness):
        self.needs_prefix_cache()
        prompt = harness.prompt(150)
        completions = await harness.generate(prompt, n=4, max_new_tokens=8)
        cached = sorted(completion.cached_tokens for completion in completions)
        assert cached[0] < 8  # a token or two may agree with an earlier prompt by chance
        assert cached[1] >= 150 - 1 - self.cache_granularity
        for completion in completions:
            harness.check_logprobs(prompt, completion)

    async def test_requests_that_arrive_together_share_a_cold_prompt(self, harness):
        self.needs_prefix_cache()
        prompt = harness.prompt(150)
        answers = await asyncio.gather(*(harness.generate(prompt, max_new_tokens=8) for _ in range(8)))
        hits = [completion for (completion,) in answers if completion.cached_tokens >= 149 - self.cache_granularity]
        assert len(hits) >= 6
        for (completion,) in answers:
            harness.check_logprobs(prompt, completion)

    async def test_a_branch_inside_a_finished_answer_hits_the_cache(self, harness):
        self.needs_prefix_cache()
        prompt = harness.prompt(40)
        (trunk,) = await harness.generate(prompt, max_new_tokens=100)
        branch = [*prompt, *trunk.token_ids[:57]]
        completions = await harness.generate(branch, max_new_tokens=12, n=3)
        for completion in completions:
            assert completion.cached_tokens >= 97 - 1 - self.cache_granularity
            harness.check_logprobs(branch, completion)
        next_turn = [*prompt, *trunk.token_ids, *harness.prompt(15)]
        (completion,) = await harness.generate(next_turn, max_new_tokens=12)
        assert completion.cached_tokens >= 139 - self.cache_granularity
        harness.check_logprobs(next_turn, completion)

    async def test_health_counts_tokens(self, harness):
        self.needs_prefix_cache()
        before = await harness.engine.health()
        await harness.generate(harness.prompt(60), n=3, max_new_tokens=5)
        after = await harness.engine.health()
        assert after.policy_version == harness.version
        assert after.prompt_tokens - before.prompt_tokens == 180
        assert after.generated_tokens - before.generated_tokens == 15
        assert 0 < after.cached_tokens - before.cached_tokens < 120
        assert (after.num_running, after.num_waiting) == (0, 0)

    # Requests in flight

    async def test_cancelling_the_task_aborts_the_request(self, harness):
        task = asyncio.create_task(harness.generate(harness.prompt(20), max_new_tokens=self.long_answer, n=3))
        other_prompt = harness.prompt(30)
        other = asyncio.create_task(harness.generate(other_prompt, temperature=0, max_new_tokens=30))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list((await other)[0].token_ids) == harness.greedy(other_prompt, 30)
        async with asyncio.timeout(LIMIT_S):
            while (await harness.engine.health()).num_running:
                await asyncio.sleep(0.02)

    # Weights

    async def test_an_update_in_flight_splits_the_answer_by_version(self, harness):
        prompt = harness.prompt(30)
        for attempt in range(8):
            old = harness.version
            task = asyncio.create_task(harness.generate(prompt, max_new_tokens=self.long_answer, n=3))
            await asyncio.sleep(0.05 * 1.5**attempt)
            await harness.update(harness.new_weights())
            completions = await task
            for completion in completions:
                harness.check_logprobs(prompt, completion)
                assert len(completion.token_ids) == self.long_answer
            if all([s.policy_version for s in c.version_spans] == [old, old + 1] for c in completions):
                return
        pytest.fail(f"no update fell into an answer of {self.long_answer} tokens: {completions[0].version_spans}")

    async def test_no_stale_kv_is_served_after_an_update(self, harness):
        self.needs_prefix_cache()
        prompt = harness.prompt(100)
        await harness.generate(prompt, max_new_tokens=30)
        await harness.update(harness.new_weights())
        (completion,) = await harness.generate(prompt, max_new_tokens=30)
        assert completion.cached_tokens == 0
        harness.check_logprobs(prompt, completion)
        (again,) = await harness.generate(prompt, temperature=0, max_new_tokens=10)
        assert again.cached_tokens >= 99 - self.cache_granularity
        assert list(again.token_ids) == harness.greedy(prompt, 10)

    async def test_requests_come_and_go_while_weights_change(self, harness):
        async def agent() -> list[tuple[list[int], Completion]]:
            turns, history = [], harness.prompt(12)
            for _ in range(6):
                (completion,) = await harness.generate(history, max_new_tokens=16)
                turns.append((history, completion))
                history = [*history, *completion.token_ids, *harness.prompt(3)]
            return turns

        first = harness.version
        agents = [asyncio.create_task(agent()) for _ in range(24)]
        while not all(task.done() for task in agents):
            await harness.update(harness.new_weights())
            await asyncio.sleep(0.05)
        turns = [turn for task in agents for turn in task.result()]
        assert len({span.policy_version for _, c in turns for span in c.version_spans}) > 1
        assert harness.version > first + 1
        for history, completion in turns[::7]:
            harness.check_logprobs(history, completion)

    async def test_an_update_by_path(self, harness, tmp_path):
        update = harness.new_weights()
        by_path = WeightUpdate(manifest=update.manifest, path=tmp_path)
        state = {n: torch.from_numpy(a.copy()) for n, a in update.tensors.items()}
        harness.model.save_pretrained(tmp_path, state_dict=state)
        await asyncio.wait_for(harness.engine.update_weights(by_path), LIMIT_S)
        harness.model.load_state_dict(state, strict=False)
        harness.version += 1
        prompt = harness.prompt(30)
        (completion,) = await harness.generate(prompt, max_new_tokens=20)
        assert completion.version_spans[0].policy_version == harness.version
        harness.check_logprobs(prompt, completion)

    @pytest.mark.parametrize("fault", ["unchanged", "corrupt", "missing", "wrong shape", "path without weights"])
    async def test_a_bad_update_is_an_error_and_a_good_one_heals(self, harness, fault, tmp_path):
        await harness.update(harness.new_weights())
        bad = self._bad_update(harness, fault, tmp_path)
        with pytest.raises(WeightSyncError):
            await asyncio.wait_for(harness.engine.update_weights(bad), LIMIT_S)
        await harness.update(harness.new_weights())
        prompt = harness.prompt(30)
        (completion,) = await harness.generate(prompt, temperature=0, max_new_tokens=20)
        assert list(completion.token_ids) == harness.greedy(prompt, 20)
        assert completion.version_spans[0].policy_version == harness.version

    def _bad_update(self, harness: Harness, fault: str, empty: Path) -> WeightUpdate:
        good = harness.new_weights()
        tensors = {name: torch.from_numpy(array.copy()) for name, array in good.tensors.items()}
        name = "model.layers.1.mlp.up_proj.weight"
        if fault == "unchanged":
            return pack_weights(
                {n: t for n, t in harness.model.state_dict().items() if n in tensors}, harness.version + 1
            )
        if fault == "corrupt":
            tensors[name][3, 4] += 1e-3
            return replace(good, tensors={n: t.numpy() for n, t in tensors.items()})
        if fault == "missing":
            del tensors[name]
        if fault == "wrong shape":
            tensors[name] = tensors[name][:-1]
        if fault == "path without weights":
            return WeightUpdate(manifest=good.manifest, path=empty)
        return pack_weights(tensors, harness.version + 1)
