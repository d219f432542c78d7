"""GeneratorPool: the generators' lives. They come and go while the run goes on.

        start ─► ready ─(died, hung, failed a weight update)─► gone ─► restarted ─► weights synced ─► ready

A generator is announced to the prompts only while it is ready, that is alive and serving the current weights.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from actors.generator import GeneratorStats, remote_generator
from trace_async.config import Config
from trace_async.engine import EngineError, EngineTimeoutError

log = logging.getLogger(__name__)

Announce = Callable[[Mapping[str, ActorHandle]], Awaitable[None]]
BROKEN = (RayActorError, RayTaskError, EngineError, TimeoutError)


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
        self.last_error: BaseException | None = None
        self.one_ready = asyncio.Event()
        self.changing = asyncio.Lock()  # weights never change while a generator is being admitted

    async def start(self) -> None:
        """The first generators, all of them ready; raises what the first one that failed said."""
        results = await asyncio.gather(*(self._add() for _ in range(self.target)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def resize(self, num_generators: int) -> None:
        """Scale to `num_generators` while the run goes on. Those that leave finish nothing: their requests move."""
        if num_generators < 1:
            raise ValueError(f"num_generators={num_generators}: keep at least one")
        self.target = num_generators
        while len(self.ready) > num_generators:
            await self._remove(next(reversed(self.ready)))
        self._refill()

    async def update_weights(self, weights: Sequence[ObjectRef], policy_version: int) -> float:
        """Every ready generator serves `policy_version` when this returns; one that fails is lost and replaced.

        Returns the share of the generators that were updated. Raises when none is left.
        """
        async with self.changing:
            self.weights = weights
            handles = dict(self.ready)
            results = await asyncio.gather(
                *(self._update_one(handle, weights) for handle in handles.values()), return_exceptions=True
            )
            for name, result in zip(handles, results, strict=True):
                if isinstance(result, BROKEN):
                    log.error("%s failed to take weights version %d: %r", name, policy_version, result)
                    self.last_error = result
                    await self._remove(name, lost=True)
                elif isinstance(result, BaseException):
                    raise result
                else:
                    assert result == policy_version, f"{name} serves version {result}, not {policy_version}"
            updated = len(self.ready)
        self._refill()
        if not updated and handles:
            await self._wait_for_one()
        return updated / max(1, len(handles))

    async def watch(self, every_s: float = 2.0) -> None:
        """Runs beside the trainer: finds generators that died or hang, replaces them."""
        while True:
            await asyncio.sleep(every_s)
            for name, handle in list(self.ready.items()):
                try:
                    async with asyncio.timeout(self.config.engine.request_timeout_s):
                        await handle.stats.remote()
                except BROKEN as error:
                    log.error("%s is lost: %r", name, error)
                    self.last_error = error
                    await self._remove(name, lost=True)
            self._refill()
            # A router leaves out a generator on which a request failed; hearing of it again, it goes back to it.
            await self.announce(self.ready)

    async def stats(self) -> list[GeneratorStats]:
        results = await asyncio.gather(*(h.stats.remote() for h in self.ready.values()), return_exceptions=True)
        return [result for result in results if isinstance(result, GeneratorStats)]

    async def close(self) -> None:
        for task in self.starting:
            task.cancel()
        handles, self.ready = list(self.ready.values()), {}
        await asyncio.gather(*(asyncio.wait_for(h.close.remote(), 30) for h in handles), return_exceptions=True)
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
                    await self._update_one(handle, self.weights)
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
            await asyncio.wait_for(handle.start.remote(), limit_s)
        except TimeoutError:
            raise EngineTimeoutError(
                f"{name} did not start within engine.start_timeout_s={limit_s:g}; raise it, or see {self.log_dir}"
            ) from None

    async def _update_one(self, handle: ActorHandle, weights: Sequence[ObjectRef]) -> int:
        return await asyncio.wait_for(handle.receive_weights.remote(*weights), self.config.engine.start_timeout_s)

    async def _remove(self, name: str, *, lost: bool = False) -> None:
        handle = self.ready.pop(name, None)
        if handle is None:
            return
        self.num_lost += lost
        if not self.ready:
            self.one_ready.clear()
        await self.announce(self.ready)
        if not lost:
            await asyncio.wait([asyncio.ensure_future(handle.close.remote())], timeout=30)
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
