"""Decide which requests of the embedded engine run and where their KV lies, and make one step for all of them.

A step:  admit ─► copy cached KV in ─► forward + sample ─► copy new KV to the radix cache ─► append ─► remove finished

A running request owns a row, with its tokens in host arrays and its KV in `kv[:, :, row]`. Rows are dense: the last one
takes the place of one that finished, so that attention can read the KV in place. With the host arrays, every rule of a
step (stop ids, limits, seeds, temperatures) acts on all rows at once.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from trace_async.engines.embedded.model import AttentionGroup, Reading, TorchModel
from trace_async.engines.embedded.radix_cache import RadixCache
from trace_async.engines.embedded.sampling import sample_tokens, uniforms
from trace_async.types import Completion, FinishReason, HiddenState, SamplingParams, VersionSpan

# The most new tokens in one step, which bounds its time and memory. On the CPU they are so few that activations stay in
# the cache. A longer prompt still runs, but alone.
MAX_PREFILL_TOKENS = {"cpu": 1_024, "cuda": 8_192}
# Longer prompts are computed in chunks, because the attention mask grows with chunk × context.
MAX_CHUNK_TOKENS = 1_024
# A request waits one step for another one that is computing at least so many tokens of its prefix.
MIN_SHARED_TOKENS = 8
FIRST_CAPACITY = 128


@dataclass(slots=True, eq=False)
class Request:
    """One sample."""

    prompt_tokens: int
    tokens: np.ndarray
    """Prompt and answer so far. Current only while the request waits; then the scheduler's arrays hold them."""
    params: SamplingParams
    limit: int
    """The most tokens of prompt and answer together."""
    key: int
    """Names its stream of random numbers."""
    logprobs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    """Of the answer, and current only while the request waits, like `tokens`."""
    spans: list[VersionSpan] = field(default_factory=list)
    cached_tokens: int | None = None
    """Prompt tokens found in the cache at its first admission (None before that)."""
    prompt_state: HiddenState | None = None
    aborted: bool = False


