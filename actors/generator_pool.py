"""GeneratorPool: the generators' lives. They come and go while the run goes on.

        start ─► ready ─(died, hung, failed a weight update)─► gone ─► restarted ─► weights synced ─► ready
                   └────(one too many)─► draining ─(its last request answered)─► closed

A generator is announced to the prompts only while it is ready, that is alive and serving the current weights. The watch
runs from `start` to `close`, so whoever uses the pool, training or an evaluation, has its generators replaced.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from actors.calls import CallError, CallTimeoutError, ask, ask_all
from actors.generator import GeneratorStats, remote_generator
from trace_async.config import Config
from trace_async.engine import EngineError, EngineTimeoutError

log = logging.getLogger(__name__)

Announce = Callable[[Mapping[str, ActorHandle]], Awaitable[None]]
BROKEN = (CallError, RayTaskError, EngineError)
WATCH_EVERY_S = 2.0
CLOSE_LIMIT_S = 30.0


class GeneratorPool:
    """Lives in the trainer's process. `announce` tells every PromptActor which generators are ready."""

    def __init__(self, config: Config, policy_path: Path, log_dir: Path, announce: Announce) -> None:
        self.config = config
        self.policy_path = policy_path
        self.log_dir = log_dir
        self.announce = announce
        self.ready: dict[str, ActorHandle] = {}
        self.target = config.actors.num_generators
        self.num_made = 0
        self.num_lost = 0
        self.weights: Sequence[ObjectRef] = ()  # buckets and, last, their manifest
        self.starting: set[asyncio.Task[None]] = set()
        self.draining: set[asyncio.Task[None]] = set()
        self.watching: asyncio.Task[None] | None = None
        self.last_error: BaseException | None = None
        self.one_ready = asyncio.Event()
        self.changing = asyncio.Lock()  # weights never change while a generator is being admitted

    async def start(self) -> None:
        """The first generators, all of them ready, and the watch; raises what the first one that failed said."""
        results = await asyncio.gather(*(self._add() for _ in range(self.target)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        self.watching = asyncio.create_task(self.watch())

    async def resize(self, num_generators: int) -> None:
        """Scale to `num_generators` while the run goes on; returns before new ones have started.

        One that leaves gets no new request and is closed once it has answered those it has.
        """
        if num_generators < 1:
            raise ValueError(f"num_generators={num_generators}: keep at least one")
        self.target = num_generators
        await self._shrink()
        self._refill()

    async def _shrink(self) -> None:
        leaving = [(name, self.ready.pop(name)) for name in list(self.ready)[self.target :]]
        if leaving:
            await self.announce(self.ready)
        for name, handle in leaving:
            task = asyncio.create_task(self._drain(name, handle))
            self.draining.add(task)
            task.add_done_callback(self.draining.discard)

    async def _drain(self, name: str, handle: ActorHandle) -> None:
        limit_s = self.config.engine.request_timeout_s
        try:
            await ask(handle.drained.remote(), who=name, limit_s=limit_s)
            await ask(handle.close.remote(), who=name, limit_s=CLOSE_LIMIT_S)
        except BROKEN as error:
            log.warning("%s was to leave and is killed: %r", name, error)
        finally:
            ray.kill(handle)

    async def update_weights(self, weights: Sequence[ObjectRef], policy_version: int) -> float:
        """Every ready generator serves `policy_version` when this returns; one that fails is lost and replaced.

        Returns the share of the generators that were updated. Raises when none is left.
        """
        async with self.changing:
            self.weights = weights
            handles = dict(self.ready)
            results = await asyncio.gather(
                *(self._update_one(name, handle, weights) for name, handle in handles.items()), return_exceptions=True
            )
            for name, result in zip(handles, results, strict=True):
                if isinstance(result, BROKEN):
                    log.error("%s failed to take weights version %d: %r", name, policy_version, result)
                    self.last_error = result
                    await self._lose(name)
                elif isinstance(result, BaseException):
                    raise result
                else:
                    assert result == policy_version, f"{name} serves version {result}, not {policy_version}"
            updated = len(self.ready)
        self._refill()
        if not updated and handles:
            await self._wait_for_one()
        return updated / max(1, len(handles))

    async def watch(self, every_s: float = WATCH_EVERY_S) -> None:
        """Finds generators that died or hang, replaces them; for ever. `start` begins it."""
        limit_s = self.config.engine.request_timeout_s
        while True:
            await asyncio.sleep(every_s)
            handles = dict(self.ready)
            answers = await ask_all([h.stats.remote() for h in handles.values()], who=list(handles), limit_s=limit_s)
            for name, answer in zip(handles, answers, strict=True):
                if isinstance(answer, BROKEN):
                    log.error("%s is lost: %r", name, answer)
                    self.last_error = answer
                    await self._lose(name)
                elif isinstance(answer, BaseException):
                    raise answer
            await self._shrink()
            self._refill()
            # A router leaves out a generator on which a request failed; hearing of it again, it goes back to it.
            await self.announce(self.ready)

    async def stats(self) -> dict[str, GeneratorStats]:
        """By name, of those that answer."""
        handles = dict(self.ready)
        answers = await ask_all([h.stats.remote() for h in handles.values()], who=list(handles), limit_s=CLOSE_LIMIT_S)
        found = zip(handles, answers, strict=True)
        return {name: answer for name, answer in found if isinstance(answer, GeneratorStats)}

    async def close(self) -> None:
        tasks = [*self.starting, *self.draining, *([self.watching] if self.watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        handles, self.ready = list(self.ready.values()), {}
        replies = [handle.close.remote() for handle in handles]
        await ask_all(replies, who=["a generator that closes"] * len(replies), limit_s=CLOSE_LIMIT_S)
        for handle in handles:
            ray.kill(handle)

    async def _add(self) -> None:
        name, index = f"generator-{self.num_made}", self.num_made
        self.num_made += 1
        handle = remote_generator(self.config, self.policy_path, index, self.log_dir)
        try:
            await self._start(name, handle)
            async with self.changing:
                if self.weights:
                    await self._update_one(name, handle, self.weights)
                self.ready[name] = handle
                self.one_ready.set()
                await self.announce(self.ready)
        except BaseException:
            ray.kill(handle)
            raise
        log.info("%s is ready", name)

    async def _start(self, name: str, handle: ActorHandle) -> None:
        limit_s = self.config.engine.start_timeout_s
        try:
            await ask(handle.start.remote(), who=name, limit_s=limit_s)
        except CallTimeoutError:
            raise EngineTimeoutError(
                f"{name} did not start within engine.start_timeout_s={limit_s:g}; raise it, or see {self.log_dir}"
            ) from None

    async def _update_one(self, name: str, handle: ActorHandle, weights: Sequence[ObjectRef]) -> int:
        limit_s = self.config.engine.start_timeout_s
        return await ask(handle.receive_weights.remote(*weights), who=f"{name}, new weights:", limit_s=limit_s)

    async def _lose(self, name: str) -> None:
        handle = self.ready.pop(name, None)
        if handle is None:
            return
        self.num_lost += 1
        if not self.ready:
            self.one_ready.clear()
        await self.announce(self.ready)
        ray.kill(handle)

    def _refill(self) -> None:
        for _ in range(self.target - len(self.ready) - len(self.starting)):
            task = asyncio.create_task(self._replace())
            self.starting.add(task)
            task.add_done_callback(self.starting.discard)

    async def _replace(self) -> None:
        try:
            await self._add()
        except BROKEN as error:
            # The watch tries again; what waits for a generator has its own limit and names this error.
            log.error("a generator could not be started: %r", error)
            self.last_error = error

    async def _wait_for_one(self) -> None:
        try:
            async with asyncio.timeout(self.config.engine.start_timeout_s):
                await self.one_ready.wait()
        except TimeoutError:
            raise EngineError(f"no generator is left, and none could be started: {self.last_error!r}") from None
