"""Use a supervised inference server over loopback HTTP as an engine: what SGLang and vLLM have in common.

    generate ─► one request per sample, token ids in, token ids and log-probabilities out; cancelled = aborted there
    update_weights ─► checksum ─► hold: requests in flight keep their tokens and lose their KV
                      ─► load ─► flush the prefix cache ─► read back ─► release

A backend (sglang.py, vllm.py) adds how its server is started and what its requests look like.
"""

import asyncio
import functools
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from trace_async.engines.servers.broadcast import WeightBroadcast
from trace_async.engines.servers.http_client import HttpClient, Reply
from trace_async.engines.servers.server import SHARED_MEMORY, ServerProcess, free_port
from trace_async.engines.servers.weight_files import checked_tensors, weight_folder
from trace_async.engines.servers.weight_record import Tensors, WeightRecord
from trace_async.engines.work_clock import WorkClock
from trace_async.run.placement import num_gpus_here
from trace_async.types import Completion, SamplingParams, VersionSpan
from trace_async.weights import WeightManifest, WeightUpdate

READY_POLL_S = 0.25
PING_LIMIT_S = 20.0
START_ATTEMPTS = 3
Load = Callable[[Tensors], Awaitable[None]]


@dataclass(slots=True)
class _Totals:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class HttpEngine(ABC):
    """An engine whose model lives in a server process (see the Engine protocol).

    A sample ends with EngineTimeoutError when it takes longer than `engine.request_timeout_s`, not counting weight
    updates. After EngineDeadError or EngineTimeoutError, `start()` makes a fresh server with the weights of
    `policy_path` as version 0; sync weights before it serves. With `engine.url` no process is started or stopped. That
    server must run on this machine, with `policy_path` as its model.
    """

    name: str

    def __init__(
        self, config: EngineConfig, *, policy_path: Path, max_context_tokens: int, seed: int, log_dir: Path
    ) -> None:
        self._config = config
        self._policy_path = policy_path.resolve()
        self._max_context_tokens = max_context_tokens
        self._seed = seed
        self._log_path = (log_dir / f"{self.name}_{uuid.uuid4().hex[:8]}.log").resolve()
        self._on_gpu = config.device == "cuda" or (config.device == "auto" and num_gpus_here() > 0)
        self._dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self._vocab_size = int(json.loads((policy_path / "config.json").read_text())["vocab_size"])
        self._process: ServerProcess | None = None
        self._http: HttpClient | None = None
        self._in_flight: set[asyncio.Task[Reply]] = set()
        self._aborts: set[asyncio.Task[None]] = set()
        self._control = asyncio.Lock()
        self._broadcast = WeightBroadcast(
            num_workers=config.tensor_parallel_size, on_gpu=self._on_gpu, timeout_s=config.request_timeout_s
        )
        self._forget()

    def _forget(self) -> None:
        """Forget all that was known of a server, because a new one has been started."""
        self._totals = _Totals()
        self._record: WeightRecord | None = None
        self._found: dict[str, str] = {}  # the digests that the server reported last
        self._broken = ""
        self._clock = WorkClock()

    # What a backend defines -------------------------------------------------------------------------------------

    @abstractmethod
    def _command(self, port: int, scratch: Path) -> tuple[list[str], dict[str, str]]:
        """Return the server's command line and environment. Files for it may be put into `scratch`."""

    @abstractmethod
    def _generate_request(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> tuple[str, Reply]:
        """Return path and JSON body of the request."""

    @abstractmethod
    def _completion(self, reply: Reply) -> Completion: ...

    @abstractmethod
    async def _abort(self, request_id: str) -> None: ...

    @abstractmethod
    async def _ping(self) -> None:
        """Make a round trip to the part of the server that runs the model."""

    @abstractmethod
    async def _hold(self) -> None:
        """Stop decoding until `_release`, which computes the KV of what is in flight anew."""

    @abstractmethod
    async def _release(self) -> None: ...

    @abstractmethod
    async def _set_version(self, policy_version: int) -> None:
        """Label what is generated from now on."""

    @abstractmethod
    async def _load_from_folder(self, folder: Path, tensors: Tensors) -> None:
        """Load the safetensors in `folder`, which hold `tensors`. Raises EngineError when the server could not."""

    @abstractmethod
    async def _load_by_broadcast(self, tensors: Tensors) -> None:
        """Load `tensors` through `_broadcast`."""

    @abstractmethod
    async def _flush_cache(self) -> None: ...

    @abstractmethod
    async def _digests(self) -> dict[str, str]:
        """Return parameter → digest of what the server holds, or RECEIVED name → digest of what it loaded last."""

    def _start_weights(self) -> WeightUpdate | None:
        """Return what a fresh server holds (None: the weights of `policy_path`)."""
        return None

    # Start and stop ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        await self.close()
        self._forget()
        try:
            await self._start_server()
            await self._set_version(0)
            self._found = await self._digests()
            path, start = self._policy_path, self._start_weights()
            self._record = await asyncio.to_thread(WeightRecord, path, self._dtype, self._found, start)
        except BaseException:
            await self.close()
            raise

    async def _start_server(self) -> None:
        for attempts_left in reversed(range(START_ATTEMPTS)):
            url = self._config.url.rstrip("/")
            if not url:
                port = free_port()
                url = f"http://127.0.0.1:{port}"
                build = functools.partial(self._command, port)
                self._process = await asyncio.to_thread(ServerProcess, build, log_path=self._log_path)
            self._http = HttpClient(url, self._describe)
            try:
                await self._until_ready()
                break
            except EngineDeadError as error:
                # Another process may have taken the port after we found it free and before the server took it.
                if not attempts_left or "address already in use" not in str(error).lower():
                    raise
                await self.close()
        if self._process is not None:
            self._process.remember_shared_memory()

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + self._config.start_timeout_s
        while time.monotonic() < deadline:
            self._require_process()
            try:
                await self._ping()
                return
            except EngineError:
                await asyncio.sleep(READY_POLL_S)  # not listening yet, or still loading
        raise EngineTimeoutError(
            f"{self._describe()} was not ready after engine.start_timeout_s={self._config.start_timeout_s:g}"
        )

    async def close(self) -> None:
        http, self._http = self._http, None
        process, self._process = self._process, None
        for task in (*self._in_flight, *self._aborts):
            task.cancel()
        if process is not None:
            await process.stop()
        if http is not None:
            await http.close()
        await self._broadcast.close()

    def process_ids(self) -> list[int]:
        """Return the server's processes on this machine, the first one in front (empty if attached or not running)."""
        return self._process.process_ids() if self._process is not None else []

    def _describe(self) -> str:
        if self._process is None:
            return f"{self.name} at {self._config.url}"
        if self._process.exit_code is None:
            return f"{self.name} (log: {self._log_path})"
        return f"{self.name} (ended with code {self._process.exit_code}, log: {self._log_path})"

    def _require_process(self) -> None:
        if self._process is not None and self._process.exit_code is not None:
            raise EngineDeadError(f"{self._describe()}\n{self._process.log_tail()}")

    def _client(self) -> HttpClient:
        if self._http is None:
            raise EngineDeadError(f"{self.name} is not started, or closed")
        self._require_process()
        return self._http

    async def _get(self, path: str) -> Reply:
        return await self._client().get(path, limit_s=min(PING_LIMIT_S, self._config.request_timeout_s))

    async def _post(self, path: str, body: Reply = None) -> Reply:
        return await self._client().post(path, body or {}, limit_s=self._config.request_timeout_s)

    # Generation -------------------------------------------------------------------------------------------------

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        prompt = [int(token) for token in prompt_ids]
        return await self._sample(prompt, self._checked_request(prompt, params))

    def _checked_request(self, prompt: list[int], params: SamplingParams) -> SamplingParams:
        """Check a request, since a server may accept more than it can do, and cut `max_new_tokens` to the room left."""
        self._client()
        if self._broken:
            raise WeightSyncError(f"{self.name} must be synced before it serves: {self._broken}")
        room = self._max_context_tokens - len(prompt)
        if not prompt or room < 1:
            raise EngineRequestError(f"{len(prompt)} prompt tokens, the context holds {self._max_context_tokens}")
        if min(prompt) < 0 or max(prompt) >= self._vocab_size:
            raise EngineRequestError(f"a prompt id is outside the vocabulary of {self._vocab_size}")
        return replace(params, max_new_tokens=min(params.max_new_tokens, room))

    async def _sample(self, prompt: Sequence[int], params: SamplingParams) -> Completion:
        request_id = uuid.uuid4().hex
        path, body = self._generate_request(request_id, prompt, params)
        try:
            reply = await self._within_limit(self._client().post(path, body, limit_s=None))
        except (asyncio.CancelledError, EngineTimeoutError):
            self._abort_soon(request_id)
            raise
        except EngineError:
            await self._require_answer()  # a server whose worker died may still say so itself before it ends
            raise
        completion = self._completion(reply)
        self._totals.prompt_tokens += completion.prompt_tokens
        self._totals.cached_tokens += completion.cached_tokens
        self._totals.generated_tokens += len(completion.token_ids)
        return completion

    async def _within_limit(self, request: Coroutine[None, None, Reply]) -> Reply:
        """Return the reply. Raises EngineTimeoutError after `request_timeout_s` in which we did not hold the engine."""
        limit_s = self._config.request_timeout_s
        task = asyncio.ensure_future(request)
        self._in_flight.add(task)
        try:
            await self._clock.until_done(task, limit_s)
        except TimeoutError:
            raise EngineTimeoutError(f"{self._describe()} did not finish a request in {limit_s:g} s") from None
        finally:
            task.cancel()
            self._in_flight.discard(task)
        if task.cancelled():
            raise EngineDeadError(f"{self.name} was closed, or its weights broke, with the request in flight")
        return task.result()

    def _abort_soon(self, request_id: str) -> None:
        async def abort() -> None:
            try:
                await self._abort(request_id)
            except EngineError:
                return  # a server that is gone has nothing left to abort

        task = asyncio.create_task(abort())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    # Control ----------------------------------------------------------------------------------------------------

    async def _require_answer(self) -> None:
        try:
            await self._ping()
        except EngineDeadError:
            raise
        except EngineTimeoutError:
            # A server that loads weights may not answer meanwhile. If it hangs, the update itself will find out.
            if not self._control.locked():
                raise
        except EngineError as error:
            raise EngineDeadError(str(error)) from error

    @property
    def policy_version(self) -> int:
        """The version of the weights that serve now."""
        return self._record.policy_version if self._record is not None else 0

    async def health(self) -> EngineHealth:
        await self._require_answer()
        waiting = max(0, len(self._in_flight) - self._config.max_running_requests)
        return EngineHealth(
            policy_version=self.policy_version,
            num_running=len(self._in_flight) - waiting,
            num_waiting=waiting,
            prompt_tokens=self._totals.prompt_tokens,
            cached_tokens=self._totals.cached_tokens,
            generated_tokens=self._totals.generated_tokens,
        )

    async def update_weights(self, update: WeightUpdate) -> None:
        async with self._control:
            self._client()
            assert self._record is not None
            if not self._broken and self._record.has(update.manifest):
                return  # it holds these weights already, and to sync it again is no error
            if self._config.weight_sync == "collective":
                sent = await asyncio.to_thread(checked_tensors, update)
                with self._clock.held():
                    await self._replace_weights(self._load_by_broadcast, sent, update.manifest)
                return
            async with weight_folder(update, folders=self._weight_folders()) as (folder, tensors):
                load = functools.partial(self._load_from_folder, folder)
                with self._clock.held():
                    await self._replace_weights(load, tensors, update.manifest)

    async def _replace_weights(self, load: Load, tensors: Tensors, manifest: WeightManifest) -> None:
        record, repairing, loaded = self._record, bool(self._broken), False
        assert record is not None
        record.require_names(tensors)
        try:
            await self._hold()
            await load(tensors)
            await self._flush_cache()
            before, self._found = self._found, await self._digests()
            if self._found == before and not repairing:
                raise WeightSyncError("the engine holds the same weights as before")
            await asyncio.to_thread(record.require_loaded, tensors, self._found)
            await self._set_version(manifest.policy_version)
            record.set(manifest)
            loaded = True
        except EngineError as error:
            for task in self._in_flight:
                task.cancel()
            raise WeightSyncError(f"weights version {manifest.policy_version}: {error}") from error
        finally:
            # Requests that arrive during an update wait in the server. Only after a failed one are they refused.
            self._broken = "" if loaded else f"version {manifest.policy_version} was not loaded to its end"
            await self._release()

    def _weight_folders(self) -> tuple[Path, ...]:
        if self._process is None:
            return (SHARED_MEMORY, self._log_path.parent)
        if self._config.weight_sync == "disk":
            return (self._process.scratch,)
        return (self._process.shared_scratch, self._process.scratch)


def version_spans(spans: Sequence[dict[str, Reply]]) -> tuple[VersionSpan, ...]:
    """Read [{"version": "3", "start": 0, "end": 5}, …] as servers report it, and join neighbours of one version."""
    found: list[VersionSpan] = []
    for span in spans:
        if not found or found[-1].policy_version != int(span["version"]):
            found.append(VersionSpan(int(span["start"]), int(span["version"])))
    return tuple(found)
