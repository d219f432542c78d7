"""Generate in pure PyTorch in this process, on the CPU or one GPU: the embedded engine.

The event loop hands requests and commands to one worker thread, which owns the scheduler and runs step after step. So
the loop stays responsive, and nothing in the scheduler needs a lock.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from trace_async.config import EngineConfig
from trace_async.engine import (
    EngineDeadError,
    EngineError,
    EngineHealth,
    EngineRequestError,
    EngineTimeoutError,
    WeightSyncError,
)
from trace_async.engines.embedded.model import TorchModel
from trace_async.engines.embedded.sampling import stream_key
from trace_async.engines.embedded.scheduler import Request, Scheduler
from trace_async.policy.device import resolve_device
from trace_async.policy.load import load_tokenizer
from trace_async.types import Completion, SamplingParams
from trace_async.weights import WeightUpdate, read_weights

Command = Callable[[Scheduler], None]
Result = TypeVar("Result")


class TorchEngine:
    """Runs a local Hugging Face model with continuous batching and a radix cache (see the Engine protocol).

    Its KV needs (max_running_requests · longest request + kv_cache_tokens) · layers · 2 · kv_heads · head_dim numbers.
    After a weight update the KV of requests in flight is computed anew under the new weights; their tokens stay.
    """

    def __init__(
        self, config: EngineConfig, *, policy_path: Path, max_context_tokens: int, seed: int, log_dir: Path
    ) -> None:
        """`log_dir` is for engines that are processes of their own; this one writes no log."""
        self._config = config
        self._policy_path = policy_path
        self._max_context_tokens = max_context_tokens
        self._seed = seed
        self._num_requests = 0
        self._model: TorchModel | None = None
        self._scheduler: Scheduler | None = None
        self._has_tokenizer = False
        self._futures: dict[Request, asyncio.Future[Completion]] = {}
        self._commands: set[asyncio.Future[None]] = set()
        self._inbox: deque[Command] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._last_progress = time.monotonic()
        self._thread: threading.Thread | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._load)
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()
        self._watcher = asyncio.create_task(self._watch())

    def _load(self) -> None:
        config = self._config
        torch.set_num_threads(config.num_threads)
        device = resolve_device(config.device, name="engine.device")
        try:
            model = TorchModel(
                self._policy_path,
                device=device,
                dtype=config.dtype,
                max_context_tokens=self._max_context_tokens,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise EngineError(f"the torch engine cannot load {self._policy_path}: {error}") from error
        self._has_tokenizer = (self._policy_path / "tokenizer.json").is_file()
        self._model = model
        self._scheduler = Scheduler(
            model,
            max_rows=config.max_running_requests,
            max_context_tokens=self._max_context_tokens,
            kv_cache_tokens=config.kv_cache_tokens if config.prefix_cache else 0,
            decode=load_tokenizer(self._policy_path).decode if self._has_tokenizer else None,
        )

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        self._check_alive()
        prompt = np.array(prompt_ids, np.int64)
        self._check_request(prompt, params)
        request = self._new_request(prompt, params)
        future: asyncio.Future[Completion] = self._loop.create_future()
        self._expect_progress()
        self._futures[request] = future
        self._post(lambda scheduler: scheduler.waiting.append(request))
        try:
            return await future
        except BaseException:
            self._post(lambda scheduler: scheduler.abort(request))
            raise
        finally:
            del self._futures[request]

    def _check_request(self, prompt: np.ndarray, params: SamplingParams) -> None:
        assert self._model is not None
        if not 0 < len(prompt) < self._max_context_tokens:
            raise EngineRequestError(f"{len(prompt)} prompt tokens, the context holds {self._max_context_tokens}")
        if prompt.min() < 0 or prompt.max() >= self._model.vocab_size:
            raise EngineRequestError(f"a prompt id is outside the vocabulary of {self._model.vocab_size}")
        if params.stop and not self._has_tokenizer:
            raise EngineRequestError(f"stop strings need a tokenizer, and {self._policy_path} has no tokenizer.json")

    def _new_request(self, prompt: np.ndarray, params: SamplingParams) -> Request:
        key = stream_key(self._seed, self._num_requests)
        self._num_requests += 1
        return Request(
            prompt_tokens=len(prompt),
            tokens=prompt,
            params=params,
            limit=min(len(prompt) + params.max_new_tokens, self._max_context_tokens),
            key=key,
        )

    async def update_weights(self, update: WeightUpdate) -> None:
        self._check_alive()
        try:
            tensors = await asyncio.to_thread(read_weights, update)
        except (OSError, ValueError) as error:
            raise WeightSyncError(str(error)) from error
        version = update.manifest.policy_version

        def load(scheduler: Scheduler) -> None:
            assert self._model is not None
            # The same version again is no error, because a sender that is not sure it arrived may send it twice.
            if not self._model.load(tensors) and version != scheduler.policy_version:
                raise WeightSyncError(f"weights version {version} equal those of version {scheduler.policy_version}")
            scheduler.restart_all(version)

        await self._command(load)

    async def health(self) -> EngineHealth:
        self._check_alive()
        scheduler = self._scheduler
        assert scheduler is not None
        if (_has_work(scheduler) or self._inbox) and self._is_stuck():
            raise EngineTimeoutError(f"the torch engine made no step in {self._config.request_timeout_s} s")
        totals = scheduler.totals
        return EngineHealth(
            policy_version=scheduler.policy_version,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            prompt_tokens=totals.prompt_tokens,
            cached_tokens=totals.cached_tokens,
            generated_tokens=totals.generated_tokens,
        )

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._watcher is not None:
            self._watcher.cancel()
        self._fail_all(EngineDeadError("the torch engine was closed"))
        if self._thread is not None:
            limit = self._config.request_timeout_s
            await asyncio.to_thread(self._thread.join, limit)
            if self._thread.is_alive():
                raise EngineTimeoutError(f"the torch engine's worker does not stop: a step takes over {limit} s")
        self._scheduler = self._model = None

    def _check_alive(self) -> None:
        if self._error is not None:
            raise EngineDeadError(f"the torch engine died: {self._error!r}") from self._error
        if self._scheduler is None or self._closing:
            raise EngineDeadError("the torch engine is not started, or closed")

    def _is_stuck(self) -> bool:
        return time.monotonic() - self._last_progress > self._config.request_timeout_s

    def _expect_progress(self) -> None:
        """Start to measure progress now if the worker was idle, since its sleep is no hang."""
        if not self._futures and not self._commands:
            self._last_progress = time.monotonic()

    async def _watch(self) -> None:
        """Fail everything that waits when the worker has made no step for `request_timeout_s`."""
        limit = self._config.request_timeout_s
        while True:
            await asyncio.sleep(limit / 4)
            if (self._futures or self._commands) and self._is_stuck():
                self._fail_all(EngineTimeoutError(f"the torch engine made no step in {limit} s"))

    async def _command(self, command: Command) -> None:
        """Run `command` in the worker thread between two steps. An EngineError of it is raised here."""
        self._check_alive()
        done: asyncio.Future[None] = self._loop.create_future()

        def run(scheduler: Scheduler) -> None:
            try:
                command(scheduler)
            except EngineError as error:
                self._loop.call_soon_threadsafe(_fail, done, error)
            else:
                self._loop.call_soon_threadsafe(_succeed, done, None)

        self._expect_progress()
        self._commands.add(done)
        self._post(run)
        try:
            await done
        finally:
            self._commands.discard(done)

    def _post(self, command: Command) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    @torch.inference_mode()
    def _run(self) -> None:
        """Run commands and then a step, again and again. This is the worker thread."""
        scheduler = self._scheduler
        assert scheduler is not None
        try:
            while self._next_commands(scheduler):
                finished = scheduler.step()
                self._last_progress = time.monotonic()
                if finished:
                    self._loop.call_soon_threadsafe(self._deliver, finished)
        except BaseException as error:  # noqa: BLE001 - whatever killed the worker must reach those who wait for it
            self._error = error
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._fail_all, EngineDeadError(f"the torch engine died: {error!r}"))

    def _next_commands(self, scheduler: Scheduler) -> bool:
        """Run what was posted, and sleep while there is nothing to do. Returns False when the engine closes."""
        with self._wake:
            while not self._closing and not self._inbox and not _has_work(scheduler):
                self._wake.wait()
            commands, self._inbox = self._inbox, deque()
            self._last_progress = time.monotonic()
        if self._closing:
            return False
        for command in commands:
            command(scheduler)
        return True

    def _deliver(self, finished: list[tuple[Request, Completion]]) -> None:
        for request, completion in finished:
            if (future := self._futures.get(request)) is not None:
                _succeed(future, completion)

    def _fail_all(self, error: EngineError) -> None:
        for future in self._futures.values():
            _fail(future, error)
        for command in self._commands:
            _fail(command, error)


def _has_work(scheduler: Scheduler) -> bool:
    return bool(scheduler.running or scheduler.waiting)


def _succeed(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
