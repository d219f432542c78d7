"""Simulate an engine without a model but with realistic *times*, to ask what a loop would do with 256 generators.

        arrive ─► prefill of what the radix cache lacks ─► decode in one batch with all others ─► finish
                  (stalls the batch, as in SGLang)         (a step's time grows with the batch)

Nothing is computed per token. While the batch stays the same, every request gains one token a step. So the engine
keeps one number, the steps done so far, and a request is finished when this number passes the step at which its last
token is written. Only arrivals, ends, prefills and weight updates change the pace.

All waiting is asyncio's, by the clock of the loop, so under a loop with virtual time an hour passes in seconds.
"""

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from trace_async.engine import EngineDeadError, EngineHealth, EngineRequestError, EngineTimeoutError, WeightSyncError
from trace_async.engines.embedded.radix_cache import RadixCache
from trace_async.types import Completion, SamplingParams, VersionSpan
from trace_async.weights import WeightUpdate

SIMULATED_LOGPROB = -0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyModel:
    """How long an engine takes. A decode step of a batch of b requests lasts `step_s + b · step_per_request_s`.

    The defaults are an 8B model on one H100: inter-token latencies of 4.6, 5.2, 5.9 and 7.6 ms at 1, 25, 50 and 100
    requests, as NVIDIA publishes for Llama-3.1-8B (NIM 1.8, docs.nvidia.com/nim/benchmarking/llm/1.0.0/performance),
    lie on 4.5 ms + .03 ms · b. Prefill is an assumption: 30,000 tokens/s are 2 · 8e9 · 3e4 = 480 TFLOP/s, about half
    of the card's dense bf16 rate.
    """

    step_s: float = 0.0045
    """Seconds of a decode step that do not depend on the batch."""
    step_per_request_s: float = 0.00003
    """Further seconds of a step for every request in the batch."""
    prefill_tokens_per_s: float = 30_000.0
    """Prompt tokens a second, of those that are not in the cache. Decoding waits meanwhile."""
    weight_update_s: float = 1.0
    """Seconds in which nothing is decoded while new weights arrive."""

    def step(self, batch: int) -> float:
        """Return the seconds of one decode step of `batch` requests."""
        return self.step_s + batch * self.step_per_request_s


@dataclass(slots=True, eq=False)
class _Request:
    """A request whose answer is known from the start; only its time is simulated."""

    prompt: np.ndarray
    answer: tuple[int, ...]
    cached: int
    """Prompt tokens that came from the cache."""
    done: asyncio.Future[None]
    last_step: float = 0.0
    """The count of steps at which its last token is written."""
    spans: list[VersionSpan] = field(default_factory=list)