@dataclass(slots=True)
class Totals:
    """Tokens since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class Scheduler:
    """Holds all requests of one engine. Not thread-safe: one thread calls it, under `torch.inference_mode`."""

    def __init__(
        self,
        model: TorchModel,
        *,
        max_rows: int,
        max_context_tokens: int,
        kv_cache_tokens: int,
        decode: Callable[[list[int]], str] | None,
    ) -> None:
        """`kv_cache_tokens` 0 means no prefix cache. `decode` turns ids into text, for stop strings."""
        self._model = model
        self._max_rows = max_rows
        self._max_context_tokens = max_context_tokens
        self._decode = decode
        self._cache = RadixCache(kv_cache_tokens) if kv_cache_tokens else None
        self._pool = self._new_kv(1, kv_cache_tokens)
        self._capacity = min(FIRST_CAPACITY, max_context_tokens)
        self._kv = self._new_kv(max_rows, self._capacity)
        self._promised: list[tuple[int, int, np.ndarray]] = []
        self.policy_version = 0
        self.totals = Totals()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._tokens = np.zeros((max_rows, max_context_tokens), np.int64)
        self._logprobs = np.zeros((max_rows, max_context_tokens), np.float32)
        self._key = np.zeros(max_rows, np.uint64)
        self._length = np.zeros(max_rows, np.int64)
        self._computed = np.zeros(max_rows, np.int64)
        self._limit = np.zeros(max_rows, np.int64)
        self._prompt_tokens = np.zeros(max_rows, np.int64)
        self._temperature = np.zeros(max_rows, np.float32)
        self._top_p = np.ones(max_rows, np.float32)
        self._top_k = np.zeros(max_rows, np.int64)
        self._stop_ids = np.full((max_rows, 1), -1, np.int64)

    def step(self) -> list[tuple[Request, Completion]]:
        """Admit what fits, compute one token for every running request, and return those that finished."""
        self._admit()
        num_rows = len(self.running)
        if num_rows == 0:
            return []
        logits = self._forward(num_rows)
        tokens, logprobs = self._sample(logits, num_rows)
        self._computed[:num_rows] = self._length[:num_rows]
        self._store(self._promised)
        self._promised = []
        return self._remove(self._append(tokens, logprobs))

    def abort(self, request: Request) -> None:
        """Drop a request, whether it waits or runs."""
        request.aborted = True
        if request in self.running:
            self._remove([(self.running.index(request), "abort")])
        elif request in self.waiting:
            self.waiting.remove(request)

    def restart_all(self, policy_version: int) -> None:
        """Forget all KV, because the weights have changed, and queue running requests again with their tokens."""
        self.policy_version = policy_version
        if self._cache is not None:
            self._cache.clear()
        for row in reversed(range(len(self.running))):
            request, length = self.running[row], self._length[row]
            request.tokens = self._tokens[row, :length].copy()
            request.logprobs = self._logprobs[row, request.prompt_tokens : length].copy()
            self.waiting.appendleft(request)
        self.running.clear()

    def _admit(self) -> None:
        """Move waiting requests to rows, shortest new part first; siblings of one being computed wait for its KV."""
        budget, later = MAX_PREFILL_TOKENS[self._model.device.type], []
        admitted: list[tuple[Request, np.ndarray, int, np.ndarray]] = []
        empty = np.empty(0, np.int64)
        while self.waiting and budget > 0 and len(self.running) + len(admitted) < self._max_rows:
            request = self.waiting.popleft()
            cached, promise = empty, (0, empty)
            if self._cache is not None:
                # The last token is always computed: its logits are what the first new token is sampled from.
                match = self._cache.match(request.tokens[:-1])
                cached = match.slots
                if match.num_promised - len(cached) >= MIN_SHARED_TOKENS:
                    later.append(request)
                    continue
            num_new = len(request.tokens) - len(cached)
            if admitted and num_new > budget:
                later.append(request)
                break
            if self._cache is not None:
                promise = self._cache.insert(request.tokens)
            budget -= num_new
            admitted.append((request, cached, *promise))
        self.waiting.extendleft(reversed(later))
        admitted.sort(key=lambda entry: len(entry[0].tokens) - len(entry[1]))
        self._reserve(max((len(entry[0].tokens) for entry in admitted), default=0))
        sources, targets = [], []
        for request, cached, start, slots in admitted:
            row = self._fill_row(request, len(cached))
            sources.append(cached)
            targets.append(row * self._capacity + np.arange(len(cached)))
            self._promised.append((row, start, slots))
        if sources:
            self._copy(self._pool, np.concatenate(sources), self._kv, np.concatenate(targets))

    def _fill_row(self, request: Request, num_cached: int) -> int:
        row = len(self.running)
        self.running.append(request)
        length, params = len(request.tokens), request.params
        self._tokens[row, :length] = request.tokens
        self._logprobs[row, request.prompt_tokens : length] = request.logprobs
        self._key[row], self._prompt_tokens[row] = request.key, request.prompt_tokens
        self._length[row], self._computed[row], self._limit[row] = length, num_cached, request.limit
        self._temperature[row], self._top_p[row], self._top_k[row] = params.temperature, params.top_p, params.top_k
        num_stop = len(params.stop_token_ids)
        if num_stop > self._stop_ids.shape[1]:
            wider = np.full((self._max_rows, num_stop), -1, np.int64)
            wider[:, : self._stop_ids.shape[1]] = self._stop_ids
            self._stop_ids = wider
        self._stop_ids[row] = -1
        self._stop_ids[row, :num_stop] = params.stop_token_ids
        generated = length - request.prompt_tokens
        # A span in which nothing was written, because the weights changed again before it began, is replaced.
        if request.spans and request.spans[-1].start == generated:
            request.spans.pop()
        if not request.spans or request.spans[-1].policy_version != self.policy_version:
            request.spans.append(VersionSpan(generated, self.policy_version))
        if request.cached_tokens is None:
            request.cached_tokens = num_cached
            self.totals.prompt_tokens += length
            self.totals.cached_tokens += num_cached
        return row

    def _forward(self, num_rows: int) -> torch.Tensor:
        """Compute all tokens that have no KV yet. Returns the logits [rows, vocab] after each row's last token."""
        length, computed = self._length[:num_rows], self._computed[:num_rows]
        self._reserve(int(length.max()))
        for row in np.flatnonzero(length - computed > MAX_CHUNK_TOKENS):
            while length[row] - computed[row] > MAX_CHUNK_TOKENS:
                self._forward_rows(int(row), np.array([MAX_CHUNK_TOKENS]))
                computed[row] += MAX_CHUNK_TOKENS
        return self._forward_rows(0, length - computed)

    def _forward_rows(self, first_row: int, num_new: np.ndarray) -> torch.Tensor:
        """Compute the next `num_new` [rows] tokens of the rows from `first_row` on. Returns logits after the last."""
        rows = np.arange(first_row, first_row + len(num_new))
        computed, ends = self._computed[rows], np.cumsum(num_new)
        row_T = np.repeat(rows, num_new)
        # For each packed token: its place among the new tokens of its row.
        offset_T = np.arange(ends[-1]) - np.repeat(ends - num_new, num_new)
        position_T = self._computed[row_T] + offset_T
        groups = []
        for first, last in _runs_of_similar_width(num_new):
            tokens = slice(int(ends[first] - num_new[first]), int(ends[last - 1]))
            width = int(num_new[first:last].max())
            padded_T = (row_T[tokens] - rows[first]) * width + offset_T[tokens]
            length = int((computed + num_new)[first:last].max())
            groups.append(
                AttentionGroup(
                    first_token=tokens.start,
                    last_token=tokens.stop,
                    first_row=first_row + first,
                    last_row=first_row + last,
                    width=width,
                    padded_T=self._to_device(padded_T) if width > 1 else None,
                    mask=self._mask(last - first, width, length, padded_T, position_T[tokens]),
                )
            )
        readers = self._readers(rows, computed + num_new)
        logits, states = self._model.forward(
            self._to_device(self._tokens[row_T, position_T]),
            self._to_device(position_T),
            self._to_device(row_T * self._capacity + position_T),
            self._to_device(ends - 1),
            groups,
            self._kv,
            self._reading(readers, num_new[readers - first_row], ends[readers - first_row]),
        )
        if states is not None:
            for row, state, count in zip(
                readers.tolist(), states.cpu().numpy(), num_new[readers - first_row], strict=True
            ):
                request = self.running[row]
                num_tokens = min(int(count), request.params.read_tokens)
                request.prompt_state = HiddenState(self.policy_version, num_tokens, state.tobytes())
        return logits

    def _readers(self, rows: np.ndarray, computed: np.ndarray) -> np.ndarray:
        """Return those of `rows` whose prompt is complete after this step and whose state is wanted."""
        fresh = rows[computed == self._prompt_tokens[rows]]
        return np.array([row for row in fresh if self.running[row].params.read_layers is not None], dtype=np.int64)

    def _reading(self, readers: np.ndarray, num_new: np.ndarray, ends: np.ndarray) -> Reading | None:
        """Ask the model to read, for every reader, its last new tokens of this step, at most `read_tokens`."""
        if not len(readers):
            return None
        params = self.running[readers[0]].params
        assert params.read_layers is not None
        counts = np.minimum(num_new, params.read_tokens)
        state = np.repeat(np.arange(len(readers)), counts)
        back = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return Reading(
            num_layers=params.read_layers or self._model.num_layers,
            num_states=len(readers),
            tokens=self._to_device(np.repeat(ends - counts, counts) + back),
            state=self._to_device(state),
            counts=self._to_device(counts[:, None].astype(np.float32)),
        )

    def _mask(self, rows: int, width: int, length: int, padded_T: np.ndarray, position_T: np.ndarray) -> torch.Tensor:
        """Return the additive mask [rows, 1, width, length]: a token sees its own position and all before it.

        Padding sees position 0, because a softmax over nothing would be NaN.
        """
        position = np.zeros(rows * width, np.int64)
        position[padded_T] = position_T
        last_seen = self._to_device(position).view(rows, 1, width, 1)
        hidden = torch.arange(length, device=self._model.device) > last_seen
        zeros = torch.zeros(hidden.shape, dtype=self._model.dtype, device=self._model.device)
        return zeros.masked_fill_(hidden, float("-inf"))

    def _sample(self, logits: torch.Tensor, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        top_p, top_k = self._top_p[:num_rows], self._top_k[:num_rows]
        filtered = bool((top_p < 1).any() or (top_k > 0).any())
        tokens, logprobs = sample_tokens(
            logits,
            self._to_device(self._temperature[:num_rows]),
            self._to_device(uniforms(self._key[:num_rows], self._length[:num_rows])),
            self._to_device(top_p) if filtered else None,
            self._to_device(top_k) if filtered else None,
        )
        return tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _append(self, tokens: np.ndarray, logprobs: np.ndarray) -> list[tuple[int, FinishReason]]:
        """Add each row's new token. Returns the rows that are finished, ascending, and why."""
        if not np.isfinite(logprobs).all():
            raise FloatingPointError("the model's logits are not finite: the weights are broken")
        rows = np.arange(len(tokens))
        length = self._length[: len(tokens)]
        self._tokens[rows, length] = tokens
        self._logprobs[rows, length] = logprobs
        length += 1
        self.totals.generated_tokens += len(tokens)
        stopped = (self._stop_ids[: len(tokens)] == tokens[:, None]).any(axis=1)
        for row, request in enumerate(self.running):
            if request.params.stop and not stopped[row]:
                stopped[row] = self._ends_with_stop_string(row, request)
        finished = np.flatnonzero(stopped | (length >= self._limit[: len(tokens)]))
        return [(int(row), "stop" if stopped[row] else "length") for row in finished]

    def _ends_with_stop_string(self, row: int, request: Request) -> bool:
        assert self._decode is not None, "requests with stop strings are refused without a tokenizer"
        # Only strings that the newest token completes matter, and a character has at most four tokens (its bytes).
        window = 4 * max(len(text) for text in request.params.stop) + 4
        start = max(request.prompt_tokens, int(self._length[row]) - window)
        text = self._decode(self._tokens[row, start : self._length[row]].tolist())
        return any(stop in text for stop in request.params.stop)

    def _remove(self, finished: list[tuple[int, FinishReason]]) -> list[tuple[Request, Completion]]:
        """Take rows (ascending) out of the batch and store their KV in the radix cache."""
        done = [self._completion(row, reason) for row, reason in finished]
        if self._cache is not None:
            known = [(row, self._tokens[row, : self._computed[row]]) for row, _ in finished]
            self._store([(row, *self._cache.insert(tokens)) for row, tokens in known])
        # From the highest row down, so that the last row, which fills a gap, is never one that is finished itself.
        for row, _ in reversed(finished):
            self._move_last_row_to(row)
        return done

    def _completion(self, row: int, reason: FinishReason) -> tuple[Request, Completion]:
        request, answer = self.running[row], slice(self.running[row].prompt_tokens, self._length[row])
        completion = Completion(
            token_ids=tuple(self._tokens[row, answer].tolist()),
            logprobs=tuple(self._logprobs[row, answer].tolist()),
            version_spans=tuple(request.spans),
            finish_reason=reason,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=request.cached_tokens or 0,
            prompt_state=request.prompt_state,
        )
        return request, completion

    def _move_last_row_to(self, row: int) -> None:
        last = len(self.running) - 1
        if row != last:
            self.running[row] = self.running[last]
            length = self._length[last]
            self._kv[:, :, row, :length] = self._kv[:, :, last, :length]
            for array in self._arrays():
                array[row] = array[last]
        self.running.pop()

    def _arrays(self) -> list[np.ndarray]:
        """List what the host keeps by row."""
        wide: list[np.ndarray] = [self._tokens, self._logprobs, self._stop_ids, self._key]
        return [
            *wide,
            self._length,
            self._computed,
            self._limit,
            self._prompt_tokens,
            self._temperature,
            self._top_p,
            self._top_k,
        ]

    def _store(self, parts: list[tuple[int, int, np.ndarray]]) -> None:
        """Copy KV from rows to the pool. A part is (row, first position, pool slots)."""
        if self._cache is None or not parts:
            return
        sources = [row * self._capacity + start + np.arange(len(slots)) for row, start, slots in parts]
        self._copy(self._kv, np.concatenate(sources), self._pool, np.concatenate([slots for _, _, slots in parts]))
        self._cache.settle()

    def _copy(self, source: torch.Tensor, source_at: np.ndarray, target: torch.Tensor, target_at: np.ndarray) -> None:
        if len(source_at):
            picked = source.flatten(2, 3).index_select(2, self._to_device(source_at))
            target.flatten(2, 3).index_copy_(2, self._to_device(target_at), picked)

    def _reserve(self, length: int) -> None:
        """Make the rows long enough for `length` tokens."""
        if length <= self._capacity:
            return
        old, old_capacity = self._kv, self._capacity
        self._capacity = min(max(length, 2 * old_capacity), self._max_context_tokens)
        self._kv = self._new_kv(self._max_rows, self._capacity)
        self._kv[:, :, :, :old_capacity] = old

    def _new_kv(self, rows: int, capacity: int) -> torch.Tensor:
        """Make an empty KV [layers, 2, rows, capacity, kv_heads, head_dim]."""
        model = self._model
        # Zeros, because attention multiplies masked positions by 0, and 0·NaN is NaN.
        shape = (model.num_layers, 2, rows, capacity, model.num_kv_heads, model.head_dim)
        return torch.zeros(shape, dtype=model.dtype, device=model.device)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._model.device)


def _runs_of_similar_width(num_new: np.ndarray) -> list[tuple[int, int]]:
    """Return the borders of the runs of neighbouring rows that run attention together: width 1, up to 16, up to 32, …

    The running rows (width 1) come first, then the admitted ones, sorted. So similar widths are neighbours.
    """
    bucket = np.where(num_new == 1, 0, np.maximum(4, np.ceil(np.log2(num_new))))
    return list(pairwise([0, *(np.flatnonzero(np.diff(bucket)) + 1).tolist(), len(num_new)]))
