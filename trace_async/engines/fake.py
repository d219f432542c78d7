"""Answer by a script instead of a model, for tests of everything that stands in front of an engine."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from trace_async.config import EngineConfig
from trace_async.engine import EngineDeadError, EngineHealth, EngineRequestError, WeightSyncError
from trace_async.types import Completion, FinishReason, SamplingParams, VersionSpan
from trace_async.weights import WeightUpdate, unpack_weights

Reply = Callable[[tuple[int, ...], int], Sequence[int]]

FAKE_LOGPROB = -0.5


class FakeEngine:
    """Answers request `i` for a prompt with `reply(prompt_ids, i)`, cut at a stop token or at `max_new_tokens`.

    It waits `token_latency_s` before each token, so that updates can fall between tokens. `failures` maps
    the number of a `generate` call (from 0) to the error that it raises instead of an answer. Every log-probability is
    FAKE_LOGPROB. The cached tokens are the longest prefix shared with anything seen before under the same weights.
    """

    def __init__(
        self,
        reply: Reply,
        *,
        vocab_size: int = 1_000,
        max_context_tokens: int = 4_096,
        token_latency_s: float = 0.0,
        failures: Mapping[int, Exception] | None = None,
    ) -> None:
        self._reply = reply
        self._vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self._token_latency_s = token_latency_s
        self._failures = dict(failures or {})
        self._running = asyncio.Event()
        self._running.set()
        self._dead = asyncio.Event()
        self._seen: list[tuple[int, ...]] = []
        self._asked: Counter[tuple[int, ...]] = Counter()
        self._policy_version = 0
        self._checksum = ""
        self._num_running = 0
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self.num_calls = 0

    async def start(self) -> None:
        self._dead.clear()

    def kill(self) -> None:
        """Let the engine die: everything in flight and everything new raises EngineDeadError."""
        self._dead.set()

    def hold(self) -> None:
        """Write no token until `release`, like an engine that hangs or one that loads weights."""
        self._running.clear()

    def release(self) -> None:
        """Go on after `hold`."""
        self._running.set()

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        self._check_alive()
        call, self.num_calls = self.num_calls, self.num_calls + 1
        if call in self._failures:
            raise self._failures[call]
        prompt = tuple(prompt_ids)
        if not prompt or len(prompt) >= self._max_context_tokens:
            raise EngineRequestError(f"{len(prompt)} prompt tokens, the context holds {self._max_context_tokens}")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise EngineRequestError(f"a prompt id is outside the vocabulary of {self._vocab_size}")
        self._num_running += 1
        try:
            return await self._sample(prompt, params)
        finally:
            self._num_running -= 1

    async def _sample(self, prompt: tuple[int, ...], params: SamplingParams) -> Completion:
        index, self._asked[prompt] = self._asked[prompt], self._asked[prompt] + 1
        cached = max((_num_shared(prompt, seen) for seen in self._seen), default=0)
        cached = min(cached, len(prompt) - 1)  # a real engine always computes the last token, for its logits
        self._seen.append(prompt)
        limit = min(params.max_new_tokens, self._max_context_tokens - len(prompt))
        tokens: list[int] = []
        spans: list[VersionSpan] = []
        finish_reason: FinishReason = "length"
        for token in list(self._reply(prompt, index))[:limit]:
            await asyncio.sleep(self._token_latency_s)
            await self._until_running()
            if not spans or spans[-1].policy_version != self._policy_version:
                spans.append(VersionSpan(len(tokens), self._policy_version))
            tokens.append(token)
            if token in params.stop_token_ids:
                finish_reason = "stop"
                break
        self._seen.append((*prompt, *tokens))
        self._prompt_tokens += len(prompt)
        self._cached_tokens += cached
        self._generated_tokens += len(tokens)
        return Completion(
            token_ids=tuple(tokens),
            logprobs=(FAKE_LOGPROB,) * len(tokens),
            version_spans=tuple(spans),
            finish_reason=finish_reason,
            prompt_tokens=len(prompt),
            cached_tokens=cached,
        )

    async def _until_running(self) -> None:
        self._check_alive()
        if self._running.is_set():
            return
        waits = [asyncio.ensure_future(event.wait()) for event in (self._running, self._dead)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._check_alive()

    def _check_alive(self) -> None:
        if self._dead.is_set():
            raise EngineDeadError("the fake engine was killed or closed")

    async def update_weights(self, update: WeightUpdate) -> None:
        self._check_alive()
        manifest = update.manifest
        if update.tensors is not None:
            try:
                unpack_weights(update)
            except ValueError as error:
                raise WeightSyncError(str(error)) from error
        if manifest.checksum == self._checksum and manifest.policy_version != self._policy_version:
            raise WeightSyncError(f"version {manifest.policy_version} is the same as {self._policy_version}")
        self._policy_version, self._checksum = manifest.policy_version, manifest.checksum
        self._seen.clear()

    async def health(self) -> EngineHealth:
        self._check_alive()
        return EngineHealth(
            policy_version=self._policy_version,
            num_running=self._num_running,
            num_waiting=0,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
        )

    async def close(self) -> None:
        self._dead.set()


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


class RandomReplyEngine(FakeEngine):
    """Answers with uniform random tokens of the policy's vocabulary (`engine.backend=fake`).

    The tokens are a function of the seed, the prompt and how often it was asked before. This is good for trying the
    plumbing of a run: no model is loaded, and nothing is learnt from it.
    """

    def __init__(
        self, config: EngineConfig, *, policy_path: Path, max_context_tokens: int, seed: int, log_dir: Path
    ) -> None:
        vocab_size = int(json.loads((policy_path / "config.json").read_text())["vocab_size"])

        def reply(prompt: tuple[int, ...], index: int) -> list[int]:
            rng = np.random.default_rng([seed, index, *prompt])
            return [int(token) for token in rng.integers(vocab_size, size=max_context_tokens)]

        super().__init__(reply, vocab_size=vocab_size, max_context_tokens=max_context_tokens)
