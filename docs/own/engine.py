"""An inference engine of one's own: transformers' plain forward pass, token by token. Slow, and complete."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trace_async.config import EngineConfig
from trace_async.engine import EngineDeadError, EngineHealth, EngineRequestError, WeightSyncError
from trace_async.types import Completion, FinishReason, SamplingParams, VersionSpan
from trace_async.weights import WeightUpdate, read_weights


class TransformersEngine:
    """Keeps no KV: every token is a forward pass over its whole context, so nothing cached can be stale."""

    def __init__(
        self, config: EngineConfig, *, policy_path: Path, max_context_tokens: int, seed: int, log_dir: Path
    ) -> None:
        self._path, self._max_context = policy_path, max_context_tokens
        self._dtype = getattr(torch, config.dtype)
        self._random = torch.Generator().manual_seed(seed)
        # One at a time: a forward pass, or an update of the weights. So new weights come between two tokens.
        self._turn = asyncio.Lock()
        self._version = 0
        self._fault = "the engine was not started"
        self._num_running = self._prompt_tokens = self._generated_tokens = 0

    async def start(self) -> None:
        def load() -> None:
            self._model = AutoModelForCausalLM.from_pretrained(self._path, dtype=self._dtype).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(self._path)

        await asyncio.to_thread(load)
        self._fault = ""

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        self._check(prompt_ids)
        self._num_running += 1
        try:
            return await self._sample(list(prompt_ids), params)
        finally:  # also when the request is cancelled
            self._num_running -= 1

    def _check(self, prompt_ids: Sequence[int]) -> None:
        if self._fault:
            raise EngineDeadError(self._fault)
        if not 0 < len(prompt_ids) < self._max_context:
            raise EngineRequestError(f"{len(prompt_ids)} prompt tokens: 1 to {self._max_context - 1} are possible")
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._model.config.vocab_size:
            raise EngineRequestError(f"a prompt id is outside the vocabulary of {self._model.config.vocab_size}")

    async def _sample(self, ids: list[int], params: SamplingParams) -> Completion:
        num_prompt = len(ids)
        logprobs: list[float] = []
        spans: list[VersionSpan] = []
        finish: FinishReason = "length"
        for _ in range(min(params.max_new_tokens, self._max_context - num_prompt)):
            async with self._turn:
                if self._fault:
                    raise EngineDeadError(self._fault)
                token, logprob = await asyncio.to_thread(self._next, ids, params)
                if not spans or spans[-1].policy_version != self._version:
                    spans.append(VersionSpan(len(logprobs), self._version))
            ids.append(token)
            logprobs.append(logprob)
            self._generated_tokens += 1
            text = self._tokenizer.decode(ids[num_prompt:]) if params.stop else ""
            if token in params.stop_token_ids or any(stop in text for stop in params.stop):
                finish = "stop"
                break
        self._prompt_tokens += num_prompt
        return Completion(
            token_ids=tuple(ids[num_prompt:]),
            logprobs=tuple(logprobs),
            version_spans=tuple(spans),
            finish_reason=finish,
            prompt_tokens=num_prompt,
            cached_tokens=0,
        )

    @torch.inference_mode()
    def _next(self, ids: list[int], params: SamplingParams) -> tuple[int, float]:
        """The next token and its log-probability, of the whole distribution at the sampling temperature."""
        logits = self._model(torch.tensor([ids])).logits[0, -1].float()
        logprobs = (logits / (params.temperature or 1.0)).log_softmax(-1)
        if params.temperature == 0:
            token = int(logprobs.argmax())
        else:
            ordered = logprobs.sort(descending=True)
            kept = ordered.values.exp().cumsum(0) - ordered.values.exp() < params.top_p
            if params.top_k:
                kept[params.top_k :] = False
            candidates = ordered.values.masked_fill(~kept, -math.inf).softmax(-1)
            token = int(ordered.indices[torch.multinomial(candidates, 1, generator=self._random)])
        return token, float(logprobs[token])

    async def update_weights(self, update: WeightUpdate) -> None:
        async with self._turn:
            try:
                await asyncio.to_thread(self._load, update)
            except WeightSyncError as error:
                self._fault = str(error)  # it must not serve until a later update has succeeded
                raise
            self._version, self._fault = update.manifest.policy_version, ""

    def _load(self, update: WeightUpdate) -> None:
        try:
            new = read_weights(update)  # compares the checksum with the sender's
        except ValueError as error:
            raise WeightSyncError(str(error)) from error
        own = dict(self._model.named_parameters())  # a tied head appears once
        if {name: tensor.shape for name, tensor in new.items()} != {name: tensor.shape for name, tensor in own.items()}:
            raise WeightSyncError(f"version {update.manifest.policy_version}: other names or shapes than the policy's")
        if all(torch.equal(tensor.to(self._dtype), own[name]) for name, tensor in new.items()):
            raise WeightSyncError(f"version {update.manifest.policy_version}: nothing changed")
        with torch.no_grad():
            for name, tensor in new.items():
                own[name].copy_(tensor)

    async def health(self) -> EngineHealth:
        if self._fault:
            raise EngineDeadError(self._fault)
        return EngineHealth(
            policy_version=self._version,
            num_running=self._num_running,
            num_waiting=0,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=0,
            generated_tokens=self._generated_tokens,
        )

    async def close(self) -> None:
        self._fault = "the engine was closed"