class SimulatedEngine:
    """Implements the `Engine` protocol. `answer(prompt_ids, params)` gives the answer, stop token included.

    The radix cache holds `cache_tokens`. At most `max_running` requests are decoded at once; the others wait in order.
    The share `failure_rate` of the requests, drawn from `seed`, ends with EngineTimeoutError.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[int], SamplingParams], tuple[int, ...]],
        *,
        latency: LatencyModel | None = None,
        cache_tokens: int = 400_000,
        max_running: int = 256,
        max_context_tokens: int = 32_768,
        failure_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._answer = answer
        self._latency = latency or LatencyModel()
        self._cache = RadixCache(cache_tokens)
        self._max_running = max_running
        self._max_context_tokens = max_context_tokens
        self._failure_rate = failure_rate
        self._rng = np.random.default_rng(seed)
        self._policy_version = 0
        self._running: list[tuple[float, int, _Request]] = []  # a heap, by the step of the last token
        self._waiting: deque[_Request] = deque()
        self._order = itertools.count()
        self._steps = 0.0
        self._counted_until = 0.0
        self._stalled_until = 0.0
        self._dead = False
        self._timer: asyncio.TimerHandle | None = None
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._busy_s = 0.0
        self._decoding_request_s = 0.0

    async def start(self) -> None:
        self._counted_until = asyncio.get_running_loop().time()

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        self._check_alive()
        if not 0 < len(prompt_ids) < self._max_context_tokens:
            raise EngineRequestError(f"{len(prompt_ids)} prompt tokens, the context holds {self._max_context_tokens}")
        if self._rng.random() < self._failure_rate:
            raise EngineTimeoutError("the simulated engine drew a failure")
        room = min(params.max_new_tokens, self._max_context_tokens - len(prompt_ids))
        request = _Request(
            prompt=np.asarray(prompt_ids, np.int64),
            answer=tuple(self._answer(prompt_ids, params))[:room],
            cached=0,
            done=asyncio.get_running_loop().create_future(),
        )
        self._catch_up()
        self._waiting.append(request)
        self._admit()
        try:
            await request.done
        finally:
            self._drop(request)
        return self._completion(request, params)

    def _completion(self, request: _Request, params: SamplingParams) -> Completion:
        self._generated_tokens += len(request.answer)
        stopped = bool(request.answer) and request.answer[-1] in params.stop_token_ids
        return Completion(
            token_ids=request.answer,
            logprobs=(SIMULATED_LOGPROB,) * len(request.answer),
            version_spans=tuple(request.spans),
            finish_reason="stop" if stopped else "length",
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached,
        )

    # ── the pace ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _catch_up(self) -> None:
        """Count the steps done since the last change of the batch. Must be called before every change."""
        now = asyncio.get_running_loop().time()
        since, self._counted_until = self._counted_until, now
        if not self._running:
            return
        self._busy_s += now - since
        decoding_s = max(0.0, now - max(since, self._stalled_until))
        self._decoding_request_s += decoding_s * len(self._running)
        self._steps += decoding_s / self._latency.step(len(self._running))

    def _stall(self, seconds: float) -> None:
        self._stalled_until = max(self._stalled_until, self._counted_until) + seconds

    def _admit(self) -> None:
        """Let waiting requests join the batch while there is room, and time the next end anew."""
        while self._waiting and len(self._running) < self._max_running:
            request = self._waiting.popleft()
            request.cached = min(len(self._cache.match(request.prompt).slots), len(request.prompt) - 1)
            self._prompt_tokens += len(request.prompt)
            self._cached_tokens += request.cached
            self._remember(request.prompt)
            self._stall((len(request.prompt) - request.cached) / self._latency.prefill_tokens_per_s)
            request.spans = [VersionSpan(0, self._policy_version)] if request.answer else []
            request.last_step = self._steps + len(request.answer)
            heapq.heappush(self._running, (request.last_step, next(self._order), request))
        self._time_next_end()

    def _time_next_end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            steps_left = max(0.0, self._running[0][0] - self._steps)
            start = max(self._stalled_until, self._counted_until)
            when = start + steps_left * self._latency.step(len(self._running))
            self._timer = asyncio.get_running_loop().call_at(when, self._finish_due)

    def _finish_due(self) -> None:
        self._catch_up()
        # Steps are sums of quotients, so rounding may put what is due a little above the count.
        while self._running and self._running[0][0] <= self._steps + 1e-6:
            request = heapq.heappop(self._running)[2]
            self._remember(np.concatenate([request.prompt, np.asarray(request.answer, np.int64)]))
            if not request.done.done():
                request.done.set_result(None)
        self._admit()

    def _remember(self, tokens: np.ndarray) -> None:
        self._cache.insert(tokens)
        self._cache.settle()

    def _drop(self, request: _Request) -> None:
        """Free the place of a request that is over, finished or aborted."""
        if request in self._waiting:
            self._waiting.remove(request)
        kept = [entry for entry in self._running if entry[2] is not request]
        if len(kept) != len(self._running) and not self._dead:
            self._catch_up()
            self._running = kept
            heapq.heapify(self._running)
            self._admit()

    # ── weights, the end ─────────────────────────────────────────────────────────────────────────────────────────

    async def update_weights(self, update: WeightUpdate) -> None:
        """Take `latency.weight_update_s`. Requests in flight go on, with a new version span from their next token."""
        self._check_alive()
        version = update.manifest.policy_version
        if version == self._policy_version:
            raise WeightSyncError(f"version {version} is served already")
        self._catch_up()
        self._stall(self._latency.weight_update_s)
        self._policy_version = version
        self._cache.clear()
        # A request's next token is of the new version. Steps are fractional, so the count of written ones is cut off.
        for last_step, _, request in self._running:
            written = min(len(request.answer), int(len(request.answer) - (last_step - self._steps)))
            if written < len(request.answer):
                request.spans = [span for span in request.spans if span.start < written]
                request.spans.append(VersionSpan(written, version))
        self._time_next_end()
        await asyncio.sleep(self._latency.weight_update_s)

    async def health(self) -> EngineHealth:
        self._check_alive()
        return EngineHealth(
            policy_version=self._policy_version,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
        )

    @property
    def busy_s(self) -> float:
        """Seconds of the loop's clock with at least one request in the batch."""
        return self._busy_s

    @property
    def mean_batch(self) -> float:
        """Requests decoded at a time, on average over the seconds with any."""
        return self._decoding_request_s / self._busy_s if self._busy_s else 0.0

    async def close(self) -> None:
        self._dead = True
        if self._timer is not None:
            self._timer.cancel()
        for request in (*self._waiting, *(entry[2] for entry in self._running)):
            if not request.done.done():
                request.done.set_exception(EngineDeadError("the simulated engine was closed"))

    def _check_alive(self) -> None:
        if self._dead:
            raise EngineDeadError("the simulated engine was closed")
